"""Gathering moves rows and adds positions: equal to plain torch to the last bit; gradients against float64."""

import pytest
import torch
from checking import assert_close

from cae_kernels import gather_tokens
from cae_kernels.gather_tokens import LAUNCH

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def inputs(batch, num_patches, num_visible, width, dtype, pos_dtype=None):
    order = torch.rand(batch, num_patches).argsort(1)
    visible_ids, masked_ids = order[:, :num_visible].sort(1).values, order[:, num_visible:].sort(1).values
    patches = torch.randn(batch, num_patches, width).to(dtype).requires_grad_()
    cls_token = torch.randn(1, 1, width).to(dtype).requires_grad_()
    return patches, visible_ids, masked_ids, cls_token, torch.randn(num_patches + 1, width).to(pos_dtype or dtype)


def sequence(patches, ids, cls_token, pos_embed):
    """The definition, one image at a time."""
    rows = [torch.cat((cls_token[0] + pos_embed[:1], patches[b, i] + pos_embed[i + 1])) for b, i in enumerate(ids)]
    return torch.stack(rows)


# images, patches, visible, width: ViT-L and ViT-H's masks, single tokens, a downstream image without masked patches
@pytest.mark.parametrize(
    ("batch", "num_patches", "num_visible", "width"),
    [(2, 196, 98, 192), (1, 256, 128, 384), (3, 18, 17, 768), (5, 2, 1, 1024), (2, 12, 7, 1280), (3, 129, 66, 85)],
)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["f32", "bf16"])
def test_both_sequences(batch, num_patches, num_visible, width, dtype, written):
    patches, visible_ids, masked_ids, cls_token, pos_embed = inputs(batch, num_patches, num_visible, width, dtype)
    visible, masked = gather_tokens(patches, visible_ids, masked_ids, cls_token, pos_embed)
    assert visible.dtype == masked.dtype == dtype
    assert torch.equal(visible, sequence(patches, visible_ids, cls_token, pos_embed))
    assert torch.equal(masked, sequence(patches, masked_ids, cls_token, pos_embed))
    assert not masked.requires_grad
    grad = torch.randn(visible.shape).to(dtype)
    d_patches, d_cls_token = torch.autograd.grad(visible, [patches, cls_token], grad)
    expected = torch.zeros_like(patches)
    for image, ids in enumerate(visible_ids):
        expected[image, ids] = grad[image, 1:]
    assert torch.equal(d_patches, expected)
    limits = (2e-6, 2e-5) if dtype == FLOAT32 else (2.2e-3, 5e-3)
    assert_close(d_cls_token, grad[:, :1].double().sum(0, keepdim=True), *limits)
    written(visible, masked, d_patches, d_cls_token)


def test_float32_positions_make_a_float32_stream(written):
    patches, visible_ids, masked_ids, cls_token, pos_embed = inputs(2, 12, 5, 192, BFLOAT16, FLOAT32)
    visible, masked = gather_tokens(patches, visible_ids, masked_ids, cls_token, pos_embed)
    assert visible.dtype == masked.dtype == FLOAT32
    assert torch.equal(visible, sequence(patches, visible_ids, cls_token, pos_embed))
    d_patches, d_cls_token = torch.autograd.grad(visible.square().sum(), [patches, cls_token])
    assert d_patches.dtype == d_cls_token.dtype == BFLOAT16
    row = visible_ids[1, 2]
    assert torch.equal(d_patches[1, row], (2 * visible[1, 3]).detach().to(BFLOAT16))
    written(visible, masked, d_patches, d_cls_token)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_all_patches_of_downstream_images(ids_dtype, written):
    patches, _, _, cls_token, pos_embed = inputs(3, 197, 197, 96, FLOAT32)
    ids = torch.arange(197, dtype=ids_dtype).expand(3, -1)
    visible, masked = gather_tokens(patches, ids, None, cls_token, pos_embed)
    assert masked is None
    assert torch.equal(visible, sequence(patches, ids, cls_token, pos_embed))
    grad = torch.randn_like(visible)
    d_patches, d_cls_token = torch.autograd.grad(visible, [patches, cls_token], grad)
    assert torch.equal(d_patches, grad[:, 1:])
    assert_close(d_cls_token, grad[:, :1].double().sum(0, keepdim=True), 2e-6, 2e-5)
    written(visible, d_patches, d_cls_token)


@pytest.mark.parametrize("count", ["visible", "masked"])
def test_no_patch_of_one_kind(count, written):
    patches, ids, _, cls_token, pos_embed = inputs(2, 4, 4, 192, FLOAT32)
    none = ids[:, :0]
    visible, masked = gather_tokens(
        patches, *((none, ids) if count == "visible" else (ids, none)), cls_token, pos_embed
    )
    empty, full = (visible, masked) if count == "visible" else (masked, visible)
    assert torch.equal(empty, (cls_token + pos_embed[:1]).expand(2, 1, -1))
    assert torch.equal(full, sequence(patches, ids, cls_token, pos_embed))
    (d_patches,) = torch.autograd.grad(visible.sum(), patches)
    assert torch.equal(d_patches, torch.full_like(patches, float(count == "masked")))
    written(visible, masked, d_patches)


def test_a_tile_may_span_images():
    assert LAUNCH[256][0] > 4, "the next lines mean more than one image in a tile of rows"
    patches, visible_ids, masked_ids, cls_token, pos_embed = inputs(7, 5, 2, 192, FLOAT32)
    visible, masked = gather_tokens(patches, visible_ids, masked_ids, cls_token, pos_embed)
    assert torch.equal(visible, sequence(patches, visible_ids, cls_token, pos_embed))
    assert torch.equal(masked, sequence(patches, masked_ids, cls_token, pos_embed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patches": torch.zeros(4, 192)}, r"patches has shape \(4, 192\)"),
        ({"visible_ids": torch.zeros(3, 2, dtype=torch.int64)}, r"visible_ids has shape \(3, 2\): it must be \(2, at"),
        ({"masked_ids": torch.zeros(2, dtype=torch.int64)}, r"masked_ids has shape \(2,\)"),
        ({"cls_token": torch.zeros(192)}, r"cls_token and pos_embed have shapes \(192,\)"),
        ({"pos_embed": torch.zeros(4, 192)}, r"\(5, 192\)"),
    ],
)
def test_wrong_arguments(change, message):
    names = "patches", "visible_ids", "masked_ids", "cls_token", "pos_embed"
    with pytest.raises(ValueError, match=message):
        gather_tokens(**(dict(zip(names, inputs(2, 4, 2, 192, FLOAT32), strict=True)) | change))
