"""The kernels against autograd of plain torch in float64, from the same rounded inputs."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from checking import assert_close, errors
from torch import Tensor

from cae_kernels import layer_norm, norm_qkv, residual_norm, residual_norm_qkv
from cae_kernels.parts import rows as norm_rows

EPS = 1e-6
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
LIMITS = {FLOAT32: (2e-6, 2e-5), BFLOAT16: (2.2e-3, 5e-3)}
# batch, tokens, width: the token counts and widths of the models, and odd ones
SHAPES = [
    (2, 1, 192),
    (2, 17, 384),
    (1, 63, 768),
    (1, 98, 96),
    (1, 99, 1024),
    (3, 5, 1280),
    (1, 197, 64),
    (1, 129, 85),
    (1, 2, 2049),
]
DTYPES = [(BFLOAT16, BFLOAT16), (FLOAT32, BFLOAT16), (FLOAT32, FLOAT32)]  # residual stream, branch
NAMES = {BFLOAT16: "bf16", FLOAT32: "f32"}


def names(value) -> str:
    return "-".join(str(NAMES.get(part, part)) for part in value)


def vectors(count: int, width: int, dtype: torch.dtype, around: float = 0.0) -> list[Tensor]:
    return [(around + 0.5 * torch.randn(width)).to(dtype) for _ in range(count)]


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return leaves(*(None if tensor is None else tensor.double() for tensor in tensors))


def limits(tensor: Tensor) -> tuple[float, float]:
    return LIMITS[tensor.dtype]


def update64(x, branch, gamma, keep):
    return x + (gamma * branch if keep is None else gamma * branch * keep.double()[:, None, None])


def norm64(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def check_gradients(outputs, outputs64, inputs, inputs64):
    """Backward of outputs with random gradients; every input's gradient against that of the float64 computation."""
    grads = [torch.randn(output.shape).to(output.dtype) for output in outputs]
    actual = torch.autograd.grad(outputs, inputs, grads)
    expected = torch.autograd.grad(outputs64, inputs64, [grad.double() for grad in grads])
    for one, other, tensor in zip(actual, expected, inputs, strict=True):
        assert one.dtype == tensor.dtype
        assert_close(one, other, *limits(one))
    return actual


@pytest.mark.parametrize("shape", SHAPES, ids=names)
@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
def test_residual_norm(shape, dtypes, written):
    stream, dtype = dtypes
    x, branch = torch.randn(shape).to(stream) + 0.5, torch.randn(shape).to(dtype)
    keep = torch.tensor([1 / 0.9, 0.0, 1 / 0.9])[: shape[0]] if shape[0] > 1 else None
    inputs = leaves(x, branch, *vectors(1, shape[2], dtype), *vectors(2, shape[2], dtype, 1.0))
    inputs64 = wide(*inputs)
    x_new, normed = residual_norm(*inputs[:3], keep, tuple(inputs[3:]), EPS)
    x_new64 = update64(*inputs64[:3], keep)
    normed64 = norm64(x_new64, *inputs64[3:])
    assert x_new.dtype == stream
    assert normed.dtype == dtype
    assert_close(x_new, x_new64, *limits(x_new))
    assert_close(normed, normed64, *limits(normed))
    actual = check_gradients([x_new, normed], [x_new64, normed64], inputs, inputs64)
    written(x_new, normed, *actual)


@pytest.mark.parametrize("width", [192, 1024])
def test_not_worse_than_plain_bfloat16(width):
    x, branch = (torch.randn(2, 17, width, dtype=BFLOAT16) for _ in range(2))
    inputs = leaves(x, branch, *vectors(3, width, BFLOAT16))
    plain, inputs64 = leaves(*inputs), wide(*inputs)
    keep = torch.tensor([1 / 0.9, 1.0])
    outputs = residual_norm(*inputs[:3], keep, tuple(inputs[3:]), EPS)
    x_plain = plain[0] + plain[2] * plain[1] * keep.to(BFLOAT16)[:, None, None]
    outputs_plain = [x_plain, F.layer_norm(x_plain, (width,), *plain[3:], EPS)]
    x_new64 = update64(*inputs64[:3], keep)
    outputs64 = [x_new64, norm64(x_new64, *inputs64[3:])]
    grads = [torch.randn_like(x) for _ in range(2)]
    ours = [*outputs, *torch.autograd.grad(outputs, inputs, grads)]
    theirs = [*outputs_plain, *torch.autograd.grad(outputs_plain, plain, grads)]
    truth = [*outputs64, *torch.autograd.grad(outputs64, inputs64, [grad.double() for grad in grads])]
    for one, other, true in zip(ours, theirs, truth, strict=True):
        assert errors(one, true)[0] <= 1.1 * errors(other, true)[0]


