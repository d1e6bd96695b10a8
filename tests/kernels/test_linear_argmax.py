"""linear_argmax without the interpreter: registration, reference, compilation, splits; on a GPU the real shapes."""

import importlib
import importlib.util

import pytest
import torch

from cae_kernels.linear_argmax import linear_argmax

module = importlib.import_module("cae_kernels.linear_argmax")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def inputs(dtype, rows=12, width=16, codes=20):
    torch.manual_seed(0)
    return [torch.randint(-3, 4, shape).to(dtype) for shape in ((rows, width), (codes, width), (codes,))]


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 3, 11, 0])], ids=["all", "requested"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_registered_op(rows, with_bias):
    x, weight, bias = inputs(torch.float32)
    torch.library.opcheck(torch.ops.cae.linear_argmax, (x, weight, bias if with_bias else None, rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_reference_is_the_first_largest_of_exact_logits(dtype):
    x, weight, bias = inputs(dtype, rows=300, codes=500)
    logits = x.long() @ weight.long().t() + bias.long()
    codes = torch.arange(500).expand(300, -1).where(logits == logits.amax(-1, keepdim=True), 500)
    rows = torch.tensor([299, 4, 4])
    assert torch.equal(linear_argmax(x, weight, bias), codes.amin(-1))
    assert torch.equal(linear_argmax(x, weight, bias, rows), codes.amin(-1)[rows])


def test_the_reference_in_parts_of_rows(monkeypatch):
    x, weight, bias = inputs(torch.float32, rows=30)
    whole = linear_argmax(x, weight, bias)
    monkeypatch.setattr(module, "REFERENCE_ROWS", 7)
    assert torch.equal(linear_argmax(x, weight, bias), whole)


def test_compiled_as_eager():
    x, weight, bias = inputs(torch.float32)
    rows = torch.tensor([3, 3, 11, 0])
    for function in (linear_argmax, torch.ops.cae.linear_argmax):
        compiled = torch.compile(lambda *tensors, f=function: f(*tensors) + 1, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, weight, bias, rows), linear_argmax(x, weight, bias, rows) + 1)


def test_inputs_that_require_gradients_give_codes_without():
    x, weight, bias = inputs(torch.float32)
    assert not linear_argmax(x.requires_grad_(), weight.requires_grad_(), bias).requires_grad


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton installed, for its cdiv")
@pytest.mark.parametrize("row_blocks", [1, 2, 7, 66, 128, 132, 133, 196, 1000])
@pytest.mark.parametrize("code_tiles", [1, 3, 32])
def test_splits_cover_all_tiles_and_keep_processors_busy(row_blocks, code_tiles):
    splits, tiles = module._splits(row_blocks, code_tiles)
    assert (splits - 1) * tiles < code_tiles <= splits * tiles
    rounds = -(-row_blocks * splits // 132) * tiles
    assert rounds <= 1.05 * min(-(-row_blocks * s // 132) * -(-code_tiles // s) for s in range(1, code_tiles + 1))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("images", "patches", "masked"), [(256, 196, 98), (128, 256, 128)], ids=["L", "H"])
def test_the_real_shapes_on_a_gpu(images, patches, masked, dtype):
    torch.manual_seed(0)
    x = torch.randn(images * patches, 2048, device="cuda").to(dtype)
    weight = (torch.randn(8192, 2048, device="cuda") / 45).to(dtype)
    bias = torch.randn(8192, device="cuda").to(dtype)
    ids = torch.rand(images, patches, device="cuda").argsort(-1)[:, :masked].sort(-1).values
    rows = (ids + torch.arange(images, device="cuda")[:, None] * patches).flatten()
    codes = linear_argmax(x, weight, bias, rows)
    some = torch.randperm(len(rows), device="cuda")[:1024]
    logits = x[rows[some]].double() @ weight.double().t() + bias.double()
    best = logits.topk(2, -1).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    assert clear.double().mean() > 0.99
    assert torch.equal(codes[some][clear], logits.argmax(-1)[clear])
    assert torch.equal(codes[:98], linear_argmax(x, weight, bias, rows[:98]))  # another split, the same codes
