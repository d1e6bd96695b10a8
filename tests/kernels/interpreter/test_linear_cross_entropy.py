"""The kernel of linear_cross_entropy in Triton's interpreter, against float64.

What the kernel fails to write of its partial sums is NaN here, and then so are the loss or the bias gradient.
"""

import importlib
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from checking import assert_close, errors

from cae_kernels import linear_cross_entropy

module = importlib.import_module("cae_kernels.linear_cross_entropy")

# M, D, V
SHAPES = [(1, 192, 100), (17, 192, 8191), (98, 384, 8192), (98, 1280, 100), (300, 64, 1000)]


def make(shape, dtype):
    rows, width, codes = shape
    torch.manual_seed(sum(shape))
    x = torch.randn(rows, width)
    weight = torch.randn(codes, width) / width**0.5
    bias = torch.randn(codes) * 0.5
    target = torch.randint(codes, (rows,))
    target[-1] = codes - 1
    if rows > 1:
        target[0] = 0
        target[3::5] = -100
        target[1] = F.linear(x, weight, bias)[1].argmax()
    return [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)], target


def plain(x, weight, bias, target):
    return F.cross_entropy(F.linear(x, weight, bias).to(torch.promote_types(x.dtype, torch.float32)), target)


def in_float64(inputs, target):
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loss = plain(*wide, target)
    return loss, torch.autograd.grad(loss, wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_accuracy_and_every_gradient(shape, dtype):
    inputs, target = make(shape, dtype)
    loss, accuracy = linear_cross_entropy(*inputs, target)
    gradients = torch.autograd.grad(loss, inputs)
    expected_loss, expected = in_float64(inputs, target)
    in_torch = torch.autograd.grad(plain(*inputs, target), inputs)
    counted = target != -100
    hits = (F.linear(*inputs).argmax(-1) == target)[counted]
    assert loss.dtype == accuracy.dtype == torch.float32
    assert accuracy.item() == pytest.approx(hits.double().mean().item(), rel=1e-6)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6 if dtype == torch.float32 else 2e-3)
    for ours, torchs, truth in zip(gradients, in_torch, expected, strict=True):
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert_close(ours, truth, 2e-6, 5e-6)
        else:
            assert_close(ours, truth, 4e-3, 2e-2)  # the logits, their gradient and the products are each rounded
            assert errors(ours, truth)[0] <= 1.1 * errors(torchs, truth)[0]
    assert not gradients[0][~counted].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_gradient_of_the_logits_alone(dtype):
    logits = (torch.randn(20, 1000) * 3).to(dtype)
    target = torch.randint(1000, (20,))
    statistics, partial = torch.empty(7, 2), torch.empty(7, 1000)
    wide = logits.double().requires_grad_()
    loss = F.cross_entropy(wide, target, reduction="sum")
    (expected,) = torch.autograd.grad(loss / 20, wide)
    module._launch(logits, target, count=torch.tensor(20), statistics=statistics, d_bias=partial)
    assert_close(logits, expected, *((3e-3, 1e-2) if dtype == torch.bfloat16 else (2e-6, 5e-6)))
    assert_close(partial.sum(0), expected.sum(0), 2e-6, 5e-6)
    assert statistics[:, 0].sum().item() == pytest.approx(loss.item(), rel=2e-6)


def test_the_first_of_equal_logits_is_the_prediction():
    x, weight, bias = torch.zeros(4, 16), torch.zeros(100, 16), torch.zeros(100)
    bias[[40, 7, 99]] = 1.0
    target = torch.tensor([7, 40, 99, 0])
    loss, accuracy = linear_cross_entropy(x, weight, bias, target)
    assert accuracy.item() == 0.25
    norm = 3 * math.e + 97
    assert loss.item() == pytest.approx(math.log(norm) - 0.75, rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_huge_logits_do_not_overflow(dtype):
    x = torch.zeros(6, 16)
    x[:, 0] = 1.0
    weight = torch.zeros(100, 16)
    weight[:, 0] = torch.linspace(-9984, 9984, 100).bfloat16()
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, torch.zeros(100))]
    target = torch.tensor([99, 0, 50, 98, 1, 99])
    loss, accuracy = linear_cross_entropy(*inputs, target)
    expected_loss, expected = in_float64(inputs, target)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    assert accuracy.item() == pytest.approx(2 / 6)
    for ours, truth in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert_close(ours, truth, 3e-3, 1e-2)


