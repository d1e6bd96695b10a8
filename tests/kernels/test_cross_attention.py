import importlib.util

import pytest
import torch

from cae_kernels import cross_attention
from cae_kernels.cross_attention import cross_attention_backward_reference, cross_attention_reference
from cae_kernels.dispatch import ATTENTION

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
REAL = [(256, 98, 98, 16, 64), (128, 128, 128, 16, 80)]  # images, visible, masked, heads, head width


def inputs(images, visible, masked, heads, width, **options):
    """query, key and value of the visible, key and value of the masked, gradient of the output."""
    tokens = (masked, visible, visible, masked, masked, masked)
    return [torch.randn(images, n, heads, width, **options) for n in tokens]


def truth(tensors, dout, scale):
    """Output and the five gradients in float64, by autograd of the plain formula."""
    exact = [x.detach().double().requires_grad_() for x in tensors]
    key, value = torch.cat((exact[1], exact[3]), 1), torch.cat((exact[2], exact[4]), 1)
    p = (scale * torch.einsum("bihc,bjhc->bhij", exact[0], key)).softmax(-1)
    out = torch.einsum("bhij,bjhc->bihc", p, value)
    return out.detach(), torch.autograd.grad(out, exact, dout.double())


def call(tensors, scale):
    return cross_attention(tensors[0], tuple(tensors[1:3]), tuple(tensors[3:]), scale)


@pytest.mark.parametrize(("visible", "masked", "width"), [(1, 1, 32), (17, 63, 85), (98, 98, 64), (197, 20, 16)])
def test_reference_and_its_backward(visible, masked, width):
    *tensors, dout = inputs(2, visible, masked, 2, width)
    expected, expected_gradients = truth(tensors, dout, width**-0.5)
    out = cross_attention_reference(tensors[0], tuple(tensors[1:3]), tuple(tensors[3:]), width**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = cross_attention_backward_reference(dout, *tensors, width**-0.5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


def test_gradcheck_of_the_registered_backward():
    *tensors, _ = inputs(2, 3, 4, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: torch.ops.cae.cross_attention(*x, 0.4), tensors)


def test_opcheck():
    *tensors, dout = inputs(2, 3, 5, 2, 8)
    torch.library.opcheck(torch.ops.cae.cross_attention_backward.default, (dout, *tensors, 0.3))
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.cae.cross_attention.default, (*leaves, 0.3))


@pytest.mark.parametrize("registered", [False, True])
def test_compiled_agrees_with_eager(registered):
    *tensors, _ = inputs(2, 3, 5, 2, 16)

    def step(*x):
        out = torch.ops.cae.cross_attention(*x, 0.25) if registered else call(x, 0.25)
        return (out + 1).square().sum()

    eager, compiled = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    step(*eager).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_wrong_shapes_are_named():
    *tensors, _ = inputs(2, 3, 5, 2, 8)
    with pytest.raises(ValueError, match=r"query has shape \(2, 5, 2\): it must be \(B, Nm, H, C\)"):
        call([tensors[0][..., 0], *tensors[1:]], 0.3)
    for number, name in ((1, "visible"), (2, "visible"), (3, "masked"), (4, "masked")):
        wrong = list(tensors)
        wrong[number] = wrong[number][..., :6]
        with pytest.raises(ValueError, match=rf"`{name}` has shape \(2, [35], 2, 6\): it must be \(2, [35], 2, 8\)"):
            call(wrong, 0.3)


@pytest.mark.parametrize("shape", REAL, ids=str)
class TestOnGpu:
    pytestmark = gpu

    def inputs(self, shape, dtype=torch.bfloat16):
        *tensors, dout = inputs(*shape, device="cuda", dtype=dtype)
        return [x.requires_grad_() for x in tensors], dout

    def check(self, out, tensors, dout, limits):
        some = [0, len(out) // 2, len(out) - 1]
        expected, expected_gradients = truth([x[some] for x in tensors], dout[some], out.shape[-1] ** -0.5)
        assert ((out[some].double() - expected).norm() / expected.norm()).item() <= limits[0]
        for tensor, wanted in zip(tensors, expected_gradients, strict=True):
            assert ((tensor.grad[some].double() - wanted).norm() / wanted.norm()).item() <= limits[1]

    @pytest.mark.parametrize("name", ATTENTION)
    def test_backends_in_bfloat16(self, shape, name, monkeypatch):
        if name == "xformers" and importlib.util.find_spec("xformers") is None:
            pytest.skip("needs xformers installed")
        monkeypatch.setenv("CAE_KERNELS", f"cross_attention={name}")
        tensors, dout = self.inputs(shape)
        out = call(tensors, shape[-1] ** -0.5)
        out.backward(dout)
        self.check(out, tensors, dout, (3e-3, 4e-3) if name == "triton" else (5e-3, 1e-2))

    def test_float32(self, shape):
        tensors, dout = self.inputs((4, *shape[1:]), torch.float32)
        out = call(tensors, shape[-1] ** -0.5)
        out.backward(dout)
        self.check(out, tensors, dout, (5e-6, 1e-5))

    def test_results_repeat_exactly(self, shape):
        tensors, dout = self.inputs(shape)
        first = torch.autograd.grad(call(tensors, 0.125), tensors, dout)
        for _ in range(3):
            again = torch.autograd.grad(call(tensors, 0.125), tensors, dout)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_compiled(self, shape):
        tensors, dout = self.inputs(shape)
        out = torch.compile(call, fullgraph=True)(tensors, shape[-1] ** -0.5)
        out.backward(dout)
        self.check(out, tensors, dout, (3e-3, 4e-3))
