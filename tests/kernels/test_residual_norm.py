"""The registered ops without Triton, and the kernels on a GPU at the shapes of ViT-L and ViT-H."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from cae_kernels import layer_norm, norm_qkv, residual_norm, residual_norm_qkv

EPS = 1e-6
FLOAT64, BFLOAT16 = torch.float64, torch.bfloat16
MODULES = [importlib.import_module(f"cae_kernels.{name}") for name in ("residual_norm", "qkv_norm")]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make(shape, dtype=torch.float32, device="cpu", around=0.0):
    return (around + torch.randn(shape, device=device)).to(dtype).requires_grad_()


def residual_inputs(batch, tokens, width, branch=True, keep=True, stream=torch.float32, dtype=torch.float32):
    x, vectors = make((batch, tokens, width), stream), [make(width, dtype, around=1.0) for _ in range(3)]
    factors = torch.full((batch,), 1.25) * (torch.arange(batch) != 1) if branch and keep else None
    update = (make((batch, tokens, width), dtype), vectors[0]) if branch else (None, None)
    return x, *update, factors, *vectors[1:], EPS


def qkv_inputs(batch, tokens, width, branch=True, query=True, dtype=torch.float32):
    x, y, gamma, keep, *_ = residual_inputs(batch, tokens, width, branch, stream=dtype, dtype=dtype)
    vectors = [make(width, dtype, around=1.0) for _ in range(6)]
    table, ids = torch.randn(2 * tokens, width).to(dtype), torch.randint(2 * tokens, (batch, tokens))
    return x, y, gamma, keep, table, ids, *(vectors[:2] if query else (None, None)), *vectors[2:], EPS


@pytest.mark.parametrize(("branch", "keep"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("stream", "dtype"), [(torch.float32, torch.float32), (torch.float32, BFLOAT16)])
def test_opcheck_residual_norm(branch, keep, stream, dtype):
    inputs = residual_inputs(2, 3, 8, branch, keep, stream, dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == BFLOAT16 else {}
    torch.library.opcheck(torch.ops.cae.residual_norm.default, inputs, **tolerance)
    x_new, normed, stats = torch.ops.cae.residual_norm(*inputs)
    assert (x_new.dtype, normed.dtype, stats.dtype) == (stream, dtype, torch.float32)
    inputs = [tensor.detach() if torch.is_tensor(tensor) else tensor for tensor in inputs]
    grads = (inputs[0] if branch else None, torch.randn(2, 3, 8).to(dtype))
    torch.library.opcheck(torch.ops.cae.residual_norm_backward.default, (*grads, stats.detach(), *inputs))


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("query", [True, False])
def test_opcheck_qkv_norm(branch, query):
    inputs = qkv_inputs(2, 3, 8, branch, query)
    torch.library.opcheck(torch.ops.cae.qkv_norm.default, inputs)
    *_, stats = torch.ops.cae.qkv_norm(*inputs)
    inputs = [tensor.detach() if torch.is_tensor(tensor) else tensor for tensor in inputs]
    grads = [torch.randn(2, 3, 8) if used else None for used in (branch, query, True, True)]
    torch.library.opcheck(torch.ops.cae.qkv_norm_backward.default, (*grads, stats.detach(), *inputs))


@pytest.mark.parametrize("branch", [True, False])
def test_gradcheck_residual_norm(branch):
    inputs = residual_inputs(2, 3, 4, branch, stream=FLOAT64, dtype=FLOAT64)
    first = 0 if branch else 1  # without a branch the first output is empty
    assert torch.autograd.gradcheck(lambda *args: torch.ops.cae.residual_norm(*args)[first:2], inputs)


@pytest.mark.parametrize(("branch", "query"), [(True, True), (False, False)])
def test_gradcheck_qkv_norm(branch, query):
    inputs = qkv_inputs(2, 3, 4, branch, query, FLOAT64)

    def outputs(*args):
        return [out for out in torch.ops.cae.qkv_norm(*args)[:4] if out.numel()]

    assert torch.autograd.gradcheck(outputs, inputs)


def run(function, inputs):
    outputs = [out for out in function(*inputs) if out is not None]
    grads = [torch.linspace(-1, 2, out.numel()).view(out.shape).to(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


KEEP, TABLE, IDS = torch.tensor([1.25, 0.0]), torch.linspace(-1, 1, 40).view(5, 8), torch.tensor([[4, 0, 2], [1, 3, 3]])


def compiled_residual_norm_qkv(x, branch, gamma, *vectors):
    norms = [vectors[i : i + 2] for i in (0, 2, 4)]
    x_new, qkv = residual_norm_qkv(x, branch, gamma, KEEP, TABLE, IDS, *norms, EPS)
    return x_new, *qkv


@pytest.mark.parametrize(
    ("function", "branch", "num_vectors"),
    [
        (lambda x, *v: [layer_norm(x, *v, EPS)], False, 2),
        (lambda x, y, *v: residual_norm(x, y, v[0], KEEP, v[1:], EPS), True, 3),
        (lambda x, y, *v: residual_norm(x, y, v[0], None, v[1:], EPS)[1:], True, 3),
        (lambda x, *v: norm_qkv(x, TABLE, IDS, None, v[:2], v[2:], EPS), False, 4),
        (compiled_residual_norm_qkv, True, 7),
    ],
    ids=["layer_norm", "residual_norm", "residual_norm, stream unused", "norm_qkv", "residual_norm_qkv"],
)
def test_compiled_on_the_cpu(function, branch, num_vectors, monkeypatch):
    """The compiled public function goes through the registered op; eager mode is the plain reference."""
    x = make((2, 4, 8)).detach()[:, 1:].requires_grad_()
    inputs = [x, *([make((2, 3, 8))] if branch else []), *(make(8, around=1.0) for _ in range(num_vectors))]
    expected = run(function, inputs)
    for module in MODULES:
        monkeypatch.setattr(module, "backend", lambda op, tensor: "triton")
    torch._dynamo.reset()
    actual = run(torch.compile(function, fullgraph=True), inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def reference(x, branch, gamma, keep, parameters):
    x_new = x + gamma * branch * keep[:, None, None]
    return x_new, F.layer_norm(x_new, x.shape[-1:], *parameters, EPS)


def assert_near(actual, expected, limits):
    difference, rms = (actual.double() - expected).abs(), expected.square().mean().sqrt()
    assert (difference.norm() / expected.norm()).item() <= limits[0]
    assert (difference / (expected.abs() + rms)).max().item() <= limits[1]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(256, 99, 1024), (128, 129, 1280), (64, 197, 768), (3, 7, 85)])
@pytest.mark.parametrize(("stream", "dtype"), [(BFLOAT16, BFLOAT16), (torch.float32, BFLOAT16), (torch.float32,) * 2])
def test_on_a_gpu(shape, stream, dtype):
    x, branch = make(shape, stream, "cuda"), make(shape, dtype, "cuda")
    vectors = [make(shape[2], dtype, "cuda", around=1.0) for _ in range(3)]
    keep = (torch.rand(shape[0], device="cuda") > 0.1).float() / 0.9
    inputs = [x, branch, *vectors]
    outputs = residual_norm(x, branch, vectors[0], keep, tuple(vectors[1:]), EPS)
    grads = [torch.randn_like(out) for out in outputs]
    actual = [*outputs, *torch.autograd.grad(outputs, inputs, grads, retain_graph=True)]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    outputs64 = reference(*wide[:3], keep.double(), wide[3:])
    expected = [*outputs64, *torch.autograd.grad(outputs64, wide, [grad.double() for grad in grads])]
    for one, other in zip(actual, expected, strict=True):
        assert_near(one.detach(), other.detach(), (2.2e-3, 5e-3) if one.dtype == BFLOAT16 else (2e-6, 2e-5))
    again = torch.autograd.grad(outputs, inputs, grads)
    assert all(torch.equal(one, other) for one, other in zip(actual[2:], again, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(256, 98, 1024), (128, 128, 1280)])
@pytest.mark.parametrize("residual", [True, False])
def test_qkv_norms_on_a_gpu(shape, residual):
    batch, tokens, width = shape
    x = make((batch, tokens + 1, width), BFLOAT16, "cuda").detach()[:, 1:].requires_grad_()
    branch, gamma = make(shape, BFLOAT16, "cuda"), make(width, BFLOAT16, "cuda")
    vectors = [make(width, BFLOAT16, "cuda", around=1.0) for _ in range(6)]
    table = torch.randn(2 * tokens, width, device="cuda").to(BFLOAT16)
    ids = torch.rand(batch, 2 * tokens, device="cuda").argsort(1)[:, :tokens]
    norms, keep = [vectors[i : i + 2] for i in (0, 2, 4)], torch.full((batch,), 1.25, device="cuda")
    if residual:
        x_new, qkv = residual_norm_qkv(x, branch, gamma, keep, table, ids, *norms, EPS)
        inputs, outputs = [x, branch, gamma, *vectors], [x_new, *qkv]
    else:
        inputs, outputs = [x, *vectors], list(norm_qkv(x, table, ids, *norms, EPS))
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    x_new64 = wide[0] + 1.25 * wide[2] * wide[1] if residual else wide[0]
    inside = [x_new64 + table.double()[ids]] * 2 + [x_new64]
    first = 3 if residual else 1
    outputs64 = [x_new64] if residual else []
    for i, rows in enumerate(inside):
        outputs64.append(F.layer_norm(rows, (width,), *wide[first + 2 * i : first + 2 * i + 2], EPS))
    grads = [torch.randn_like(out) for out in outputs]
    actual = [*outputs, *torch.autograd.grad(outputs, inputs, grads)]
    expected = [*outputs64, *torch.autograd.grad(outputs64, wide, [grad.double() for grad in grads])]
    for one, other in zip(actual, expected, strict=True):
        assert_near(one.detach(), other.detach(), (2.2e-3, 5e-3))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("name", "package"), [("liger", "liger_kernel"), ("apex", "apex.normalization")])
def test_installed_layer_norms_on_a_gpu(name, package, monkeypatch):
    pytest.importorskip(package, reason=f"needs {package}")
    inputs = [make((8, 99, 1024), BFLOAT16, "cuda"), *(make(1024, BFLOAT16, "cuda", around=1.0) for _ in range(2))]
    monkeypatch.setenv("CAE_KERNELS", f"layer_norm={name}")
    normed, wide = layer_norm(*inputs, EPS), [tensor.detach().double().requires_grad_() for tensor in inputs]
    normed64, grad = F.layer_norm(wide[0], (1024,), *wide[1:], EPS), torch.randn_like(normed)
    actual = [normed, *torch.autograd.grad(normed, inputs, grad)]
    expected = [normed64, *torch.autograd.grad(normed64, wide, grad.double())]
    for one, other in zip(actual, expected, strict=True):
        assert_near(one.detach(), other.detach(), (4e-3, 2e-2))
