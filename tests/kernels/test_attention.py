import importlib.util

import pytest
import torch

from cae_kernels import attention
from cae_kernels.attention import attention_backward_reference, attention_reference, route
from cae_kernels.dispatch import ATTENTION
from cae_kernels.parts.attention_libraries import library_attention

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
REAL = [(256, 99, 16, 64), (128, 129, 16, 80), (128, 128, 16, 80)]  # images, tokens, heads, head width


def truth(qkv, dout, scale):
    """Output and gradient in float64, by autograd of the plain formula."""
    qkv = qkv.detach().double().requires_grad_()
    query, key, value = qkv.unbind(2)
    p = (scale * torch.einsum("bihc,bjhc->bhij", query, key)).softmax(-1)
    out = torch.einsum("bhij,bjhc->bihc", p, value)
    out.backward(dout.double())
    return out.detach(), qkv.grad


@pytest.mark.parametrize(("tokens", "width"), [(1, 32), (17, 85), (99, 64), (129, 80), (197, 64)])
def test_reference_and_its_backward(tokens, width):
    qkv, dout = torch.randn(2, tokens, 3, 2, width), torch.randn(2, tokens, 2, width)
    expected, expected_gradient = truth(qkv, dout, width**-0.5)
    torch.testing.assert_close(attention_reference(qkv, width**-0.5).double(), expected, rtol=1e-5, atol=1e-5)
    gradient = attention_backward_reference(dout, qkv, width**-0.5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


def test_gradcheck_of_the_registered_backward():
    qkv = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: torch.ops.cae.attention(x, 0.4), (qkv,))


def test_opcheck():
    qkv = torch.randn(2, 5, 3, 2, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.cae.attention.default, (qkv, 0.3))
    torch.library.opcheck(torch.ops.cae.attention.default, (qkv[:, 1:, :, :, :6], 0.3))
    torch.library.opcheck(torch.ops.cae.attention_backward.default, (torch.randn(2, 5, 2, 8), qkv.detach(), 0.3))


@pytest.mark.parametrize("function", [attention, torch.ops.cae.attention], ids=["public", "registered"])
def test_compiled_agrees_with_eager(function):
    qkv = torch.randn(2, 7, 3, 2, 16)

    def step(x):
        return (function(2 * x, 0.25) + 1).square().sum()

    eager, compiled = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    step(eager).backward()
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize("shape", [(2, 5, 2, 8), (2, 5, 2, 3, 8), (2, 5, 4, 2, 8)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"must be \(B, N, 3, H, C\)"):
        attention(torch.randn(shape), 0.3)


def test_route():
    assert [route(n) for n in (1, 99, 129, 130, 197, 1024)] == ["triton"] * 3 + ["sdpa"] * 3
    assert [route(99, width) for width in (85, 128, 129)] == ["triton", "triton", "sdpa"]
    assert [route(99, 64, dtype) for dtype in (torch.float16, torch.float32, torch.float64)] == [
        "triton", "sdpa", "sdpa"
    ]  # fmt: skip


def test_sdpa_flash_pinned_to_torchs_cpu_kernel():
    qkv, dout = torch.randn(2, 9, 3, 2, 16, requires_grad=True), torch.randn(2, 9, 2, 16)
    expected, expected_gradient = truth(qkv, dout, 0.25)
    out = library_attention("sdpa_flash", *qkv.unbind(2), 0.25)
    out.backward(dout)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(qkv.grad.double(), expected_gradient, rtol=1e-4, atol=1e-5)


def test_a_pinned_backend_never_becomes_another():
    qkv = torch.randn(1, 9, 3, 2, 16)
    with pytest.raises(RuntimeError, match="[Nn]o (available|viable)"):
        library_attention("sdpa_cudnn", *qkv.unbind(2), 0.25)


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "xformers"])
def test_forced_libraries_are_refused_on_a_cpu(name, monkeypatch):
    monkeypatch.setenv("CAE_KERNELS", f"attention={name}")
    with pytest.raises(ValueError, match=f"attention={name}"):
        attention(torch.randn(1, 4, 3, 1, 8), 0.3)


@pytest.mark.parametrize("shape", REAL, ids=str)
class TestOnGpu:
    pytestmark = gpu

    def inputs(self, shape, dtype=torch.bfloat16):
        images, tokens, heads, width = shape
        qkv = torch.randn(images, tokens, 3, heads, width, device="cuda", dtype=dtype, requires_grad=True)
        return qkv, torch.randn(images, tokens, heads, width, device="cuda", dtype=dtype)

    def check(self, out, qkv, dout, limits):
        some = [0, len(qkv) // 2, len(qkv) - 1]
        expected, expected_gradient = truth(qkv[some], dout[some], qkv.shape[-1] ** -0.5)
        for actual, wanted, limit in ((out, expected, limits[0]), (qkv.grad, expected_gradient, limits[1])):
            difference = (actual[some].double() - wanted).norm() / wanted.norm()
            assert difference.item() <= limit

    @pytest.mark.parametrize("name", ATTENTION)
    def test_backends_in_bfloat16(self, shape, name, monkeypatch):
        if name == "xformers" and importlib.util.find_spec("xformers") is None:
            pytest.skip("needs xformers installed")
        monkeypatch.setenv("CAE_KERNELS", f"attention={name}")
        qkv, dout = self.inputs(shape)
        out = attention(qkv, shape[-1] ** -0.5)
        out.backward(dout)
        limits = (3e-3, 4e-3) if name == "triton" else (5e-3, 1e-2)
        self.check(out, qkv, dout, limits)

    def test_float32(self, shape):
        qkv, dout = self.inputs((4, *shape[1:]), torch.float32)
        out = attention(qkv, shape[-1] ** -0.5)
        out.backward(dout)
        self.check(out, qkv, dout, (5e-6, 1e-5))

    def test_results_repeat_exactly(self, shape):
        qkv, dout = self.inputs(shape)
        first = torch.autograd.grad(attention(qkv, 0.125), qkv, dout)[0]
        for _ in range(3):
            assert torch.equal(torch.autograd.grad(attention(qkv, 0.125), qkv, dout)[0], first)

    def test_compiled(self, shape):
        qkv, dout = self.inputs(shape)
        out = torch.compile(attention, fullgraph=True)(qkv, shape[-1] ** -0.5)
        out.backward(dout)
        self.check(out, qkv, dout, (3e-3, 4e-3))
