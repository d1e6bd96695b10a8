import pytest
import torch
import torch.nn.functional as F
from checking import assert_close, errors

from cae_kernels.attention import _backward, _forward, attention, attention_backward_reference, route, tile_of
from cae_kernels.parts.attention_tiles import split_width

LIMITS = {torch.bfloat16: ((3e-3, 2e-2), (4e-3, 3e-2)), torch.float32: ((2e-6, 1e-5), (5e-6, 5e-5))}
SHAPES = [  # images, tokens, heads, head width
    (2, 1, 2, 32),
    (2, 17, 2, 32),  # a tile of 16 and one token apart
    (1, 50, 3, 85),
    (1, 63, 2, 64),
    (1, 65, 1, 80),  # a tile of 64 and one token apart
    (1, 98, 1, 64),
    (2, 99, 2, 64),
    (1, 128, 1, 80),
    (1, 129, 2, 80),
    (1, 129, 1, 85),
    (1, 33, 1, 12),  # narrower than the narrowest block
    (1, 16, 2, 128),
]


def inputs(images, tokens, heads, width, dtype):
    qkv = torch.randn(images, tokens, 3, heads, width).to(dtype)
    return qkv, torch.randn(images, tokens, heads, width).to(dtype)


def truth(qkv, dout, scale):
    """Output and gradient in float64, by autograd of the plain formula."""
    qkv = qkv.double().requires_grad_()
    query, key, value = qkv.unbind(2)
    scores = scale * torch.einsum("bihc,bjhc->bhij", query, key)
    out = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), value)
    out.backward(dout.double())
    return out, qkv.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradient(shape, dtype, written):
    qkv, dout = inputs(*shape, dtype)
    scale = shape[-1] ** -0.5
    expected, expected_gradient = truth(qkv, dout, scale)
    out = _forward(qkv, scale)
    gradient = _backward(dout, qkv, scale)
    written(out, gradient)
    assert out.dtype == gradient.dtype == dtype
    assert_close(out, expected, *LIMITS[dtype][0])
    for part in range(3):
        if shape[1] > 1 or part == 2:
            assert_close(gradient[:, :, part], expected_gradient[:, :, part], *LIMITS[dtype][1])
        else:
            assert torch.all(gradient[:, :, part].abs() < 1e-6)  # one key: its probability is 1 whatever its score


@pytest.mark.parametrize("tokens", [99, 129])
def test_no_worse_than_plain_torch_in_bfloat16(tokens):
    qkv, dout = inputs(1, tokens, 2, 64, torch.bfloat16)
    expected, expected_gradient = truth(qkv, dout, 0.125)
    plain = qkv.clone().requires_grad_()
    query, key, value = plain.permute(2, 0, 3, 1, 4)
    out = ((0.125 * (query @ key.mT)).softmax(-1) @ value).transpose(1, 2)
    out.backward(dout)
    assert errors(_forward(qkv, 0.125), expected)[0] <= 1.1 * errors(out, expected)[0]
    ours = errors(_backward(dout, qkv, 0.125), expected_gradient)[0]
    assert ours <= 1.1 * errors(plain.grad, expected_gradient)[0]


def test_large_scores_do_not_overflow():
    qkv, dout = inputs(1, 33, 1, 32, torch.float32)
    qkv[:, :, :2] *= 30  # scores of some thousands
    qkv[:, -1, 1] *= 5  # the token apart has the largest of them in about half the rows
    expected, expected_gradient = truth(qkv, dout, 1.0)
    assert expected.isfinite().all()
    assert_close(_forward(qkv, 1.0), expected, 2e-4, 2e-3)
    assert_close(_backward(dout, qkv, 1.0), expected_gradient, 2e-4, 2e-3)


@pytest.mark.parametrize("tokens", [20, 33])
def test_strided_inputs_are_read_in_place(tokens, monkeypatch):
    wide = torch.randn(2, tokens + 3, 3, 4, 40)
    qkv = wide[:, 2:-1, :, 1:3, :32]  # every stride differs from a contiguous tensor's
    dout = torch.randn(2, 2, tokens, 32).transpose(1, 2)
    expected, expected_gradient = truth(qkv, dout, 0.2)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
    out, gradient = _forward(qkv, 0.2), _backward(dout, qkv, 0.2)
    assert out.is_contiguous()
    assert gradient.is_contiguous()
    assert_close(out, expected, *LIMITS[torch.float32][0])
    assert_close(gradient, expected_gradient, *LIMITS[torch.float32][1])


def test_expanded_gradient_of_a_sum():
    qkv = torch.randn(1, 20, 3, 2, 16, requires_grad=True)
    attention(qkv, 0.25).sum().backward()
    expected = attention_backward_reference(torch.ones(1, 20, 2, 16).double(), qkv.detach().double(), 0.25)
    assert_close(qkv.grad, expected, *LIMITS[torch.float32][1])


def test_results_repeat_exactly():
    qkv, dout = inputs(2, 33, 2, 32, torch.bfloat16)
    assert torch.equal(_forward(qkv, 0.2), _forward(qkv.clone(), 0.2))
    assert torch.equal(_backward(dout, qkv, 0.2), _backward(dout.clone(), qkv.clone(), 0.2))


@pytest.mark.parametrize("tokens", [31, 140])
def test_public_function_takes_the_documented_route(tokens, monkeypatch):
    calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k))
    qkv, dout = inputs(1, tokens, 1, 32, torch.float32)
    qkv.requires_grad_()
    out = attention(qkv, 0.2)
    out.backward(dout)
    assert len(calls) == (route(tokens, 32, torch.float32) == "sdpa") == (tokens > 129)
    expected, expected_gradient = truth(qkv.detach(), dout, 0.2)
    assert_close(out, expected, *LIMITS[torch.float32][0])
    assert_close(qkv.grad, expected_gradient, *LIMITS[torch.float32][1])


def test_registered_ops_agree_with_the_eager_function():
    qkv, dout = inputs(1, 17, 2, 32, torch.float32)
    first, second = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    out = attention(first, 0.2)
    registered = torch.ops.cae.attention(second, 0.2)
    out.backward(dout)
    registered.backward(dout)
    assert torch.equal(out, registered)
    assert torch.equal(first.grad, second.grad)


def test_opcheck_of_the_kernels():
    qkv, dout = inputs(1, 17, 2, 16, torch.float32)
    torch.library.opcheck(torch.ops.cae.attention.default, (qkv.requires_grad_(), 0.25))
    torch.library.opcheck(torch.ops.cae.attention_backward.default, (dout, qkv.detach(), 0.25))


def test_tiles_cover_tokens_without_a_second_tile_for_one_token():
    for tokens in range(1, 130):
        rows, extra = tile_of(tokens)
        assert rows >= tokens - extra
        assert rows in (16, 32, 64, 128)
        assert extra == (tokens in (17, 33, 65, 129))
    assert [route(n) for n in (129, 130, 197, 1024)] == ["triton", "sdpa", "sdpa", "sdpa"]
    assert [route(99, width) for width in (85, 128, 129)] == ["triton", "triton", "sdpa"]


def test_widths_are_split_into_powers_of_two():
    assert [split_width(width) for width in (8, 16, 32, 64, 80, 85, 96, 100, 128)] == [
        (16, 0), (16, 0), (32, 0), (64, 0), (64, 16), (64, 32), (64, 32), (128, 0), (128, 0)
    ]  # fmt: skip
    for width in range(1, 129):
        first, second = split_width(width)
        assert first + second >= width
        assert second in (0, 16, 32, 64)
