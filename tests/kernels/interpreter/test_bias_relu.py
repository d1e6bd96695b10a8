"""The kernel of bias_relu in Triton's interpreter, against float64, and DALL-E's encoder that is built on it."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from checking import assert_close, errors

from cae_fast.models.dalle import DalleDecoder, DalleEncoder, DalleTokenizer
from cae_kernels import bias_relu, bias_residual_relu, conv2d_and_bias

module = importlib.import_module("cae_kernels.bias_relu")

# B, C, H, W: several programs, a last one not full, channels that start anywhere in a program, odd sides, one element
SHAPES = [(2, 64, 8, 6), (1, 24, 7, 5), (3, 7, 6, 5), (2, 2056, 2, 2), (1, 8, 33, 32), (1, 1, 1, 1)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
IDS = ["fp16", "bf16", "fp32"]


def make(shape, dtype, with_bias=True, with_residual=True):
    torch.manual_seed(sum(shape))
    x, residual = (torch.randn(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    bias = torch.randn(shape[1]).to(dtype)
    return x, bias if with_bias else None, residual if with_residual else None


def plain(x, bias, residual):
    if bias is not None:
        x = x + bias[:, None, None]
    return x if residual is None else x + residual


def wide(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def check(actual, truth, in_torch):
    assert actual.dtype == in_torch.dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    half_ulp = torch.finfo(actual.dtype).eps / 2
    limit = half_ulp * (2 if actual.dtype == torch.float32 else 1.01)  # two sums in float32, or one rounding after them
    assert_close(actual, truth, limit, limit)
    assert errors(actual, truth)[0] <= 1.1 * errors(in_torch, truth)[0]


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form(shape, dtype, with_bias, with_residual, written):
    inputs = make(shape, dtype, with_bias, with_residual)
    truth, in_torch = plain(*wide(*inputs)), plain(*inputs)
    if shape[2] > 1:
        total, out = bias_residual_relu(inputs[0].clone(), *inputs[1:], pool=True)
        written(total, out)
        check(total, F.max_pool2d(truth, 2), F.max_pool2d(in_torch, 2))
        check(out, F.max_pool2d(truth, 2).relu(), F.max_pool2d(in_torch, 2).relu())
    total, out = bias_residual_relu(inputs[0].clone(), *inputs[1:])
    written(total, out)
    check(total, truth, in_torch)
    if truth.numel() > 1:
        check(out, truth.relu(), in_torch.relu())
    assert torch.equal(out, total.relu())
    assert torch.equal(bias_relu(*inputs), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_full_sums_are_written_over_x_and_pooling_leaves_the_residual(dtype):
    x, bias, residual = make((2, 16, 4, 6), dtype)
    before = residual.clone()
    total, out = bias_residual_relu(x, bias, residual)
    assert total is x
    assert out.data_ptr() != x.data_ptr()
    assert bias_relu(x, bias) is x
    pooled, _ = bias_residual_relu(x, bias, residual, pool=True)
    assert pooled.shape == (2, 16, 2, 3)
    assert torch.equal(residual, before)


def test_other_layouts():
    x, bias, residual = make((2, 24, 6, 5), torch.float32)
    truth = plain(*wide(x, bias, residual))
    for first, second in ((x, residual.contiguous()), (x.contiguous(), residual), (x.transpose(2, 3), None)):
        expected = truth if second is not None else plain(*wide(first, bias, None))
        total, out = bias_residual_relu(first.clone(), bias, second)
        assert_close(total, expected, 1e-7, 2e-7)
        assert_close(out, expected.relu(), 1e-7, 2e-7)


@pytest.mark.parametrize("pool", [False, True])
def test_values_that_are_not_finite_are_not_hidden(pool):
    x = torch.zeros(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    x[0, :3, 1, 0] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    expected = module.bias_residual_relu_reference(x.clone(), None, None, pool)
    for actual, reference in zip(bias_residual_relu(x.clone(), None, None, pool), expected, strict=True):
        assert torch.equal(actual, reference) or actual.isnan().equal(reference.isnan())
        assert actual.nan_to_num(7.0, 8.0, 9.0).equal(reference.nan_to_num(7.0, 8.0, 9.0))
    assert expected[1].isnan().sum() == 1


def test_no_images():
    x, bias = torch.empty(0, 8, 4, 4).contiguous(memory_format=torch.channels_last), torch.ones(8)
    assert bias_relu(x, bias).shape == (0, 8, 4, 4)
    assert bias_residual_relu(x, bias, None, pool=True)[0].shape == (0, 8, 2, 2)


def test_the_bias_is_left_to_the_kernel():
    x, weight, bias = torch.rand(1, 3, 5, 5), torch.rand(4, 3, 3, 3), torch.rand(4)
    out, left = conv2d_and_bias(x, weight, bias, 1)
    assert left is bias
    assert torch.equal(out, F.conv2d(x, weight, None, padding=1))


@pytest.mark.parametrize("pool", [False, True])
def test_registered_op_and_compiled_as_eager(pool):
    x, bias, residual = make((2, 24, 6, 4), torch.float32)
    for with_sum in (True, False):
        torch.library.opcheck(torch.ops.cae.bias_relu, (x, bias, residual, pool, with_sum))

    def both(x, bias, residual):
        total, out = bias_residual_relu(x, bias, residual, pool)
        return bias_relu(total * 2, None), out

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(x.clone(), bias, residual), both(x.clone(), bias, residual), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 3e-3)])
@pytest.mark.parametrize("num_blocks", [1, 2])
@torch.no_grad()
def test_the_encoder_and_the_decoder(dtype, error, num_blocks, monkeypatch):
    """With biases folded, pooling in the pass and everything in place, against plain torch in float64."""
    torch.manual_seed(5)
    encoder, decoder = DalleEncoder(16, num_blocks, 64), DalleDecoder(16, 8, num_blocks, 64)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
    pixels, codes = torch.rand(2, 3, 40, 24), torch.randint(64, (2, 2, 3))
    monkeypatch.setenv("CAE_KERNELS", "all=reference")
    expected = copy.deepcopy(encoder).double().features(pixels.double()), copy.deepcopy(decoder).double()(codes)
    monkeypatch.delenv("CAE_KERNELS")
    launches, launch = [], module._launch
    monkeypatch.setattr(module, "_launch", lambda *args, **named: launches.append(launch(*args, **named)))
    tokenizer = DalleTokenizer(encoder, decoder, dtype=dtype)
    features = tokenizer.encoder.features(pixels.to(dtype, memory_format=torch.channels_last))
    assert len(launches) == 1 + 4 * 4 * num_blocks
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert_close(features, expected[0], error, 10 * error)
    assert_close(decoder(codes), expected[1], 1e-6, 1e-5)
