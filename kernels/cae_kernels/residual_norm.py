"""Residual update and the LayerNorm that reads it, in one pass: x' = x + keep * gamma * branch, normed = LN(x').

LN(x) = weight * hat + bias, hat = (x - mean) / sqrt(var + eps), over D. Backward, with g = d_normed, gw = g * weight:
d_x = d_x' + (gw - mean(gw) - hat * mean(gw * hat)) / sqrt(var + eps), d_branch = keep * gamma * d_x,
d_gamma = sum(keep * d_x * branch), d_weight = sum(g * hat), d_bias = sum(g), sums over B and n.
B batch, n tokens, D width, K = 3 parameter vectors (2 without a branch): weight, bias, gamma.
`keep` is drop path's per-sample factor: 0 or 1 / (1 - rate); the branch of a dropped sample is not read.
Statistics and sums are float32 whatever the inputs are. Forward reads x and branch and writes x' and normed; backward
reads both gradients, x and branch (x' is made again: exact where the stored one is rounded) and writes d_x, d_branch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend
from .parts.registration import fused_op
from .parts.rows import (
    BACKWARD_LAUNCH,
    FORWARD_LAUNCH,
    STAGES,
    check_rows,
    dense,
    launch_of,
    load_branch,
    load_vector,
    load_x,
    new_gradients,
    normalize,
    normalize_backward,
    renormalize,
    store_partial,
    sum_rows,
    tile_rows,
    unit_columns,
)
from .parts.triton_language import tl, triton

Norm = tuple[Tensor, Tensor]  # weight (D,), bias (D,)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, weight.dtype)
    normed = F.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), bias.to(wide), eps)
    return normed.to(weight.dtype)


def residual_reference(x: Tensor, branch: Tensor, gamma: Tensor, keep: Tensor | None) -> Tensor:
    scaled = gamma * branch  # (B, n, D)
    return (x + (scaled if keep is None else scaled * keep[:, None, None])).to(x.dtype)


def residual_backward_reference(
    d_x: Tensor, branch: Tensor, gamma: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of branch and gamma."""
    d_kept = d_x if keep is None else d_x * keep[:, None, None]
    return (d_kept * gamma).to(branch.dtype), (d_kept * branch).sum((0, 1))


def residual_norm_reference(
    x: Tensor, branch: Tensor, gamma: Tensor, keep: Tensor | None, norm: Norm, eps: float
) -> tuple[Tensor, Tensor]:
    x_new = residual_reference(x, branch, gamma, keep)
    return x_new, layer_norm_reference(x_new, *norm, eps).to(branch.dtype)


def statistics_reference(value: Tensor, eps: float) -> Tensor:
    """Mean and 1 / sqrt(var + eps) over the last dimension, (2, B, n), at least float32."""
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return torch.stack((value.mean(-1), (value.var(-1, unbiased=False) + eps).rsqrt()))


