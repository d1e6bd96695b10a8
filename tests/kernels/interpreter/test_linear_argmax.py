"""The kernels of linear_argmax in Triton's interpreter.

Small integers make every product and sum exact, so that the winner, and the first of many equal ones, is known.
"""

import importlib

import numpy as np
import pytest
import torch

from cae_kernels.linear_argmax import linear_argmax

module = importlib.import_module("cae_kernels.linear_argmax")

# M, D, V
SHAPES = [(1, 192, 8191), (17, 85, 100), (98, 192, 8192), (130, 64, 1000), (63, 384, 257)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def integers(shape, dtype, low=-3, high=4):
    return torch.randint(low, high, shape).to(dtype)


def expected(x, weight, bias=None):
    logits = x.double().numpy() @ weight.double().numpy().T
    if bias is not None:
        logits = logits + bias.double().numpy()
    return torch.from_numpy(np.argmax(logits, -1))  # NumPy's is the first


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_exactly(shape, dtype, written):
    rows, width, codes = shape
    torch.manual_seed(sum(shape))
    x, weight, bias = integers((rows, width), dtype), integers((codes, width), dtype), integers((codes,), dtype, -9, 9)
    out = linear_argmax(x, weight, bias)
    written(out)
    assert out.dtype == torch.int64
    assert torch.equal(out, expected(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])
def test_requested_rows_in_any_order(dtype):
    torch.manual_seed(0)
    x, weight = integers((60, 192), dtype), integers((300, 192), dtype)
    rows = torch.tensor([59, 0, 3, 3, 58, 7] * 4)
    assert torch.equal(linear_argmax(x, weight, rows=rows), expected(x, weight)[rows])


def test_rows_of_a_strided_view():
    torch.manual_seed(0)
    x, weight = integers((2, 9, 64), torch.bfloat16), integers((100, 64), torch.bfloat16)
    sliced = x[:, 1:][0]
    assert torch.equal(linear_argmax(sliced, weight), expected(sliced, weight))
    columns = integers((64, 20), torch.bfloat16).t()
    assert torch.equal(linear_argmax(columns, weight), expected(columns, weight))


@pytest.mark.parametrize("rows", [1, 200])
def test_of_equal_logits_the_first_code_in_and_between_tiles_and_splits(rows):
    x, weight, bias = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((rows, 64), (8191, 64), (8191,)))
    assert not linear_argmax(x, weight, bias).any()
    for first in (255, 256, 4097, 8190):
        bias.zero_()
        bias[[first, 8190]] = 1.0
        assert (linear_argmax(x, weight, bias) == first).all()


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 32])
def test_the_split_does_not_change_the_result(splits, monkeypatch):
    torch.manual_seed(1)
    x, weight = integers((20, 64), torch.bfloat16), integers((8191, 64), torch.bfloat16)
    tiles = -(-32 // splits)
    monkeypatch.setattr(module, "_splits", lambda row_blocks, code_tiles: (-(-code_tiles // tiles), tiles))
    assert torch.equal(linear_argmax(x, weight), expected(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16", "fp32"])
def test_real_numbers_are_accumulated_in_float32(dtype):
    torch.manual_seed(2)
    x, weight, bias = (
        torch.randn(98, 512).to(dtype),
        (torch.randn(1000, 512) / 20).to(dtype),
        torch.randn(1000).to(dtype),
    )
    logits = x.double() @ weight.double().t() + bias.double()
    best = logits.topk(2, -1).values
    clear = best[:, 0] - best[:, 1] > 1e-5
    assert clear.sum() > 90
    assert torch.equal(linear_argmax(x, weight, bias)[clear], logits.argmax(-1)[clear])


def test_float32_is_not_rounded_to_tf32():
    torch.manual_seed(3)
    x, weight = torch.randn(20, 64).bfloat16().float(), torch.randn(50, 64).bfloat16().float()
    weight = torch.cat((weight, weight * (1 + 2**-13)))  # in TF32's 10 bits the same twice
    assert torch.equal(linear_argmax(x, weight), (x.double() @ weight.double().t()).argmax(-1))


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_logits_that_are_not_finite_give_a_code():
    x, weight = torch.ones(3, 64), torch.ones(100, 64)
    x[0] = float("nan")
    x[1] = float("-inf")
    x[2] = float("inf")
    out = linear_argmax(x, weight)
    assert (out == 0).all()


def test_no_rows():
    assert linear_argmax(torch.zeros(0, 64), torch.zeros(100, 64)).shape == (0,)
    rows = torch.zeros(0, dtype=torch.int64)
    assert linear_argmax(torch.zeros(4, 64), torch.zeros(100, 64), rows=rows).shape == (0,)


def test_compiled_as_eager():
    torch.manual_seed(3)
    x, weight = integers((20, 64), torch.float32), integers((300, 64), torch.float32)
    rows = torch.arange(0, 20, 3)
    compiled = torch.compile(linear_argmax, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, None, rows), linear_argmax(x, weight, None, rows))
    assert torch.equal(compiled(x, weight), linear_argmax(x, weight))


def test_the_small_tiles_of_other_devices(monkeypatch):
    torch.manual_seed(4)
    x, weight, bias = (
        integers((130, 85), torch.float16),
        integers((300, 85), torch.float16),
        integers((300,), torch.float16),
    )
    monkeypatch.setattr(module, "HALF_LAUNCH", module.SMALL_HALF_LAUNCH)
    assert torch.equal(linear_argmax(x, weight, bias), expected(x, weight, bias))