@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
def test_layer_norm(dtypes, written):
    stream, dtype = dtypes
    inputs = leaves(torch.randn(2, 7, 192).to(stream) * 3 + 10, *vectors(2, 192, dtype, 1.0))
    inputs64 = wide(*inputs)
    normed, normed64 = layer_norm(*inputs, EPS), norm64(*inputs64)
    assert normed.dtype == dtype
    assert_close(normed, normed64, *limits(normed))
    actual = check_gradients([normed], [normed64], inputs, inputs64)
    written(normed, *actual)


def test_variance_of_rows_far_from_zero_and_of_constant_rows():
    x = torch.randn(1, 4, 384) + 1000.0
    x[0, 3] = 7.0
    weight, bias = torch.ones(384), torch.zeros(384)
    normed, normed64 = layer_norm(x, weight, bias, EPS), norm64(x.double(), weight.double(), bias.double())
    assert_close(normed[:, :3], normed64[:, :3], 5e-5, 5e-4)  # float32 holds 1000 to within 3e-5 of its mean
    assert normed[0, 3].abs().max() == 0


@pytest.mark.parametrize("unused", [0, 1], ids=["x_new", "normed"])
def test_an_unused_output_gives_no_gradient(unused):
    shape = (2, 3, 192)
    inputs = leaves(torch.randn(shape), torch.randn(shape), *vectors(3, 192, FLOAT32))
    inputs64 = wide(*inputs)
    used = residual_norm(*inputs[:3], None, tuple(inputs[3:]), EPS)[1 - unused]
    x_new64 = update64(*inputs64[:3], None)
    used64 = (x_new64, norm64(x_new64, *inputs64[3:]))[1 - unused]
    if unused == 0:
        check_gradients([used], [used64], inputs, inputs64)
    else:
        check_gradients([used], [used64], inputs[:3], inputs64[:3])


def test_no_zeros_are_made_for_an_unused_residual_stream(monkeypatch):
    shape = (1, 3, 192)
    inputs = leaves(torch.randn(shape), torch.randn(shape), *vectors(3, 192, FLOAT32))
    seen = []
    module = importlib.import_module("cae_kernels.residual_norm")  # the package's attribute is the function
    backward = module._residual_norm.back
    monkeypatch.setattr(module._residual_norm, "back", lambda *args: (seen.append(args[0]), backward(*args))[1])
    residual_norm(*inputs[:3], None, tuple(inputs[3:]), EPS)[1].sum().backward()
    assert seen == [None]


def test_the_branch_of_dropped_samples_is_not_read():
    shape = (2, 5, 192)
    x, branch = torch.randn(shape), torch.randn(shape)
    branch[1] = torch.nan
    inputs = leaves(x, branch, *vectors(3, 192, FLOAT32))
    x_new, normed = residual_norm(*inputs[:3], torch.tensor([1.25, 0.0]), tuple(inputs[3:]), EPS)
    assert torch.equal(x_new[1], x[1])
    grads = torch.autograd.grad([x_new, normed], inputs, [torch.ones(shape), torch.randn(shape)])
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][1].abs().max() == 0


def test_many_rows_on_few_programs_and_the_same_bits_twice(monkeypatch):
    monkeypatch.setitem(norm_rows.BACKWARD_LAUNCH, 256, (4, 4, 3))
    shape = (3, 11, 192)
    inputs = leaves(torch.randn(shape), torch.randn(shape), *vectors(3, 192, FLOAT32))
    inputs64 = wide(*inputs)
    keep = torch.tensor([2.0, 0.0, 2.0])
    outputs = residual_norm(*inputs[:3], keep, tuple(inputs[3:]), EPS)
    x_new64 = update64(*inputs64[:3], keep)
    torch.manual_seed(1)
    first = check_gradients(outputs, [x_new64, norm64(x_new64, *inputs64[3:])], inputs, inputs64)
    torch.manual_seed(1)
    grads = [torch.randn(shape) for _ in outputs]
    again = torch.autograd.grad(residual_norm(*inputs[:3], keep, tuple(inputs[3:]), EPS), inputs, grads)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("layout", ["class token cut off", "one token for all"])
