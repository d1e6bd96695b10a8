"""Launches and bytes counted without running anything, against counts by hand."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counted import count_compiled, static
from benchmarks.counted.count_launches import Launches, as_on_a_gpu, stored_bytes
from benchmarks.speed import ops
from cae_kernels.report import collect
from cae_kernels.residual_norm import residual_norm

pytest.importorskip("triton", reason="the kernels' reports and Inductor's scheduler need triton")


def test_eager_by_hand():
    x, w = torch.randn(8, 16), torch.randn(32, 16)
    with Launches() as counter:
        y = x @ w.t()  # reads 8 * 16 and 16 * 32, writes 8 * 32 floats; the transpose launches nothing
        y.add_(1)  # reads and writes y
        y.view(4, 2, 32).relu()
        torch.empty(1000)
        y.zero_()  # writes only
    assert counter.launches == {"mm": 1, "add_": 1, "relu": 1, "zero_": 1}
    size = 4 * 8 * 32
    assert counter.moved == {"mm": 4 * (8 * 16 + 16 * 32) + size, "add_": 2 * size, "relu": 2 * size, "zero_": size}
    assert counter.total()["other_bytes"] == 5 * size


def test_repeated_elements_count_once():
    assert stored_bytes(torch.zeros(1, 16).expand(8, 16)) == 4 * 16
    assert stored_bytes(torch.zeros(8, 16)[:, ::2]) == 4 * 64


def test_boolean_indexing_takes_half():
    with FakeTensorMode(), Launches() as counter:
        rows = torch.zeros(4, 6, 10)[torch.zeros(4, 6, dtype=torch.bool)]
    assert rows.shape == (12, 10)
    assert {"nonzero", "index"} <= set(counter.launches)


def test_ours_is_one_launch_and_what_the_report_says():
    """The registered op on fake tensors moves what its kernel's report states, and the row statistics."""
    (spec,) = collect("residual_norm forward ViT-L bf16")
    with FakeTensorMode(), as_on_a_gpu(), Launches() as counter:
        x, y = (torch.empty(256, 99, 1024, dtype=torch.bfloat16) for _ in range(2))
        vectors = [torch.empty(1024, dtype=torch.bfloat16) for _ in range(3)]
        residual_norm(x, y, vectors[0], None, (vectors[1], vectors[2]), 1e-6)
    assert counter.launches == {"residual_norm": 1}
    assert counter.moved["residual_norm"] == spec.bytes + 2 * 4 * 256 * 99 + 3 * 2 * 1024
    assert os.environ.get("CAE_KERNELS", "") != "all=reference"


def test_compiled_by_hand():
    """bias + GELU + add is one kernel: three tensors and a vector read, one written."""
    with FakeTensorMode():
        x, y = (torch.empty(512, 1024, dtype=torch.bfloat16) for _ in range(2))
        b = torch.empty(1024, dtype=torch.bfloat16)
        (only,) = count_compiled.count(lambda x, y, b: F.gelu(x + b) + y, [x, y, b])
    moved = 3 * x.nbytes + b.nbytes
    assert only == {"launches": 1, "bytes": moved, "other_bytes": moved}


def test_compiled_forward_and_backward_of_a_linear_layer():
    with FakeTensorMode():
        x = torch.empty(512, 1024, dtype=torch.bfloat16, requires_grad=True)
        w = torch.empty(2048, 1024, dtype=torch.bfloat16, requires_grad=True)
        forward, backward = count_compiled.count(F.linear, [x, w])
    out = 512 * 2048 * 2
    assert forward == {"launches": 1, "bytes": x.nbytes + w.nbytes + out, "other_bytes": 0}
    assert backward == {"launches": 2, "bytes": 2 * out + 2 * x.nbytes + 2 * w.nbytes, "other_bytes": 0}


@pytest.mark.parametrize("op", ["residual_norm", "squared_error"])
def test_ops_in_the_static_table(op):
    """Ours never moves more than eager or compiled, and within 2 % of what must move."""
    for row in static.count_ops("ViT-L", op):
        for ours, eager, compiled, moved in zip(row["ours"], row["eager"], row["compiled"], row["moved"], strict=True):
            assert ours["bytes"] <= min(eager["bytes"], 1.01 * compiled["bytes"])
            assert ours["bytes"] == pytest.approx(moved, rel=0.02)
    assert ops.SHAPES["ViT-L"] == (256, 196, 1024, 16)
