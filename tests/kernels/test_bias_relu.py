"""bias_relu without the interpreter: registration, reference, compilation, errors; on a GPU the real shapes."""

import pytest
import torch
import torch.nn.functional as F

from cae_fast.models.dalle import DalleEncoder
from cae_kernels import bias_relu, bias_residual_relu, conv2d_and_bias

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def inputs(dtype=torch.float32, shape=(2, 6, 5, 4), device="cpu"):
    torch.manual_seed(0)
    x, residual = (
        torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    return x, torch.randn(shape[1], device=device).to(dtype), residual


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("with_sum", [False, True])
def test_registered_op(pool, with_sum):
    x, bias, residual = inputs()
    for args in ((x, bias, residual), (x, bias, None), (x.contiguous(), None, residual)):
        torch.library.opcheck(torch.ops.cae.bias_relu, (*args, pool, with_sum))


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_reference(with_bias, with_residual):
    x, bias, residual = inputs(torch.float64)
    bias, residual = bias if with_bias else None, residual if with_residual else None
    expected = x + (0 if bias is None else bias[None, :, None, None]) + (0 if residual is None else residual)
    pooled = expected[:, :, :4].unflatten(3, (2, 2)).unflatten(2, (2, 2)).amax((3, 5))
    assert torch.equal(bias_relu(x.clone(), bias, residual), expected.clamp_min(0))
    for pool, truth in ((False, expected), (True, pooled)):
        total, out = bias_residual_relu(x.clone(), bias, residual, pool)
        torch.testing.assert_close(total, truth, rtol=1e-15, atol=1e-15)
        assert torch.equal(out, total.clamp_min(0))
        functional = torch.ops.cae.bias_relu(x, bias, residual, pool, True)
        assert torch.equal(functional[0], total)
        assert torch.equal(functional[1], out)


def test_no_copy_on_a_cpu():
    x, bias, residual = inputs()
    assert bias_relu(x, bias, residual) is x
    assert bias_residual_relu(x, bias, residual)[0] is x


def test_a_convolution_adds_its_own_bias_on_a_cpu():
    x, weight, bias = torch.rand(1, 3, 5, 5), torch.rand(4, 3, 3, 3), torch.rand(4)
    out, left = conv2d_and_bias(x, weight, bias, 1)
    assert left is None
    assert torch.equal(out, F.conv2d(x, weight, bias, padding=1))


@torch.no_grad()
def test_compiled_as_eager():
    torch.manual_seed(1)
    encoder = DalleEncoder(8, 2, 16).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    pixels = torch.rand(2, 3, 32, 32)
    compiled = torch.compile(encoder.features, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels), encoder.features(pixels), rtol=1e-6, atol=1e-6)


def test_errors():
    x, bias, residual = inputs()
    with pytest.raises(ValueError, match=r"bias \(5,\); they must be \(B, C, H, W\) and \(C,\)"):
        bias_relu(x, bias[:5])
    with pytest.raises(ValueError, match=r"x \(6, 5, 4\), bias None; they must be"):
        bias_relu(x[0], None)
    with pytest.raises(ValueError, match=r"residual \(1, 6, 5, 4\); they must be equal"):
        bias_residual_relu(x, bias, residual[:1])
    for wanting in range(3):
        parts = [part.clone().requires_grad_(i == wanting) for i, part in enumerate((x, bias, residual))]
        with pytest.raises(ValueError, match="no derivative: call it under torch.no_grad"):
            bias_residual_relu(*parts)
        with torch.no_grad():
            assert not bias_relu(*[part.detach() for part in parts]).requires_grad


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("channels", "side"), [(64, 112), (256, 112), (512, 56), (1024, 28), (2048, 14), (512, 14), (100, 27)]
)
def test_the_real_shapes_on_a_gpu(channels, side, dtype):
    batch = 256 if dtype.itemsize == 2 else 64
    x, bias, residual = inputs(dtype, (batch, channels, side, side), "cuda")
    some = [0, batch // 3, batch - 1]
    truth = x[some].double() + bias.double()[:, None, None] + residual[some].double()
    eps = torch.finfo(dtype).eps
    for pool in (False, True):
        total, out = bias_residual_relu(x.clone(), bias, residual, pool)
        expected = F.max_pool2d(truth, 2) if pool else truth
        torch.testing.assert_close(total[some].double(), expected, rtol=eps, atol=4 * eps)
        assert torch.equal(out, total.relu())
    torch.testing.assert_close(bias_relu(x, bias, residual)[some].double(), truth.relu(), rtol=eps, atol=4 * eps)


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_more_than_two_to_the_31_elements_on_a_gpu():
    x, bias, _ = inputs(torch.float16, (3, 64, 112, 112), "cuda")
    count = 2**31 // x[0].numel() + 2
    large = x[0].expand(count, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    total, out = bias_residual_relu(large, bias, None, pool=True)
    expected = bias_residual_relu(x[:1].clone(), bias, None, pool=True)
    assert torch.equal(total[-1:], expected[0])
    assert torch.equal(out[count // 2 : count // 2 + 1], expected[1])
    assert torch.equal(bias_relu(large, bias)[-1:], bias_relu(x[:1], bias))


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_the_encoder_on_a_gpu(monkeypatch):
    torch.manual_seed(2)
    encoder = DalleEncoder(64, 2, 512).eval().requires_grad_(False).cuda()
    encoder = encoder.to(dtype=torch.float16, memory_format=torch.channels_last)
    pixels = torch.rand(8, 3, 112, 112, device="cuda").half().contiguous(memory_format=torch.channels_last)
    fused = encoder.features(pixels).float()
    compiled = torch.compile(encoder.features, fullgraph=True)(pixels).float()
    monkeypatch.setenv("CAE_KERNELS", "bias_relu=reference")
    plain = encoder.features(pixels).float()
    assert (fused - plain).norm() <= 3e-3 * plain.norm()
    assert (compiled - plain).norm() <= 3e-3 * plain.norm()