def test_where_all_rows_are_ignored_the_loss_is_nan_and_gradients_are_zero_as_in_torch():
    inputs, _ = make((5, 32, 100), torch.float32)
    target = torch.full((5,), -100)
    loss, accuracy = linear_cross_entropy(*inputs, target)
    assert loss.isnan()
    assert accuracy.isnan()
    assert plain(*inputs, target).isnan()
    for ours, torchs in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(plain(*inputs, target), inputs), strict=True
    ):
        assert torch.equal(ours, torchs)
        assert not ours.any()


@pytest.mark.parametrize("wrong", [100, -1, 2**32 + 5])
def test_a_target_that_does_not_exist_makes_the_loss_nan(wrong):
    inputs, target = make((5, 32, 100), torch.float32)
    target[2] = wrong
    assert linear_cross_entropy(*inputs, target)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_chunks(dtype, monkeypatch):
    inputs, target = make((300, 64, 200), dtype)
    whole, accuracy = linear_cross_entropy(*inputs, target)
    gradients = torch.autograd.grad(whole, inputs)
    monkeypatch.setattr(module, "LOGITS_BYTES", 130 * 200 * inputs[0].element_size())
    assert module._chunk_rows(300, 200, inputs[0].element_size()) == 128  # 128, 128 and 44 rows
    loss, same_accuracy = linear_cross_entropy(*inputs, target)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert same_accuracy == accuracy
    _, expected = in_float64(inputs, target)
    chunked = torch.autograd.grad(loss, inputs)
    assert torch.equal(chunked[0], gradients[0])
    for ours, truth in zip(chunked, expected, strict=True):
        assert_close(ours, truth, *((4e-3, 2e-2) if dtype == torch.bfloat16 else (2e-6, 5e-6)))


def test_without_gradients_there_is_no_gradient_work(monkeypatch):
    inputs, target = make((17, 64, 100), torch.bfloat16)
    loss, accuracy = linear_cross_entropy(*inputs, target)
    launched, launch = [], module._launch
    monkeypatch.setattr(
        module, "_launch", lambda *args, **named: launched.append((*args, named)) or launch(*args, **named)
    )
    with torch.no_grad():
        same = linear_cross_entropy(*inputs, target)
    assert torch.equal(torch.stack(same), torch.stack((loss, accuracy)))
    logits, _, named = launched[0]
    assert named["d_bias"].numel() == 0
    assert torch.equal(logits, F.linear(*inputs))


def test_the_upstream_gradient_scales_and_accumulates():
    inputs, target = make((17, 64, 100), torch.float32)
    _, expected = in_float64(inputs, target)
    for _ in range(2):
        (linear_cross_entropy(*inputs, target)[0] / 4).backward()
    for tensor, truth in zip(inputs, expected, strict=True):
        assert_close(tensor.grad, truth / 2, 2e-6, 5e-6)


def test_the_same_bits_every_time():
    inputs, target = make((300, 64, 1000), torch.bfloat16)
    first, second = (torch.autograd.grad(linear_cross_entropy(*inputs, target)[0], inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_compiled_as_eager():
    inputs, target = make((17, 64, 100), torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    loss, accuracy = compiled(*inputs, target)
    expected_loss, expected_accuracy = linear_cross_entropy(*inputs, target)
    assert torch.equal(torch.stack((loss, accuracy)), torch.stack((expected_loss, expected_accuracy)))
    assert not accuracy.requires_grad
    gradients = torch.autograd.grad(loss / 4, inputs)
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected_loss / 4, inputs)))
    with torch.no_grad():
        assert torch.equal(compiled(*inputs, target)[0], expected_loss)


@pytest.mark.parametrize(("codes", "dtype"), [(16_385, torch.float32), (100, torch.float16)])
def test_what_the_kernel_cannot_do_is_said(codes, dtype):
    x, weight, bias = (torch.zeros(shape, dtype=dtype) for shape in ((2, 16), (codes, 16), (codes,)))
    with pytest.raises(ValueError, match=rf"{codes} codes in {dtype}.*CAE_KERNELS=linear_cross_entropy=reference"):
        linear_cross_entropy(x, weight, bias, torch.zeros(2, dtype=torch.int64))


def test_the_most_codes():
    inputs, target = make((3, 16, 16_384), torch.float32)
    loss, _ = linear_cross_entropy(*inputs, target)
    expected_loss, expected = in_float64(inputs, target)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    assert_close(torch.autograd.grad(loss, inputs[2])[0], expected[2], 2e-6, 5e-6)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger_kernel installed")
def test_ligers_kernel_agrees():
    inputs, target = make((17, 64, 100), torch.float32)
    loss, accuracy = module._liger(*inputs, target)
    expected_loss, expected = in_float64(inputs, target)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-6)
    assert accuracy.item() == linear_cross_entropy(*inputs, target)[1].item()
    for theirs, truth in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert_close(theirs, truth, 2e-6, 5e-6)
