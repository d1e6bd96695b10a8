"""linear_cross_entropy without the interpreter: registration, references, compilation; on a GPU the real shapes."""

import importlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F

from cae_kernels import linear_cross_entropy

module = importlib.import_module("cae_kernels.linear_cross_entropy")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def inputs(dtype, rows=12, width=16, codes=20):
    torch.manual_seed(0)
    tensors = torch.randn(rows, width), torch.randn(codes, width) / width**0.5, torch.randn(codes)
    target = torch.randint(codes, (rows,))
    target[::5] = -100
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], target


@pytest.mark.parametrize("with_gradients", [True, False])
def test_registered_op(with_gradients):
    tensors, target = inputs(torch.float32)
    tensors = [tensor.detach().requires_grad_(with_gradients) for tensor in tensors]
    torch.library.opcheck(torch.ops.cae.linear_cross_entropy, (*tensors, target, with_gradients))


def test_gradients_of_the_references():
    tensors, target = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: linear_cross_entropy(*tensors, target)[0], tensors)

    def through_the_op(*tensors):
        return torch.ops.cae.linear_cross_entropy(*tensors, target, True)[0] / 3

    assert torch.autograd.gradcheck(through_the_op, tensors)


def test_accuracy_counts_only_rows_that_are_not_ignored():
    (x, weight, bias), target = inputs(torch.float32)
    predicted = F.linear(x, weight, bias).argmax(-1)
    target[1:4] = predicted[1:4]
    _, accuracy = linear_cross_entropy(x, weight, bias, target)
    counted = [i for i in range(12) if target[i] != -100]
    assert accuracy.item() == pytest.approx(sum(int(predicted[i] == target[i]) for i in counted) / len(counted))
    assert not accuracy.requires_grad


def test_compiled_as_eager():
    tensors, target = inputs(torch.float32)

    def through_the_op(*tensors):
        return torch.ops.cae.linear_cross_entropy(*tensors, target, True)[:2]

    def public(*tensors):
        return linear_cross_entropy(*tensors, target)

    expected = F.cross_entropy(F.linear(*tensors), target)
    gradients = torch.autograd.grad(expected, tensors)
    for function in (public, through_the_op):
        loss, accuracy = torch.compile(function, backend="aot_eager", fullgraph=True)(*tensors)
        torch.testing.assert_close(loss, expected)
        assert not accuracy.requires_grad
        torch.testing.assert_close(torch.autograd.grad(loss, tensors), gradients)


@pytest.mark.parametrize(
    ("rows", "codes", "size", "chunks"),
    [(25_088, 8192, 2, 1), (16_384, 8192, 2, 1), (50_176, 8192, 2, 2), (25_088, 8192, 4, 2), (100_352, 8192, 2, 4)],
)
def test_chunks_are_as_few_as_the_limit_allows(rows, codes, size, chunks):
    step = module._chunk_rows(rows, codes, size)
    assert -(-rows // step) == chunks
    assert step * codes * size <= 25_088 * 8192 * 2
    assert step % 128 == 0


def test_chunks_of_few_rows_and_of_huge_rows():
    assert module._chunk_rows(98, 8192, 2) == 98
    assert module._chunk_rows(0, 8192, 2) == 1
    assert module._chunk_rows(1000, 10_000_000, 4) == 128


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("rows", "width"), [(256 * 98, 1024), (128 * 128, 1280)], ids=["L", "H"])
def test_the_real_shapes_on_a_gpu(rows, width):
    tensors, target = inputs(torch.bfloat16, rows, width, 8192)
    tensors, target = [tensor.detach().cuda().requires_grad_() for tensor in tensors], target.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, accuracy = linear_cross_entropy(*tensors, target)
    # One chunk of logits, d_x, d_W, partial sums of d_b; float32 logits would be 0.8 GB.
    assert torch.cuda.max_memory_allocated() - before < rows * 8192 * 2 + (rows + 8192) * width * 2 + 2**26
    d_x, d_weight, d_bias = torch.autograd.grad(loss, tensors)

    logits = F.linear(*tensors).detach()
    assert loss.item() == pytest.approx(F.cross_entropy(logits.float(), target).item(), rel=1e-5)
    counted = target != -100
    assert accuracy.item() == pytest.approx((logits.argmax(-1) == target)[counted].double().mean().item(), abs=1e-4)

    x, weight, bias = (tensor.detach().double() for tensor in tensors)
    d_logits = (
        F.linear(x[:512], weight, bias).softmax(-1) - F.one_hot(target[:512].clamp(min=0), 8192)
    ) / counted.sum()
    d_logits *= counted[:512, None]
    assert relative(d_x[:512], d_logits @ weight) < 4e-3
    codes = slice(4000, 4064)
    norms = F.linear(tensors[0], tensors[1], tensors[2]).detach().double().logsumexp(-1, keepdim=True)
    part = (F.linear(x, weight[codes], bias[codes]) - norms).exp()
    part -= target[:, None] == torch.arange(4000, 4064, device="cuda")
    part *= counted[:, None] / counted.sum()
    assert relative(d_weight[codes], part.t() @ x) < 5e-3
    assert relative(d_bias[codes], part.sum(0)) < 5e-3
    again = torch.autograd.grad(linear_cross_entropy(*tensors, target)[0], tensors)
    assert all(map(torch.equal, again, (d_x, d_weight, d_bias)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger_kernel installed")
def test_liger_agrees(monkeypatch):
    tensors, target = inputs(torch.bfloat16, 1000, 256, 8192)
    tensors, target = [tensor.detach().cuda().requires_grad_() for tensor in tensors], target.cuda()
    loss, accuracy = linear_cross_entropy(*tensors, target)
    monkeypatch.setenv("CAE_KERNELS", "linear_cross_entropy=liger")
    ligers, ligers_accuracy = linear_cross_entropy(*tensors, target)
    assert ligers.item() == pytest.approx(loss.item(), rel=1e-3)
    assert ligers_accuracy.item() == pytest.approx(accuracy.item(), abs=2e-3)
    for ours, theirs in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(ligers, tensors), strict=True):
        assert relative(theirs, ours.double()) < 1e-2


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()
