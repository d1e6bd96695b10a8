"""alignment_loss without the interpreter: the reference, its registration, torch.compile, and a GPU if there is one."""

import sys

import pytest
import torch

from cae_kernels import alignment_loss
from cae_kernels.alignment_loss import (
    _backward_op,
    _forward_op,
    alignment_loss_backward_reference,
    alignment_loss_reference,
)

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]


def inputs(batch, tokens, width, dtype, device="cpu"):
    draw = torch.Generator(device).manual_seed(0)
    prediction = torch.randn(batch, tokens, width, generator=draw, device=device).to(dtype).requires_grad_()
    latents = (3 * torch.randn(batch, tokens + 1, width, generator=draw, device=device) + 1).to(dtype)
    weight = torch.rand(width, generator=draw, device=device).to(dtype)
    bias = torch.randn(width, generator=draw, device=device).to(dtype)
    return prediction, latents[:, 1:], (weight, bias, EPS)


def test_the_reference_is_the_formula():
    prediction, target, (weight, bias, _) = inputs(2, 3, 8, torch.float64)
    mean = target.mean(dim=-1, keepdim=True)
    variance = (target - mean).square().mean(dim=-1, keepdim=True)
    normalized = (target - mean) / (variance + EPS).sqrt() * weight + bias
    for norm, wanted in ((None, target), ((weight, bias, EPS), normalized)):
        expected = (prediction - wanted).square().sum() / (2 * 3 * 8)
        torch.testing.assert_close(alignment_loss(prediction, target, norm), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_references_agree_on_the_gradient(normalize):
    prediction, target, norm = inputs(2, 3, 5, torch.float64)
    rest = norm if normalize else (None, None, 0.0)
    assert torch.autograd.gradcheck(lambda x: alignment_loss_reference(x, target, *rest), prediction)
    (grad,) = torch.autograd.grad(alignment_loss_reference(prediction, target, *rest), prediction, torch.tensor(3.0))
    backward = alignment_loss_backward_reference(torch.tensor(3.0), prediction.detach(), target, *rest)
    torch.testing.assert_close(backward, grad, rtol=1e-12, atol=1e-14)


def test_only_the_prediction_gets_a_gradient():
    prediction, target, (weight, bias, _) = inputs(2, 3, 8, torch.float32)
    others = [tensor.detach().requires_grad_() for tensor in (target, weight, bias)]
    alignment_loss(prediction, others[0], (others[1], others[2], EPS)).backward()
    assert prediction.grad is not None
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_registration(dtype, normalize):
    prediction, target, norm = inputs(2, 5, 8, dtype)
    rest = norm if normalize else (None, None, 0.0)
    torch.library.opcheck(_forward_op, (prediction, target, *rest))
    torch.library.opcheck(_backward_op, (torch.tensor(1.0), prediction.detach(), target, *rest))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("normalize", [True, False])
def test_torch_compile(backend, normalize, monkeypatch):
    """The reference, and the registered op as on a GPU (on a CPU, what it runs is the reference)."""
    monkeypatch.setattr(sys.modules["cae_kernels.alignment_loss"], "backend", lambda op, tensor: backend)
    torch._dynamo.reset()
    prediction, target, norm = inputs(2, 5, 8, torch.float32)

    def loss(x):
        return 2.0 * alignment_loss(x * 1.5, target, norm if normalize else None)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(prediction)
    (grad,) = torch.autograd.grad(compiled, prediction)
    monkeypatch.undo()
    eager = loss(prediction)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grad, torch.autograd.grad(eager, prediction)[0])


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 5), (10, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"needs two \(B, Nm, D\) tensors, not \(2, 5, 8\) and"):
        alignment_loss(torch.zeros(2, 5, 8), torch.zeros(shape))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 98, 1024), (128, 128, 1280), (3, 17, 85)])
def test_on_a_gpu(shape, dtype, normalize):
    prediction, target, norm = inputs(*shape, dtype, "cuda")
    rest = norm if normalize else (None, None, 0.0)
    loss = alignment_loss(prediction, target, norm if normalize else None)
    loss.backward()
    exact = alignment_loss_reference(prediction.detach().double(), target.double(), *rest)
    assert loss.item() == pytest.approx(exact.item(), rel=5e-6)
    last = slice(-2, None)  # images; the mean over them has fewer elements
    share = torch.tensor(2 / shape[0], device="cuda")
    expected = alignment_loss_backward_reference(
        share, prediction.detach()[last].double(), target[last].double(), *rest
    )
    error = (prediction.grad[last].double() - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype is torch.float32 else 2.2e-3)
    again = torch.autograd.grad(alignment_loss(prediction, target, norm if normalize else None), prediction)[0]
    assert torch.equal(again, prediction.grad)
