"""Kernels of qkv_norm.py, where formulas and shapes are; rows `ids` of the table of positions are gathered inside."""

from .norm_rows import (
    load_branch,
    load_vector,
    load_x,
    normalize,
    normalize_backward,
    renormalize,
    store_partial,
    tile_rows,
)
from .triton_language import tl, triton


@triton.jit
def _load_position(pos_embed, ids, row, image, tokens, ids_stride, column, exists, inside, D: tl.constexpr):
    patch = tl.load(ids + image.to(tl.int64) * ids_stride + (row - image * tokens), mask=exists, other=0)
    return tl.load(pos_embed + patch.to(tl.int64)[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_affine(out, offset, hat, weight, bias, column, inside, D: tl.constexpr):
    value = hat * load_vector(weight, column, D) + load_vector(bias, column, D)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    x, branch, gamma, keep, pos_embed, ids, weight_q, bias_q, weight_k, bias_k, weight_v, bias_v, x_new, q, k, v,
    stats, rows, tokens, batch_stride, row_stride, ids_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, exists, image = tile_rows(tl.program_id(0) * ROWS, rows, tokens, ROWS)
    column = tl.arange(0, BLOCK)
    inside = exists[:, None] & (column < D)[None, :]
    offset = row.to(tl.int64)[:, None] * D + column[None, :]
    value = load_x(x, row, image, tokens, batch_stride, row_stride, column, inside)
    position = _load_position(pos_embed, ids, row, image, tokens, ids_stride, column, exists, inside, D)
    if branch is not None:
        branch_value, kept = load_branch(branch, keep, offset, image, exists, inside)
        value += kept * load_vector(gamma, column, D) * branch_value
        tl.store(x_new + offset, value.to(x_new.dtype.element_ty), mask=inside)
    hat, mean, rstd = normalize(value + position, inside, eps, D)
    _store_affine(k, offset, hat, weight_k, bias_k, column, inside, D)
    if weight_q is not None:
        _store_affine(q, offset, hat, weight_q, bias_q, column, inside, D)
    tl.store(stats + row, mean, mask=exists)
    tl.store(stats + rows + row, rstd, mask=exists)
    hat, mean, rstd = normalize(value, inside, eps, D)
    _store_affine(v, offset, hat, weight_v, bias_v, column, inside, D)
    tl.store(stats + 2 * rows + row, mean, mask=exists)
    tl.store(stats + 3 * rows + row, rstd, mask=exists)


@triton.jit
def backward_kernel(
    d_x_new, d_q, d_k, d_v, x, branch, gamma, keep, pos_embed, ids, weight_q, weight_k, weight_v, stats, d_x, d_branch,
    partial, rows, tokens, batch_stride, row_stride, ids_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    d_weight_k = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias_k = tl.zeros((ROWS, BLOCK), tl.float32)
    d_weight_v = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias_v = tl.zeros((ROWS, BLOCK), tl.float32)
    if d_q is not None:
        d_weight_q = tl.zeros((ROWS, BLOCK), tl.float32)
        d_bias_q = tl.zeros((ROWS, BLOCK), tl.float32)
    if branch is not None:
        d_gamma = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row, exists, image = tile_rows(first, rows, tokens, ROWS)
        inside = exists[:, None] & (column < D)[None, :]
        offset = row.to(tl.int64)[:, None] * D + column[None, :]
        value = load_x(x, row, image, tokens, batch_stride, row_stride, column, inside)
        if branch is not None:
            branch_value, kept = load_branch(branch, keep, offset, image, exists, inside)
            value += kept * load_vector(gamma, column, D) * branch_value
        position = _load_position(pos_embed, ids, row, image, tokens, ids_stride, column, exists, inside, D)

        grad = tl.load(d_v + offset, mask=inside, other=0.0).to(tl.float32)
        hat, rstd = renormalize(value, stats + 2 * rows, row, rows, exists)
        d_weight_v += grad * hat
        d_bias_v += grad
        total = normalize_backward(grad * load_vector(weight_v, column, D), hat, rstd, D)

        grad = tl.load(d_k + offset, mask=inside, other=0.0).to(tl.float32)
        hat, rstd = renormalize(value + position, stats, row, rows, exists)
        d_weight_k += grad * hat
        d_bias_k += grad
        d_hat = grad * load_vector(weight_k, column, D)
        if d_q is not None:
            grad = tl.load(d_q + offset, mask=inside, other=0.0).to(tl.float32)
            d_weight_q += grad * hat
            d_bias_q += grad
            d_hat += grad * load_vector(weight_q, column, D)
        total += normalize_backward(d_hat, hat, rstd, D)

        if d_x_new is not None:
            total += tl.load(d_x_new + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + offset, total.to(d_x.dtype.element_ty), mask=inside)
        if branch is not None:
            total *= kept
            d_gamma += total * branch_value
            total *= load_vector(gamma, column, D)
            tl.store(d_branch + offset, total.to(d_branch.dtype.element_ty), mask=inside)
    store_partial(partial, 0, d_weight_k, column, D)
    store_partial(partial, 1, d_bias_k, column, D)
    store_partial(partial, 2, d_weight_v, column, D)
    store_partial(partial, 3, d_bias_v, column, D)
    if d_q is not None:
        store_partial(partial, 4, d_weight_q, column, D)
        store_partial(partial, 5, d_bias_q, column, D)
    if branch is not None:
        store_partial(partial, 4 if d_q is None else 6, d_gamma, column, D)
