"""The kernels of linear_gelu in Triton's interpreter, against float64."""

import pytest
import torch
import torch.nn.functional as F
from checking import assert_close, errors

from cae_kernels import linear_gelu

# B, n, D, F
SHAPES = [(1, 1, 192, 768), (2, 17, 192, 85), (1, 63, 85, 100), (1, 99, 384, 1536), (3, 43, 64, 520)]


def make(shape, dtype):
    batch, tokens, width, hidden = shape
    torch.manual_seed(sum(shape))
    x = torch.randn(batch, tokens, width)
    weight = torch.randn(hidden, width) * 1.5 / width**0.5
    bias = torch.randn(hidden) * 0.5
    return [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]


def outcome(function, inputs, d_out):
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype):
    inputs = make(shape, dtype)
    d_out = torch.randn(*shape[:2], shape[3]).to(dtype)

    def plain(x, weight, bias):
        return F.gelu(F.linear(x, weight, bias))

    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = outcome(plain, wide, d_out)
    actual = outcome(linear_gelu, inputs, d_out)
    in_torch = outcome(plain, inputs, d_out)
    for ours, torchs, truth in zip(actual, in_torch, expected, strict=True):
        assert ours.dtype == dtype
        if dtype == torch.float32:
            # The product is torch's own, whose rounding differs between machines.
            assert_close(ours, truth, 1e-6, max(2e-6, 1.1 * errors(torchs, truth)[1]))
        else:
            assert_close(ours, truth, 3e-3, 1.5e-2)
            assert errors(ours, truth)[0] <= 1.1 * errors(torchs, truth)[0]


def test_the_function_itself_is_exact_to_float32(written):
    v = torch.cat((torch.linspace(-12, 12, 9003), torch.tensor([0.0, -0.0, 100.0, -100.0, 1e4, -1e4])))
    pre, bias = v.reshape(3, -1), torch.zeros(len(v) // 3)
    wide = pre.double().requires_grad_()
    expected = F.gelu(wide)
    (d_expected,) = torch.autograd.grad(expected.sum(), wide)
    out = torch.ops.cae.bias_gelu(pre, bias)
    d_pre, _ = torch.ops.cae.bias_gelu_backward(torch.ones_like(pre), pre, bias)
    written(out, d_pre)
    assert ((out - expected).abs() / expected.abs().clamp(min=1)).max() < 2.5e-7
    assert (d_pre - d_expected).abs().max() < 5e-7


def test_the_tail_keeps_its_relative_accuracy():
    v = torch.linspace(-6, -1, 501)[None]
    out = torch.ops.cae.bias_gelu(v, torch.zeros(501))
    expected = v.double() * torch.special.ndtr(v.double())
    assert (out / expected - 1).abs().max() < 2e-4  # of 0.5 (1 + erf) in float32: 1


def test_bias_gradient_over_strips_of_many_tiles():
    rows, columns = 1111, 1536  # 132 strips of at most 16 rows: two tiles each, the last strip incomplete
    torch.manual_seed(0)
    pre, d_out = torch.randn(rows, columns), torch.randn(rows, columns)
    bias = torch.randn(columns)
    wide = bias.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(pre.double() + wide), wide, d_out.double())
    _, d_bias = torch.ops.cae.bias_gelu_backward(d_out, pre, bias)
    assert_close(d_bias, expected, 2e-6, 2e-6)
    assert torch.equal(d_bias, torch.ops.cae.bias_gelu_backward(d_out, pre, bias)[1])


def test_without_gradients_nothing_more_is_allocated_and_the_bits_are_the_same(written):
    x, weight, bias = make((2, 17, 192, 85), torch.bfloat16)
    with torch.no_grad():
        out = linear_gelu(x, weight, bias)
    written(out)
    assert not out.requires_grad
    assert torch.equal(out, linear_gelu(x, weight, bias))


def test_layouts_that_are_not_contiguous():
    x, weight, bias = make((2, 18, 64, 100), torch.float32)
    d_out = torch.randn(100, 17, 2)

    def loss(function, x, weight, bias):
        return (function(x[:, 1:], weight, bias) * d_out.to(x.dtype).permute(2, 1, 0)).sum()

    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    expected = torch.autograd.grad(loss(lambda *inputs: F.gelu(F.linear(*inputs)), *wide), wide)
    actual = torch.autograd.grad(loss(linear_gelu, x, weight, bias), (x, weight, bias))
    for ours, truth in zip(actual, expected, strict=True):
        assert_close(ours, truth, 1e-6, 2e-6)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient(frozen):
    inputs = dict(zip(("x", "weight", "bias"), make((1, 5, 32, 48), torch.float32), strict=True))
    linear_gelu(**inputs).sum().backward()
    expected = {name: tensor.grad.clone() for name, tensor in inputs.items()}
    for tensor in inputs.values():
        tensor.grad = None
    inputs[frozen].requires_grad_(False)
    linear_gelu(**inputs).sum().backward()
    assert inputs[frozen].grad is None
    assert all(torch.equal(inputs[name].grad, expected[name]) for name in inputs if name != frozen)


def test_compiled_as_eager():
    x, weight, bias = make((2, 17, 64, 100), torch.float32)
    compiled = torch.compile(linear_gelu, backend="aot_eager", fullgraph=True)
    d_out = torch.randn(2, 17, 100)
    for ours, eager in zip(
        outcome(compiled, (x, weight, bias), d_out), outcome(linear_gelu, (x, weight, bias), d_out), strict=True
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)