def normalize_backward_reference(
    d_normed: Tensor, value: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, weight and bias, in the type of stats."""
    mean, rstd = stats[..., None]  # (B, n, 1) each
    hat = (value.to(stats.dtype) - mean) * rstd
    grad = d_normed.to(stats.dtype)
    d_hat = grad * weight
    d_value = (d_hat - d_hat.mean(-1, keepdim=True) - hat * (d_hat * hat).mean(-1, keepdim=True)) * rstd
    return d_value, (grad * hat).sum((0, 1)), grad.sum((0, 1))


class Inputs(NamedTuple):
    x: Tensor  # (B, n, D)
    branch: Tensor | None  # (B, n, D)
    gamma: Tensor | None  # (D,)
    keep: Tensor | None  # (B,)
    weight: Tensor  # (D,)
    bias: Tensor  # (D,)
    eps: float


def _forward_reference(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x, branch, gamma, keep, weight, bias, eps = inputs
    if branch is None or gamma is None:
        return x.new_empty(0), layer_norm_reference(x, weight, bias, eps).contiguous(), statistics_reference(x, eps)
    x_new, normed = residual_norm_reference(x, branch, gamma, keep, (weight, bias), eps)
    return x_new.contiguous(), normed.contiguous(), statistics_reference(x_new, eps)


def _backward_reference(
    d_x_new: Tensor | None, d_normed: Tensor, stats: Tensor, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    x, branch, gamma, keep, weight, _, _ = inputs
    updated = x if branch is None or gamma is None else residual_reference(x, branch, gamma, keep)
    d_x, d_weight, d_bias = normalize_backward_reference(d_normed, updated, weight, stats)
    if d_x_new is not None:
        d_x = d_x + d_x_new
    if branch is None or gamma is None:
        return d_x.to(x.dtype), x.new_empty(0), torch.stack((d_weight, d_bias)).to(weight.dtype)

    d_branch, d_gamma = residual_backward_reference(d_x, branch, gamma, keep)
    return d_x.to(x.dtype), d_branch, torch.stack((d_weight, d_bias, d_gamma)).to(weight.dtype)


@triton.jit
def _forward_kernel(
    x,  # (rows, D), rows spaced anyhow
    branch,  # (rows, D) or None
    gamma, keep,  # (D,), (B,) float32 or None
    weight, bias,  # (D,)
    x_new, normed, stats,  # (rows, D) or empty; (rows, D); (2, rows) float32
    rows, tokens,  # B * n, n
    batch_stride, row_stride,  # of x
    eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,  # a tile's columns and rows
):  # fmt: skip
    row, exists, image = tile_rows(tl.program_id(0) * ROWS, rows, tokens, ROWS)
    column = tl.arange(0, BLOCK)
    inside = exists[:, None] & (column < D)[None, :]
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    value = load_x(x, row, image, tokens, batch_stride, row_stride, column, inside)

    if branch is not None:
        branch_value, kept = load_branch(branch, keep, offset, image, exists, inside)
        value += kept * load_vector(gamma, column, D) * branch_value
        tl.store(x_new + offset, value.to(x_new.dtype.element_ty), mask=inside)

    hat, mean, rstd = normalize(value, inside, eps, D)
    out = hat * load_vector(weight, column, D) + load_vector(bias, column, D)
    tl.store(normed + offset, out.to(normed.dtype.element_ty), mask=inside)
    tl.store(stats + row, mean, mask=exists)
    tl.store(stats + rows + row, rstd, mask=exists)


@triton.jit
def _backward_kernel(
    d_x_new, d_normed,  # (rows, D) or None; (rows, D)
    x,  # (rows, D), rows spaced anyhow
    branch,  # (rows, D) or None
    gamma, keep,  # (D,), (B,) float32 or None
    weight, stats,  # (D,); (2, rows) float32
    d_x, d_branch,  # (rows, D); (rows, D) or empty
    partial,  # (K, programs, D) float32
    rows, tokens,  # B * n, n
    batch_stride, row_stride,  # of x
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,  # a tile's columns and rows
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    scale = load_vector(weight, column, D)
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    if branch is not None:
        layer_scale = load_vector(gamma, column, D)
        d_gamma = tl.zeros((ROWS, BLOCK), tl.float32)

    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row, exists, image = tile_rows(first, rows, tokens, ROWS)
        inside = exists[:, None] & (column < D)[None, :]
        offset = row.to(tl.int64)[:, None] * D + column[None, :]
        value = load_x(x, row, image, tokens, batch_stride, row_stride, column, inside)
        if branch is not None:
            branch_value, kept = load_branch(branch, keep, offset, image, exists, inside)
            value += kept * layer_scale * branch_value

        grad = tl.load(d_normed + offset, mask=inside, other=0.0).to(tl.float32)
        hat, rstd = renormalize(value, stats, row, rows, exists)
        d_weight += grad * hat
        d_bias += grad

        total = normalize_backward(grad * scale, hat, rstd, D)
        if d_x_new is not None:
            total += tl.load(d_x_new + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + offset, total.to(d_x.dtype.element_ty), mask=inside)
        if branch is not None:
            total *= kept
            d_gamma += total * branch_value
            tl.store(d_branch + offset, (total * layer_scale).to(d_branch.dtype.element_ty), mask=inside)

    store_partial(partial, 0, d_weight, column, D)
    store_partial(partial, 1, d_bias, column, D)
    if branch is not None:
        store_partial(partial, 2, d_gamma, column, D)


def _fake(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the new residual stream (nothing without a branch), the normed rows and (2, B, n) statistics."""
    x, branch = inputs.x, inputs.branch
    x_new = x.new_empty(0 if branch is None else x.shape)
    normed = x.new_empty(x.shape, dtype=(inputs.weight if branch is None else branch).dtype)  # (B, n, D)
    return x_new, normed, x.new_empty((2, *x.shape[:2]), dtype=torch.promote_types(x.dtype, torch.float32))


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    inputs = inputs._replace(x=unit_columns(inputs.x), branch=dense(inputs.branch))
    x_new, normed, stats = _fake(inputs)
    programs, arguments = launch_of(inputs.x, FORWARD_LAUNCH)
    _forward_kernel[(programs,)](**inputs._asdict(), x_new=x_new, normed=normed, stats=stats, **arguments)
    return x_new, normed, stats


def _backward(d_x_new: Tensor | None, d_normed: Tensor, stats: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    x, branch, gamma, keep, weight, _, _ = inputs
    x, branch = unit_columns(x), dense(branch)
    d_x, d_branch = new_gradients(x, branch)
    programs, arguments = launch_of(x, BACKWARD_LAUNCH)
    partial = x.new_empty((2 if branch is None else 3, programs, x.shape[2]), dtype=torch.float32)  # (K, programs, D)

    _backward_kernel[(programs,)](
        d_x_new=dense(d_x_new), d_normed=d_normed.contiguous(), x=x, branch=branch, gamma=gamma, keep=keep,
        weight=weight, stats=stats, d_x=d_x, d_branch=d_branch, partial=partial, STAGES=STAGES, **arguments,
    )  # fmt: skip
    return d_x, d_branch, sum_rows(partial, weight.dtype)


def _gradients(back, d_x_new, d_normed, stats, inputs: Inputs) -> dict[str, Tensor]:
    branch = inputs.branch
    if d_normed is None:
        dtype = (inputs.weight if branch is None else branch).dtype
        d_normed = inputs.x.new_zeros(inputs.x.shape, dtype=dtype)
    d_x, d_branch, sums = back(None if branch is None else d_x_new, d_normed, stats, *inputs)

    found = {"x": d_x, "weight": sums[0], "bias": sums[1]}
    if branch is not None and inputs.gamma is not None:
        found |= {"branch": d_branch, "gamma": sums[2].to(inputs.gamma.dtype)}
    return found


_residual_norm = fused_op(
    "residual_norm",
    run=_forward,
    reference=_forward_reference,
    fake=_fake,
    back=_backward,
    back_reference=_backward_reference,
    save=lambda outputs, *inputs: (outputs[2], *inputs),
    gradients=_gradients,
    differentiable=2,
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension. x: (B, n, D); weight, bias: (D,). Returns (B, n, D) in weight's dtype."""
    chosen = backend("layer_norm", x)
    if chosen == "reference":
        return layer_norm_reference(x, weight, bias, eps)

    if chosen == "liger":
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(x, weight, bias, eps).to(weight.dtype)
    if chosen == "apex":
        from apex.normalization.fused_layer_norm import mixed_dtype_fused_layer_norm_affine

        return mixed_dtype_fused_layer_norm_affine(x, weight, bias, weight.shape, eps)

    check_rows(x, None, None, (weight, bias))
    inputs = Inputs(x=x, branch=None, gamma=None, keep=None, weight=weight, bias=bias, eps=eps)
    return _residual_norm(*inputs)[1]


def residual_norm(
    x: Tensor, branch: Tensor, gamma: Tensor, keep: Tensor | None, norm: Norm, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a scaled branch to the residual stream and normalize the sum.

    x, branch: (B, n, D), x's rows spaced anyhow; gamma: LayerScale (D,); keep: (B,) float32 or None; norm: weight and
    bias (D,). x may be float32 where the branch is bfloat16. Returns the new residual stream in x's dtype and its
    LayerNorm in the branch's, both (B, n, D). Raises ValueError for other shapes and for D above 4096.
    """
    if backend("residual_norm", x) == "reference":
        return residual_norm_reference(x, branch, gamma, keep, norm, eps)
    check_rows(x, branch, keep, (gamma, *norm))
    inputs = Inputs(x=x, branch=branch, gamma=gamma, keep=keep, weight=norm[0], bias=norm[1], eps=eps)
    return _residual_norm(*inputs)[:2]