def test_strided_rows(layout, written):
    if layout == "class token cut off":
        x = torch.randn(2, 8, 192)[:, 1:]
    else:
        x = torch.randn(1, 1, 192).expand(2, 7, 192)
    inputs = leaves(x, torch.randn(2, 7, 192), *vectors(3, 192, FLOAT32))
    inputs64 = wide(*inputs)
    outputs = residual_norm(*inputs[:3], None, tuple(inputs[3:]), EPS)
    assert inputs[0].stride() == x.stride()
    x_new64 = update64(*inputs64[:3], None)
    outputs64 = [x_new64, norm64(x_new64, *inputs64[3:])]
    for one, other in zip(outputs, outputs64, strict=True):
        assert_close(one, other, *LIMITS[FLOAT32])
    written(*outputs, *check_gradients(outputs, outputs64, inputs, inputs64))


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("query", [True, False], ids=["qkv", "kv"])
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [((2, 17, 384), DTYPES[0]), ((1, 98, 85), DTYPES[0]), ((3, 3, 1280), DTYPES[1]), ((2, 5, 1024), DTYPES[2])],
    ids=names,
)
def test_qkv_norms(shape, dtypes, residual, query, written):
    stream, dtype = dtypes
    batch, tokens, width = shape
    x, branch = torch.randn(shape).to(stream), torch.randn(shape).to(dtype) if residual else None
    gamma = vectors(1, width, dtype)[0] if residual else None
    keep = torch.tensor([1.25, 0.0, 1.25])[:batch] if residual and batch > 1 else None
    table, ids = torch.randn(tokens + 4, width).to(dtype), torch.randint(tokens + 4, (batch, tokens))
    parameters = vectors(6 if query else 4, width, dtype, 1.0)
    inputs = leaves(x, branch, gamma, *parameters)
    inputs64 = wide(*inputs)

    def outputs_of(x, branch, gamma, *parameters):
        norms = [parameters[i : i + 2] for i in range(0, len(parameters), 2)]
        norms = norms if query else [None, *norms]
        if residual:
            x_new, qkv = residual_norm_qkv(x, branch, gamma, keep, table, ids, *norms, EPS)
            return [x_new, *qkv]
        return norm_qkv(x, table, ids, *norms, EPS)

    def outputs64_of(x, branch, gamma, *parameters):
        x = update64(x, branch, gamma, keep) if residual else x
        positioned = x + table.double()[ids]
        inside = [positioned, positioned, x] if query else [positioned, x]
        norms = [norm64(rows, *parameters[2 * i : 2 * i + 2]) for i, rows in enumerate(inside)]
        return [x, *norms] if residual else norms

    outputs = outputs_of(*inputs)
    assert query or outputs[int(residual)] is None
    outputs = [output for output in outputs if output is not None]
    outputs64 = outputs64_of(*inputs64)
    for one, other in zip(outputs, outputs64, strict=True):
        assert_close(one, other, *limits(one))
    given = [i for i, tensor in enumerate(inputs) if tensor is not None]
    actual = check_gradients(outputs, outputs64, [inputs[i] for i in given], [inputs64[i] for i in given])
    written(*outputs, *actual)


def test_qkv_norms_of_strided_rows_with_int32_ids_and_an_unused_value():
    memory = torch.randn(2, 8, 192)
    inputs = leaves(memory[:, 1:], *vectors(4, 192, FLOAT32))
    inputs64 = wide(*inputs)
    table, ids = torch.randn(9, 192), torch.arange(7, dtype=torch.int32).expand(2, 7)
    _, key, _ = norm_qkv(inputs[0], table, ids, None, tuple(inputs[1:3]), tuple(inputs[3:]), EPS)
    key64 = norm64(inputs64[0] + table.double()[:7], *inputs64[1:3])
    assert_close(key, key64, *LIMITS[FLOAT32])
    check_gradients([key], [key64], inputs[:3], inputs64[:3])


def test_sums_of_rows_spaced_anyhow(written):
    x = torch.randn(2, 150, 70)[:, ::2, :69]
    out = norm_rows.sum_rows(x, FLOAT32)
    assert_close(out, x.double().sum(1), *LIMITS[FLOAT32])
    written(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, r"x is \(3, 8\)"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.float64)}, "float64"),
        ({"branch": torch.zeros(2, 3, 4)}, r"branch has shape \(2, 3, 4\)"),
        ({"keep": torch.zeros(3)}, r"keep is \(3,\)"),
        ({"gamma": torch.zeros(16)[::2]}, r"strides \(2,\)"),
        ({"x": torch.zeros(1, 1, 4097), "branch": None, "gamma": torch.zeros(4097)}, "4097 wide"),
    ],
)
def test_wrong_arguments(change, message):
    x = change.get("x", torch.zeros(2, 3, 8))
    branch = change.get("branch", x)
    gamma = change.get("gamma", torch.zeros(8))
    with pytest.raises(ValueError, match=message):
        residual_norm(x, x if branch is None else branch, gamma, change.get("keep"), (gamma, gamma), EPS)


def test_wrong_positions():
    x, weight = torch.zeros(2, 3, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"ids and pos_embed"):
        norm_qkv(x, torch.zeros(5, 8), torch.zeros(2, 4, dtype=torch.int64), None, (weight,) * 2, (weight,) * 2, EPS)
