"""Token sequences of the visible and of the masked patches: [class token ; chosen patches] + positions.

out[b, 0] = cls_token + pos_embed[0], out[b, 1 + i] = patches[b, ids[b, i]] + pos_embed[1 + ids[b, i]].
Backward: d_patches[b, ids[b, i]] = d_out[b, 1 + i], zero elsewhere, d_cls_token = sum over b of d_out[b, 0]; every row
of d_patches looks itself up among the visible ids, so that each is written once, without atomics.
B batch, N patches, Nv visible, Nm masked, D width. Both sequences are written by one kernel; rows are only moved.
"""

import torch
from torch import Tensor

from .dispatch import backend
from .parts.registration import fused_op
from .parts.rows import block_of, load_vector, sum_rows, unit_columns
from .parts.triton_language import tl, triton

LAUNCH = {128: (32, 4), 256: (16, 4), 512: (8, 4), 1024: (4, 4), 2048: (4, 8), 4096: (2, 8)}  # BLOCK: (ROWS, num_warps)
IDS = 64  # visible ids that a tile of rows is compared with at a time


def gather_reference(patches: Tensor, ids: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
    batch, _, width = patches.shape
    ids = ids.long()
    chosen = patches.gather(1, ids[..., None].expand(-1, -1, width)) + pos_embed[1:][ids]  # (B, n, D)
    first = (cls_token + pos_embed[:1]).expand(batch, 1, width)  # (B, 1, D)
    return torch.cat((first.to(chosen.dtype), chosen), 1)


def _forward_reference(
    patches: Tensor, visible_ids: Tensor, masked_ids: Tensor | None, cls_token: Tensor, pos_embed: Tensor
) -> tuple[Tensor, Tensor]:
    visible = gather_reference(patches, visible_ids, cls_token, pos_embed)
    if masked_ids is None:
        return visible, visible.new_empty(0)
    return visible, gather_reference(patches, masked_ids, cls_token, pos_embed)


def _backward_reference(
    d_visible: Tensor, visible_ids: Tensor, num_patches: int, dtype: torch.dtype, cls_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, _, width = d_visible.shape
    d_patches = d_visible.new_zeros((batch, num_patches, width), dtype=dtype)
    d_patches.scatter_(1, visible_ids.long()[..., None].expand(-1, -1, width), d_visible[:, 1:].to(dtype))
    wide = torch.promote_types(d_visible.dtype, torch.float32)
    return d_patches, d_visible[:, :1].sum(0, keepdim=True, dtype=wide).to(cls_dtype)


@triton.jit
def _write_rows(
    out,  # (B * tokens, D)
    patches, ids, cls_token, pos_embed,  # as of the kernel
    first, rows, tokens,  # first row of this tile; B * tokens; tokens of an image in `out`
    num_patches, ids_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows from `first` of out; a row's position is patch + 1, the class token's 0."""
    row = first + tl.arange(0, ROWS)
    image = (row // tokens).to(tl.int64)
    token = row - (row // tokens) * tokens
    from_patch, exists = (row < rows) & (token > 0), row < rows
    column = tl.arange(0, BLOCK)

    patch = tl.load(ids + image * ids_stride + token - 1, mask=from_patch, other=-1).to(tl.int64)
    offset = (image * num_patches + patch)[:, None] * D + column[None, :]
    value = tl.load(patches + offset, mask=from_patch[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    value = tl.where(from_patch[:, None], value, load_vector(cls_token, column, D))

    inside = exists[:, None] & (column < D)[None, :]
    value += tl.load(pos_embed + (patch + 1)[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    patches,  # (B, N, D), contiguous
    visible_ids, masked_ids,  # (B, Nv), (B, Nm) or None, columns side by side
    cls_token, pos_embed,  # (D,), (N + 1, D)
    visible, masked,  # (B, Nv + 1, D), (B, Nm + 1, D)
    batch, num_patches,  # B, N
    visible_tokens, masked_tokens,  # Nv + 1, Nm + 1
    visible_stride, masked_stride,  # of the ids' rows
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,  # a tile's columns and rows
):  # fmt: skip
    program = tl.program_id(0)
    first = program * ROWS
    rows = batch * visible_tokens
    programs = tl.cdiv(rows, ROWS)

    # The first programs write the visible sequence, the others the masked one.
    if program < programs:
        _write_rows(
            out=visible, patches=patches, ids=visible_ids, cls_token=cls_token, pos_embed=pos_embed,
            first=first, rows=rows, tokens=visible_tokens, num_patches=num_patches, ids_stride=visible_stride,
            D=D, BLOCK=BLOCK, ROWS=ROWS,
        )  # fmt: skip
    elif masked_ids is not None:
        first = (program - programs) * ROWS
        rows = batch * masked_tokens
        _write_rows(
            out=masked, patches=patches, ids=masked_ids, cls_token=cls_token, pos_embed=pos_embed,
            first=first, rows=rows, tokens=masked_tokens, num_patches=num_patches, ids_stride=masked_stride,
            D=D, BLOCK=BLOCK, ROWS=ROWS,
        )  # fmt: skip


@triton.jit
def _backward_kernel(
    d_visible, visible_ids,  # (B, Nv + 1, D), contiguous; (B, Nv), columns side by side
    d_patches,  # (B, N, D), contiguous
    num_visible, num_patches, ids_stride,  # Nv, N, stride of the ids' rows
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, IDS: tl.constexpr,  # a tile's columns and rows
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    patch = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = tl.zeros((ROWS,), tl.int32)  # of the patch in d_visible; 0, the class token's, says that it is not there
    for start in range(0, num_visible, IDS):
        index = start + tl.arange(0, IDS)
        ids = tl.load(visible_ids + image * ids_stride + index, mask=index < num_visible, other=-1).to(tl.int32)
        token = tl.maximum(token, tl.max(tl.where(ids[None, :] == patch[:, None], index[None, :] + 1, 0), 1))

    column = tl.arange(0, BLOCK)
    inside = (column < D)[None, :]
    offset = (image * (num_visible + 1) + token)[:, None] * D + column[None, :]
    grad = tl.load(d_visible + offset, mask=(token > 0)[:, None] & inside, other=0.0)
    offset = (image * num_patches + patch)[:, None] * D + column[None, :]
    tl.store(d_patches + offset, grad.to(d_patches.dtype.element_ty), mask=(patch < num_patches)[:, None] & inside)


def _fake(
    patches: Tensor, visible_ids: Tensor, masked_ids: Tensor | None, cls_token: Tensor, pos_embed: Tensor
) -> tuple[Tensor, Tensor]:
    """Room for both sequences, (B, Nv + 1, D) and (B, Nm + 1, D) or nothing, in the wider of the two types."""
    dtype, (batch, _, width) = torch.promote_types(patches.dtype, pos_embed.dtype), patches.shape
    visible = patches.new_empty((batch, visible_ids.shape[1] + 1, width), dtype=dtype)
    masked_shape = (0,) if masked_ids is None else (batch, masked_ids.shape[1] + 1, width)
    return visible, patches.new_empty(masked_shape, dtype=dtype)


def _forward(
    patches: Tensor, visible_ids: Tensor, masked_ids: Tensor | None, cls_token: Tensor, pos_embed: Tensor
) -> tuple[Tensor, Tensor]:
    patches, pos_embed, cls_token = patches.contiguous(), pos_embed.contiguous(), cls_token.contiguous()
    visible_ids, masked_ids = unit_columns(visible_ids), None if masked_ids is None else unit_columns(masked_ids)
    visible, masked = _fake(patches, visible_ids, masked_ids, cls_token, pos_embed)
    batch, num_patches, width = patches.shape
    visible_tokens, masked_tokens = visible.shape[1], 0 if masked_ids is None else masked.shape[1]
    block = block_of(width)
    tile, num_warps = LAUNCH[block]

    programs = triton.cdiv(batch * visible_tokens, tile) + triton.cdiv(batch * masked_tokens, tile)
    _forward_kernel[(programs,)](
        patches=patches, visible_ids=visible_ids, masked_ids=masked_ids, cls_token=cls_token, pos_embed=pos_embed,
        visible=visible, masked=masked, batch=batch, num_patches=num_patches,
        visible_tokens=visible_tokens, masked_tokens=masked_tokens, visible_stride=visible_ids.stride(0),
        masked_stride=0 if masked_ids is None else masked_ids.stride(0),
        D=width, BLOCK=block, ROWS=tile, num_warps=num_warps,
    )  # fmt: skip
    return visible, masked


def _backward(
    d_visible: Tensor, visible_ids: Tensor, num_patches: int, dtype: torch.dtype, cls_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    d_visible, visible_ids = d_visible.contiguous(), unit_columns(visible_ids)
    batch, tokens, width = d_visible.shape
    d_patches = d_visible.new_empty((batch, num_patches, width), dtype=dtype)  # (B, N, D)
    block = block_of(width)
    tile, num_warps = LAUNCH[block]

    _backward_kernel[(batch, triton.cdiv(num_patches, tile))](
        d_visible=d_visible, visible_ids=visible_ids, d_patches=d_patches, num_visible=tokens - 1,
        num_patches=num_patches, ids_stride=visible_ids.stride(0),
        D=width, BLOCK=block, ROWS=tile, IDS=IDS, num_warps=num_warps,
    )  # fmt: skip
    return d_patches, sum_rows(d_visible[None, :, 0], cls_dtype)[None]


def _gradients(back, d_visible: Tensor | None, *saved) -> dict[str, Tensor]:
    if d_visible is None:
        return {}
    d_patches, d_cls_token = back(d_visible, *saved)
    return {"patches": d_patches, "cls_token": d_cls_token}


_gather_tokens = fused_op(
    "gather_tokens",
    run=_forward,
    reference=_forward_reference,
    fake=_fake,
    back=_backward,
    back_reference=_backward_reference,
    save=lambda _, patches, ids, *rest: (ids, patches.shape[1], patches.dtype, rest[1].dtype),
    gradients=_gradients,
    differentiable=1,
)


def gather_tokens(
    patches: Tensor, visible_ids: Tensor, masked_ids: Tensor | None, cls_token: Tensor, pos_embed: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Inputs of the encoder's two passes; the masked one carries no gradient (it only makes alignment targets).

    patches: (B, N, D) patch embeddings; visible_ids (B, Nv), masked_ids (B, Nm) or None: int64 or int32, unique in a
    row; cls_token: (1, 1, D); pos_embed: (N + 1, D), the class token's row first, without gradient.
    Returns (B, Nv + 1, D) and (B, Nm + 1, D) or None, in the wider type of patches and pos_embed. Raises ValueError
    for other shapes and for D above 4096.
    """
    if backend("gather_tokens", patches) == "reference":
        visible = gather_reference(patches, visible_ids, cls_token, pos_embed)
        with torch.no_grad():
            return visible, None if masked_ids is None else gather_reference(patches, masked_ids, cls_token, pos_embed)

    _check(patches, visible_ids, masked_ids, cls_token, pos_embed)
    visible, masked = _gather_tokens(patches, visible_ids, masked_ids, cls_token, pos_embed)
    return visible, None if masked_ids is None else masked.detach()


def _check(patches, visible_ids, masked_ids, cls_token, pos_embed):
    if patches.ndim != 3:
        raise ValueError(f"patches has shape {tuple(patches.shape)}: it must be (B, N, D)")
    batch, num_patches, width = patches.shape
    for name, ids in (("visible_ids", visible_ids), ("masked_ids", masked_ids)):
        if ids is not None and (ids.ndim != 2 or len(ids) != batch):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}: it must be ({batch}, at most {num_patches})")
    if cls_token.shape != (1, 1, width) or pos_embed.shape != (num_patches + 1, width):
        raise ValueError(
            f"cls_token and pos_embed have shapes {tuple(cls_token.shape)} and {tuple(pos_embed.shape)}: with patches "
            f"{tuple(patches.shape)} they must be (1, 1, {width}) and ({num_patches + 1}, {width})"
        )
