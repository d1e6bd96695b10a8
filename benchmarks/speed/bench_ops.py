"""Every backend of every op, for pytest-benchmark: pytest benchmarks/speed/bench_ops.py --benchmark-columns=median,iqr

An item fails, without a time, where its outputs or gradients are not the plain torch reference's. CAE_BENCH_SHAPES
chooses shapes (ViT-B, ViT-L, ViT-H, tiny; separated by commas); without it all but tiny, or tiny on a CPU.
"""

import os

import pytest
import torch

from benchmarks.speed import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SHAPES = os.environ.get("CAE_BENCH_SHAPES", "ViT-B,ViT-L,ViT-H" if DEVICE.type == "cuda" else "tiny").split(",")


@pytest.fixture(scope="module", params=SHAPES)
def all_cases(request):
    torch.manual_seed(0)
    return list(ops.cases(ops.Sizes(request.param, DEVICE, DTYPE)))


def names():
    """(number of the case, name, backend); they are the same at every shape."""
    torch.manual_seed(0)
    for number, case in enumerate(ops.cases(ops.Sizes("tiny", DEVICE, DTYPE))):
        label = f"{case.op}{case.shape.removeprefix('tiny').replace(' ', '_')}"
        for name in ops.backends(case.op, DEVICE):
            yield pytest.param(number, name, id=f"{label}-{name}")


@pytest.mark.parametrize(("number", "name"), names())
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_op(benchmark, all_cases, number, name, direction):
    case = all_cases[number]
    if direction == "backward" and case.forward_only:
        pytest.skip("no backward pass")
    torch.compiler.reset()
    ops.choose(case.op, "reference")
    leaves = [tensor.detach().clone().requires_grad_(not case.forward_only) for tensor in case.inputs]
    truth = ops.outputs_and_gradients(case, case.run, leaves)
    _, forwards, backwards = ops.checked(case, name, truth, DEVICE)
    passes = forwards if direction == "forward" else backwards
    benchmark.group = f"{case.op} {case.shape} {direction}"

    def once():
        for run in passes:
            run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(once)
