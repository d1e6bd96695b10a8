"""squared_error without the interpreter: the reference, its registration, torch.compile, and a GPU if there is one."""

import sys

import pytest
import torch

from cae_kernels import squared_error
from cae_kernels.squared_error import squared_error_backward_reference, squared_error_reference

DTYPES = [torch.float32, torch.bfloat16]


def inputs(batch, tokens, width, dtype, device="cpu"):
    draw = torch.Generator(device).manual_seed(0)
    prediction = torch.randn(batch, tokens, width, generator=draw, device=device).to(dtype).requires_grad_()
    latents = (3 * torch.randn(batch, tokens + 1, width, generator=draw, device=device) + 1).to(dtype)
    return prediction, latents[:, 1:]


def test_the_reference_is_the_formula():
    prediction, target = inputs(2, 3, 8, torch.float64)
    expected = (prediction - target).square().sum() / (2 * 3 * 8)
    torch.testing.assert_close(squared_error(prediction, target), expected)


def test_the_references_agree_on_the_gradient():
    prediction, target = inputs(2, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x: squared_error_reference(x, target), prediction)
    (grad,) = torch.autograd.grad(squared_error_reference(prediction, target), prediction, torch.tensor(3.0))
    backward = squared_error_backward_reference(torch.tensor(3.0), prediction.detach(), target)
    torch.testing.assert_close(backward, grad, rtol=1e-12, atol=1e-14)


def test_only_the_prediction_gets_a_gradient():
    prediction, target = inputs(2, 3, 8, torch.float32)
    target = target.detach().requires_grad_()
    squared_error(prediction, target).backward()
    assert prediction.grad is not None
    assert target.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    prediction, target = inputs(2, 5, 8, dtype)
    torch.library.opcheck(torch.ops.cae.squared_error.default, (prediction, target))
    arguments = torch.tensor(1.0), prediction.detach(), target
    torch.library.opcheck(torch.ops.cae.squared_error_backward.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_torch_compile(backend, monkeypatch):
    """The reference, and the registered op as on a GPU (on a CPU, what it runs is the reference)."""
    monkeypatch.setattr(sys.modules["cae_kernels.squared_error"], "backend", lambda op, tensor: backend)
    torch._dynamo.reset()
    prediction, target = inputs(2, 5, 8, torch.float32)

    def loss(x):
        return 2.0 * squared_error(x * 1.5, target)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(prediction)
    (grad,) = torch.autograd.grad(compiled, prediction)
    monkeypatch.undo()
    eager = loss(prediction)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(grad, torch.autograd.grad(eager, prediction)[0])


@pytest.mark.parametrize("shape", [(2, 4, 8), (2, 5), (10, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"needs two \(B, Nm, D\) tensors, not \(2, 5, 8\) and"):
        squared_error(torch.zeros(2, 5, 8), torch.zeros(shape))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 98, 1024), (128, 128, 1280), (3, 17, 85)])
def test_on_a_gpu(shape, dtype):
    prediction, target = inputs(*shape, dtype, "cuda")
    loss = squared_error(prediction, target)
    loss.backward()
    exact = squared_error_reference(prediction.detach().double(), target.double())
    assert loss.item() == pytest.approx(exact.item(), rel=5e-6)
    last = slice(-2, None)  # images; the mean over them has fewer elements
    share = torch.tensor(2 / shape[0], device="cuda")
    expected = squared_error_backward_reference(share, prediction.detach()[last].double(), target[last].double())
    error = (prediction.grad[last].double() - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype is torch.float32 else 2.2e-3)
    again = torch.autograd.grad(squared_error(prediction, target), prediction)[0]
    assert torch.equal(again, prediction.grad)
