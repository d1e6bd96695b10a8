"""The registered op without Triton, and the kernels on a GPU at the shapes of ViT-L and ViT-H."""

import importlib

import pytest
import torch

from cae_kernels import gather_tokens

module = importlib.import_module("cae_kernels.gather_tokens")  # the package's attribute of this name is the function
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def inputs(batch, num_patches, num_visible, width, dtype=torch.float32, device="cpu"):
    order = torch.rand(batch, num_patches, device=device).argsort(1)
    patches = torch.randn(batch, num_patches, width, device=device).to(dtype).requires_grad_()
    cls_token = torch.randn(1, 1, width, device=device).to(dtype).requires_grad_()
    pos_embed = torch.randn(num_patches + 1, width, device=device).to(dtype)
    return patches, order[:, :num_visible], order[:, num_visible:], cls_token, pos_embed


@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked):
    patches, visible_ids, masked_ids, cls_token, pos_embed = inputs(2, 5, 3, 8)
    arguments = patches, visible_ids, masked_ids if masked else None, cls_token, pos_embed
    torch.library.opcheck(torch.ops.cae.gather_tokens.default, arguments)
    d_visible = torch.randn(2, 4, 8, dtype=torch.bfloat16)
    arguments = d_visible, visible_ids, 5, torch.bfloat16, torch.float32
    torch.library.opcheck(torch.ops.cae.gather_tokens_backward.default, arguments)


def test_gradcheck():
    patches, visible_ids, masked_ids, cls_token, pos_embed = inputs(2, 5, 3, 4, torch.float64)

    def visible(patches, cls_token):
        return torch.ops.cae.gather_tokens(patches, visible_ids, masked_ids, cls_token, pos_embed)[0]

    assert torch.autograd.gradcheck(visible, (patches, cls_token))


@pytest.mark.parametrize("masked", [True, False])
def test_compiled_on_the_cpu(masked, monkeypatch):
    """The compiled public function goes through the registered op; eager mode is the plain reference."""
    patches, visible_ids, masked_ids, cls_token, pos_embed = inputs(2, 5, 3, 8)

    def call(patches, cls_token):
        return gather_tokens(patches, visible_ids, masked_ids if masked else None, cls_token, pos_embed)

    def run(function):
        visible, other = function(patches, cls_token)
        assert other is None or not other.requires_grad
        grads = torch.autograd.grad(visible, [patches, cls_token], torch.arange(64.0).view(2, 4, 8))
        return [visible, *grads, *([other] if masked else [])]

    expected = run(call)
    monkeypatch.setattr(module, "backend", lambda op, tensor: "triton")
    torch._dynamo.reset()
    for one, other in zip(run(torch.compile(call, fullgraph=True)), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 196, 98, 1024), (128, 256, 128, 1280), (3, 18, 17, 85)])
def test_on_a_gpu(shape, dtype):
    patches, visible_ids, masked_ids, cls_token, pos_embed = inputs(*shape, dtype, "cuda")
    visible, masked = gather_tokens(patches, visible_ids, masked_ids, cls_token, pos_embed)
    assert torch.equal(visible, module.gather_reference(patches, visible_ids, cls_token, pos_embed))
    assert torch.equal(masked, module.gather_reference(patches, masked_ids, cls_token, pos_embed))
    grad = torch.randn_like(visible)
    d_patches, d_cls_token = torch.autograd.grad(visible, [patches, cls_token], grad)
    rows = visible_ids[..., None].expand(-1, -1, shape[3])
    assert torch.equal(d_patches, torch.zeros_like(patches).scatter(1, rows, grad[:, 1:]))
    expected = grad[:, :1].double().sum(0, keepdim=True)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(d_cls_token.double(), expected, rtol=tolerance, atol=tolerance * shape[0] ** 0.5)
