"""squared_error's Triton kernels against float64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from checking import assert_close, errors

from cae_kernels import squared_error
from cae_kernels.squared_error import _backward


def inputs(batch, tokens, width, dtype, target_dtype=None):
    prediction = torch.randn(batch, tokens, width).to(dtype).requires_grad_()
    latents = (3 * torch.randn(batch, tokens + 1, width) + torch.randn(width)).to(target_dtype or dtype)
    return prediction, latents[:, 1:]  # the target is a view, as behind a class token


def truth(prediction, target, grad):
    """Loss and gradient in float64 of the same rounded inputs."""
    exact = prediction.detach().double().requires_grad_()
    loss = (exact - target.double()).square().mean()
    (loss * grad).backward()
    return loss.detach(), exact.grad


SHAPES = [(2, 17, 192), (1, 63, 384), (3, 5, 768), (2, 3, 1024), (1, 9, 1280), (2, 1, 85), (1, 98, 1024)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient(shape, dtype):
    prediction, target = inputs(*shape, dtype)
    loss = squared_error(prediction, target)
    assert loss.dtype == torch.float32
    (2.5 * loss).backward()
    expected_loss, expected_grad = truth(prediction, target, 2.5)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    limits = (2e-6, 2e-6) if dtype is torch.float32 else (2.2e-3, 5e-3)
    assert_close(prediction.grad, expected_grad, *limits)


def test_no_worse_than_plain_torch_in_bfloat16():
    prediction, target = inputs(2, 49, 768, torch.bfloat16)
    squared_error(prediction, target).backward()
    _, expected = truth(prediction, target, 1.0)
    plain = prediction.detach().clone().requires_grad_()
    F.mse_loss(plain.float(), target.float()).backward()
    assert errors(prediction.grad, expected)[0] < 1.1 * errors(plain.grad, expected)[0]


def test_pixels_in_float32_against_predictions_in_bfloat16():
    prediction, target = inputs(2, 7, 588, torch.bfloat16, torch.float32)
    loss = squared_error(prediction, target)
    loss.backward()
    expected_loss, expected_grad = truth(prediction, target, 1.0)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    assert_close(prediction.grad, expected_grad, 2.2e-3, 5e-3)


@pytest.mark.parametrize("shape", [(2, 4, 384), (2, 64, 48), (1, 3, 50)])
def test_contiguous_targets(shape):
    """Those whose size is a multiple of the flat width are read as rows of that width."""
    prediction, target = torch.randn(shape, requires_grad=True), torch.randn(shape)
    loss = squared_error(prediction, target)
    loss.backward()
    expected_loss, expected_grad = truth(prediction, target, 1.0)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    assert_close(prediction.grad, expected_grad, 2e-6, 2e-6)


def test_any_strides():
    prediction, target = inputs(2, 6, 40, torch.float32)
    turned = prediction.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    columns = target.transpose(1, 2).contiguous().transpose(1, 2)
    loss = squared_error(turned, columns)
    loss.backward()
    expected_loss, expected_grad = truth(prediction, target, 1.0)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    assert_close(turned.grad, expected_grad, 2e-6, 2e-6)


def test_rows_of_a_wider_buffer():
    prediction, target = inputs(2, 6, 40, torch.float32)
    wider = torch.randn(2, 9, 56)
    wider[:, 2:8, 8:48] = target
    squared_error(prediction, wider[:, 2:8, 8:48]).backward()
    _, expected = truth(prediction, target, 1.0)
    assert_close(prediction.grad, expected, 2e-6, 2e-6)


def test_more_tiles_than_programs(monkeypatch):
    monkeypatch.setattr(sys.modules["cae_kernels.squared_error"], "PROGRAMS", 3)
    prediction, target = inputs(1, 70, 1024, torch.float32)
    loss = squared_error(prediction, target)
    assert loss.item() == pytest.approx(truth(prediction, target, 1.0)[0].item(), rel=2e-6)


def test_every_element_of_the_gradient_is_written(written):
    prediction, target = inputs(2, 17, 85, torch.bfloat16)
    written(_backward(torch.tensor(1.0), prediction.detach(), target))
