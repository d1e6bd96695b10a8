import pytest
import torch
import torch.nn.functional as F
from checking import assert_close, errors

from cae_kernels.cross_attention import _cross_attention, cross_attention, route

_forward, _backward = _cross_attention.run, _cross_attention.back

LIMITS = {torch.bfloat16: ((3e-3, 2e-2), (4e-3, 3e-2)), torch.float32: ((2e-6, 1e-5), (5e-6, 5e-5))}
SHAPES = [  # images, visible, masked, heads, head width
    (2, 1, 1, 1, 32),
    (2, 17, 5, 2, 32),
    (1, 3, 70, 2, 16),
    (1, 63, 17, 1, 85),
    (1, 98, 98, 2, 64),
    (1, 100, 20, 1, 64),
    (1, 128, 128, 1, 80),
    (1, 64, 128, 1, 85),
]


def inputs(images, visible, masked, heads, width, dtype):
    """query, key and value of the visible, key and value of the masked, gradient of the output."""
    tokens = (masked, visible, visible, masked, masked, masked)
    return [torch.randn(images, n, heads, width).to(dtype) for n in tokens]


def truth(tensors, scale):
    """Output and the five gradients in float64, by autograd of the plain formula."""
    *exact, dout = (x.detach().double() for x in tensors)
    query, k_visible, v_visible, k_masked, v_masked = (x.requires_grad_() for x in exact)
    key, value = torch.cat((k_visible, k_masked), 1), torch.cat((v_visible, v_masked), 1)
    p = (scale * torch.einsum("bihc,bjhc->bhij", query, key)).softmax(-1)
    out = torch.einsum("bhij,bjhc->bihc", p, value)
    return out, torch.autograd.grad(out, exact, dout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype, written):
    *tensors, dout = inputs(*shape, dtype)
    scale = shape[-1] ** -0.5
    expected, expected_gradients = truth((*tensors, dout), scale)
    out = _forward(*tensors, scale)
    gradients = _backward(dout, *tensors, scale)
    written(out, *gradients)
    assert_close(out, expected, *LIMITS[dtype][0])
    for gradient, wanted, tensor in zip(gradients, expected_gradients, tensors, strict=True):
        assert gradient.dtype == out.dtype == dtype
        assert gradient.shape == tensor.shape
        assert_close(gradient, wanted, *LIMITS[dtype][1])


def test_no_worse_than_plain_torch_in_bfloat16():
    *tensors, dout = inputs(1, 98, 98, 2, 64, torch.bfloat16)
    expected, expected_gradients = truth((*tensors, dout), 0.125)
    plain = [x.clone().requires_grad_() for x in tensors]
    query, key, value = plain[0], torch.cat((plain[1], plain[3]), 1), torch.cat((plain[2], plain[4]), 1)
    p = (0.125 * (query.transpose(1, 2) @ key.permute(0, 2, 3, 1))).softmax(-1)
    out = (p @ value.transpose(1, 2)).transpose(1, 2)
    out.backward(dout)
    assert errors(_forward(*tensors, 0.125), expected)[0] <= 1.1 * errors(out, expected)[0]
    for ours, theirs, wanted in zip(_backward(dout, *tensors, 0.125), plain, expected_gradients, strict=True):
        assert errors(ours, wanted)[0] <= 1.1 * errors(theirs.grad, wanted)[0]


@pytest.mark.parametrize("louder", [1, 3], ids=["visible", "masked"])
def test_one_source_far_above_the_other(louder):
    *tensors, dout = inputs(1, 20, 70, 1, 32, torch.float32)
    tensors[louder] *= 40  # its scores are some hundreds higher or lower than the other source's
    expected, expected_gradients = truth((*tensors, dout), 0.2)
    assert_close(_forward(*tensors, 0.2), expected, 2e-4, 2e-3)
    for gradient, wanted in zip(_backward(dout, *tensors, 0.2), expected_gradients, strict=True):
        assert_close(gradient, wanted, 2e-4, 2e-3)


