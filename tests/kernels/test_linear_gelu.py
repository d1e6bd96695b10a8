"""linear_gelu without the interpreter: registration, references, compilation; on a GPU the real shapes."""

import pytest
import torch
import torch.nn.functional as F

from cae_kernels import linear_gelu

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def inputs(dtype, rows=12, width=16, hidden=20):
    torch.manual_seed(0)
    tensors = torch.randn(rows, width), torch.randn(hidden, width) / width**0.5, torch.randn(hidden)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def test_registered_ops():
    pre, bias = torch.randn(12, 20, requires_grad=True), torch.randn(20, requires_grad=True)
    torch.library.opcheck(torch.ops.cae.bias_gelu, (pre, bias))
    d_out = torch.randn(12, 20)
    torch.library.opcheck(torch.ops.cae.bias_gelu_backward, (d_out, pre.detach(), bias.detach()))


def test_gradients_of_the_references():
    x, weight, bias = inputs(torch.float64)
    assert torch.autograd.gradcheck(linear_gelu, (x, weight, bias))
    pre = (x @ weight.t()).detach().requires_grad_()
    assert torch.autograd.gradcheck(torch.ops.cae.bias_gelu, (pre, bias))


def test_compiled_as_eager():
    x, weight, bias = inputs(torch.float32)

    def through_the_op(x, weight, bias):
        return torch.ops.cae.bias_gelu(x @ weight.t(), bias)

    for function in (linear_gelu, through_the_op):
        out = torch.compile(function, backend="aot_eager", fullgraph=True)(x, weight, bias)
        expected = F.gelu(F.linear(x, weight, bias))
        torch.testing.assert_close(out, expected)
        ours, torchs = (torch.autograd.grad(result.square().sum(), (x, weight, bias)) for result in (out, expected))
        torch.testing.assert_close(ours, torchs)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("batch", "tokens", "width"), [(256, 99, 1024), (128, 129, 1280)], ids=["L", "H"])
def test_the_real_shapes_on_a_gpu(batch, tokens, width):
    x, weight, bias = (tensor.detach().cuda() for tensor in inputs(torch.bfloat16, batch * tokens, width, 4 * width))
    x = x.view(batch, tokens, width)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    out = linear_gelu(*tensors)
    d_out = torch.randn_like(out)
    d_x, d_weight, d_bias = torch.autograd.grad(out, tensors, d_out)

    wide = [tensor.detach().double().requires_grad_() for tensor in (x[-1], weight, bias)]
    expected = F.gelu(F.linear(*wide))
    d_expected = torch.autograd.grad(expected, wide[0], d_out[-1].double())[0]
    assert relative(out[-1], expected) < 3e-3
    assert relative(d_x[-1], d_expected) < 4e-3

    columns = slice(width, width + 64)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight[columns], bias[columns])]
    expected = F.gelu(F.linear(*wide))
    parts = torch.autograd.grad(expected, wide[1:], d_out[..., columns].double())
    assert relative(d_weight[columns], parts[0]) < 4e-3
    assert relative(d_bias[columns], parts[1]) < 3e-3
    again = torch.autograd.grad(linear_gelu(*tensors), tensors[2], d_out)[0]
    assert torch.equal(again, d_bias)


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()