def test_strided_inputs_are_read_in_place(monkeypatch):
    images, visible, masked, heads, width = 2, 70, 66, 2, 32  # two chunks of keys in each source
    wide = torch.randn(images, masked + 1, 3, heads + 1, width + 8)[..., :width]
    query, *own = wide[:, 1:, :, 1:].unbind(2)
    others = torch.randn(images, visible, heads, 2 * width).split(width, -1)
    sources = (*others, *own)
    dout = torch.randn(images, heads, masked, width).transpose(1, 2)
    tensors = (query, *sources)
    expected, expected_gradients = truth((*tensors, dout), 0.2)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
    assert_close(_forward(*tensors, 0.2), expected, *LIMITS[torch.float32][0])
    for gradient, wanted in zip(_backward(dout, *tensors, 0.2), expected_gradients, strict=True):
        assert gradient.is_contiguous()
        assert_close(gradient, wanted, *LIMITS[torch.float32][1])


def test_keys_and_values_of_different_layouts():
    *tensors, dout = inputs(1, 20, 18, 2, 32, torch.float32)
    tensors[1] = tensors[1].transpose(1, 2).contiguous().transpose(1, 2)
    tensors[4] = tensors[4].mT.contiguous().mT
    expected, expected_gradients = truth((*tensors, dout), 0.2)
    assert_close(_forward(*tensors, 0.2), expected, *LIMITS[torch.float32][0])
    for gradient, wanted in zip(_backward(dout, *tensors, 0.2), expected_gradients, strict=True):
        assert_close(gradient, wanted, *LIMITS[torch.float32][1])


def test_results_repeat_exactly():
    *tensors, dout = inputs(2, 33, 20, 2, 32, torch.bfloat16)
    assert torch.equal(_forward(*tensors, 0.2), _forward(*tensors, 0.2))
    for first, second in zip(_backward(dout, *tensors, 0.2), _backward(dout, *tensors, 0.2), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("visible", [9, 130])
def test_public_function_takes_the_documented_route(visible, monkeypatch):
    calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k))
    *tensors, dout = inputs(1, visible, 7, 1, 32, torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    out = cross_attention(leaves[0], (leaves[1], leaves[2]), (leaves[3], leaves[4]), 0.2)
    out.backward(dout)
    assert len(calls) == (route(visible, 7, 32, torch.float32) == "sdpa") == (visible > 128)
    expected, expected_gradients = truth((*tensors, dout), 0.2)
    assert_close(out, expected, *LIMITS[torch.float32][0])
    for leaf, wanted in zip(leaves, expected_gradients, strict=True):
        assert_close(leaf.grad, wanted, *LIMITS[torch.float32][1])


def test_registered_op_agrees_with_the_eager_function():
    *tensors, dout = inputs(1, 17, 9, 2, 32, torch.float32)
    first = [x.clone().requires_grad_() for x in tensors]
    second = [x.clone().requires_grad_() for x in tensors]
    out = cross_attention(first[0], (first[1], first[2]), (first[3], first[4]), 0.2)
    registered = torch.ops.cae.cross_attention(*second, 0.2)
    out.backward(dout)
    registered.backward(dout)
    assert torch.equal(out, registered)
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_opcheck_of_the_kernels():
    *tensors, dout = inputs(1, 5, 7, 1, 16, torch.float32)
    torch.library.opcheck(torch.ops.cae.cross_attention_backward.default, (dout, *tensors, 0.25))
    leaves = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.cae.cross_attention.default, (*leaves, 0.25))


def test_route():
    assert [route(*counts) for counts in ((98, 98), (128, 128), (129, 98), (98, 129))] == [
        "triton", "triton", "sdpa", "sdpa"
    ]  # fmt: skip
    assert [route(98, 98, width) for width in (80, 128, 129)] == ["triton", "triton", "sdpa"]
