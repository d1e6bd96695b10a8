"""The regressor's input norms: LN(x + position) for queries and keys, LN(x) for values, in one read of x.

With a branch, x is the residual stream after its update: x' = x + keep * gamma * branch (as in residual_norm.py).
Queries and keys share statistics and differ in weight and bias. positions: rows `ids` of a table without gradient,
gathered inside. Backward, with N_p and N_v the LayerNorm backwards of hat_p = norm(x' + position), hat_v = norm(x'):
d_x = d_x' + N_p(d_q * weight_q + d_k * weight_k) + N_v(d_v * weight_v), d_branch = keep * gamma * d_x.
B batch, n tokens, N patches, D width, K parameter vectors: weights and biases of k, v, (q), then (gamma).
"""

from typing import NamedTuple

import torch
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
from .residual_norm import (
    Norm,
    layer_norm_reference,
    normalize_backward_reference,
    residual_backward_reference,
    residual_reference,
    statistics_reference,
)

QKV = tuple[Tensor | None, Tensor, Tensor]  # inputs of the query, key and value projections, each (B, n, D)
Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x', q, k, v, statistics; nothing in x', q where absent


class Inputs(NamedTuple):
    x: Tensor  # (B, n, D), rows spaced anyhow
    branch: Tensor | None  # (B, n, D)
    gamma: Tensor | None  # (D,)
    keep: Tensor | None  # (B,) float32
    pos_embed: Tensor  # (N, D)
    ids: Tensor  # (B, n) int64 or int32, rows of pos_embed
    weight_q: Tensor | None  # (D,), as all that follow
    bias_q: Tensor | None
    weight_k: Tensor
    bias_k: Tensor
    weight_v: Tensor
    bias_v: Tensor
    eps: float


def qkv_norm_reference(
    x: Tensor, pos_embed: Tensor, ids: Tensor, norm_q: Norm | None, norm_k: Norm, norm_v: Norm, eps: float
) -> QKV:
    positioned = x + pos_embed[ids]  # (B, n, D)
    query = None if norm_q is None else layer_norm_reference(positioned, *norm_q, eps)
    return query, layer_norm_reference(positioned, *norm_k, eps), layer_norm_reference(x, *norm_v, eps)


def _forward_reference(inputs: Inputs) -> Forward:
    x, branch, gamma, keep, pos_embed, ids, weight_q, bias_q, *_, eps = inputs
    x_new = x if branch is None or gamma is None else residual_reference(x, branch, gamma, keep)
    norm_q = None if weight_q is None or bias_q is None else (weight_q, bias_q)
    norm_k, norm_v = (inputs.weight_k, inputs.bias_k), (inputs.weight_v, inputs.bias_v)
    query, key, value = qkv_norm_reference(x_new, pos_embed, ids, norm_q, norm_k, norm_v, eps)

    stats = torch.cat((statistics_reference(x_new + pos_embed[ids], eps), statistics_reference(x_new, eps)))
    out = x.new_empty(0) if branch is None else x_new.contiguous()
    return out, key.new_empty(0) if query is None else query.contiguous(), key.contiguous(), value.contiguous(), stats


def _backward_reference(
    d_x_new: Tensor | None, d_q: Tensor | None, d_k: Tensor, d_v: Tensor, stats: Tensor, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    x, branch, gamma, keep, pos_embed, ids, weight_q, *_ = inputs
    value = x if branch is None or gamma is None else residual_reference(x, branch, gamma, keep)
    positioned = value + pos_embed[ids]

    d_x, *sums = normalize_backward_reference(d_k, positioned, inputs.weight_k, stats[:2])
    for grad, rows, weight, where in ((d_v, value, inputs.weight_v, stats[2:]), (d_q, positioned, weight_q, stats[:2])):
        if grad is not None and weight is not None:
            d_rows, *more = normalize_backward_reference(grad, rows, weight, where)
            d_x, sums = d_x + d_rows, [*sums, *more]
    if d_x_new is not None:
        d_x = d_x + d_x_new

    d_branch = x.new_empty(0)
    if branch is not None and gamma is not None:
        d_branch, d_gamma = residual_backward_reference(d_x, branch, gamma, keep)
        sums.append(d_gamma)
    return d_x.to(x.dtype), d_branch, torch.stack(sums).to(inputs.weight_k.dtype)


@triton.jit
def _load_position(pos_embed, ids, row, image, tokens, ids_stride, column, exists, inside, D: tl.constexpr):
    patch = tl.load(ids + image.to(tl.int64) * ids_stride + (row - image * tokens), mask=exists, other=0)
    return tl.load(pos_embed + patch.to(tl.int64)[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_affine(out, offset, hat, weight, bias, column, inside, D: tl.constexpr):
    value = hat * load_vector(weight, column, D) + load_vector(bias, column, D)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    x,  # (rows, D), rows spaced anyhow
    branch,  # (rows, D) or None
    gamma, keep,  # (D,), (B,) float32 or None
    pos_embed, ids,  # (N, D); (B, n), rows spaced anyhow
    weight_q, bias_q, weight_k, bias_k, weight_v, bias_v,  # (D,); those of the query may be None
    x_new, q, k, v,  # (rows, D); x_new and q may be empty
    stats,  # (4, rows) float32: mean and 1 / std of x' + position and of x'
    rows, tokens,  # B * n, n
    batch_stride, row_stride, ids_stride,  # of x; of ids
    eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,  # a tile's columns and rows
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
def _backward_kernel(
    d_x_new, d_q, d_k, d_v,  # (rows, D); the first two may be None
    x,  # (rows, D), rows spaced anyhow
    branch,  # (rows, D) or None
    gamma, keep,  # (D,), (B,) float32 or None
    pos_embed, ids,  # (N, D); (B, n), rows spaced anyhow
    weight_q, weight_k, weight_v,  # (D,); that of the query may be None
    stats,  # (4, rows) float32
    d_x, d_branch,  # (rows, D); (rows, D) or empty
    partial,  # (K, programs, D) float32
    rows, tokens,  # B * n, n
    batch_stride, row_stride, ids_stride,  # of x; of ids
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,  # a tile's columns and rows
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


def _fake(inputs: Inputs) -> Forward:
    x, weight = inputs.x, inputs.weight_k
    x_new = x.new_empty(0 if inputs.branch is None else x.shape)
    q = weight.new_empty(0 if inputs.weight_q is None else x.shape)
    k, v = weight.new_empty(x.shape), weight.new_empty(x.shape)  # (B, n, D)
    return x_new, q, k, v, x.new_empty((4, *x.shape[:2]), dtype=torch.promote_types(x.dtype, torch.float32))


def _readable(inputs: Inputs) -> Inputs:
    pos_embed, ids = inputs.pos_embed.contiguous(), unit_columns(inputs.ids)
    return inputs._replace(x=unit_columns(inputs.x), branch=dense(inputs.branch), pos_embed=pos_embed, ids=ids)


def _forward(inputs: Inputs) -> Forward:
    inputs = _readable(inputs)
    x_new, q, k, v, stats = _fake(inputs)
    programs, arguments = launch_of(inputs.x, FORWARD_LAUNCH)
    _forward_kernel[(programs,)](
        **inputs._asdict(), x_new=x_new, q=q, k=k, v=v, stats=stats, ids_stride=inputs.ids.stride(0), **arguments
    )
    return x_new, q, k, v, stats


def _backward(
    d_x_new: Tensor | None, d_q: Tensor | None, d_k: Tensor, d_v: Tensor, stats: Tensor, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = _readable(inputs)
    x, branch, gamma, keep, pos_embed, ids, weight_q, *_ = inputs
    d_x, d_branch = new_gradients(x, branch)
    programs, arguments = launch_of(x, BACKWARD_LAUNCH)
    vectors = 4 + 2 * (weight_q is not None) + (branch is not None)
    partial = x.new_empty((vectors, programs, x.shape[2]), dtype=torch.float32)  # (K, programs, D)

    _backward_kernel[(programs,)](
        d_x_new=dense(d_x_new), d_q=dense(d_q), d_k=dense(d_k), d_v=dense(d_v), x=x, branch=branch, gamma=gamma,
        keep=keep, pos_embed=pos_embed, ids=ids, weight_q=weight_q, weight_k=inputs.weight_k,
        weight_v=inputs.weight_v, stats=stats, d_x=d_x, d_branch=d_branch, partial=partial,
        ids_stride=ids.stride(0), STAGES=STAGES, **arguments,
    )  # fmt: skip
    return d_x, d_branch, sum_rows(partial, inputs.weight_k.dtype)


def _gradients(back, d_x_new, d_q, d_k, d_v, stats, inputs: Inputs) -> dict[str, Tensor]:
    def made(grad: Tensor | None) -> Tensor:
        return inputs.x.new_zeros(inputs.x.shape, dtype=inputs.weight_k.dtype) if grad is None else grad

    # Gradients of the empty tensors that stand for no new residual stream and no queries are not used.
    d_x_new, d_q = None if inputs.branch is None else d_x_new, None if inputs.weight_q is None else made(d_q)
    d_x, d_branch, sums = back(d_x_new, d_q, made(d_k), made(d_v), stats, *inputs)

    found = {"x": d_x, "weight_k": sums[0], "bias_k": sums[1], "weight_v": sums[2], "bias_v": sums[3]}
    if inputs.weight_q is not None:
        found |= {"weight_q": sums[4], "bias_q": sums[5]}
    if inputs.branch is not None and inputs.gamma is not None:
        found |= {"branch": d_branch, "gamma": sums[-1].to(inputs.gamma.dtype)}
    return found


_qkv_norm = fused_op(
    "qkv_norm",
    run=_forward,
    reference=_forward_reference,
    fake=_fake,
    back=_backward,
    back_reference=_backward_reference,
    save=lambda outputs, *inputs: (outputs[4], *inputs),
    gradients=_gradients,
    differentiable=4,
)


def norm_qkv(
    x: Tensor, pos_embed: Tensor, ids: Tensor, norm_q: Norm | None, norm_k: Norm, norm_v: Norm, eps: float
) -> QKV:
    """The regressor's input norms: of x + position for queries and keys, of x for values.

    x: (B, n, D), rows spaced anyhow; pos_embed: (N, D) table without gradient; ids: (B, n) rows of it, int64 or int32;
    norm_q: None where no queries are made. Returns inputs of the query, key and value projections, each (B, n, D), in
    the norms' dtype. Raises ValueError for other shapes and for D above 4096.
    """
    if backend("residual_norm", x) == "reference":
        return qkv_norm_reference(x, pos_embed, ids, norm_q, norm_k, norm_v, eps)
    return _run(x, None, None, None, pos_embed=pos_embed, ids=ids, norms=(norm_q, norm_k, norm_v), eps=eps)[1]


def residual_norm_qkv(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor,
    keep: Tensor | None,
    pos_embed: Tensor,
    ids: Tensor,
    norm_q: Norm | None,
    norm_k: Norm,
    norm_v: Norm,
    eps: float,
) -> tuple[Tensor, QKV]:
    """`residual_norm`'s update followed by `norm_qkv`'s norms of the new residual stream.

    Shapes and types as there. Returns the new residual stream (B, n, D) and the three norms.
    """
    if backend("residual_norm", x) == "reference":
        x_new = residual_reference(x, branch, gamma, keep)
        return x_new, qkv_norm_reference(x_new, pos_embed, ids, norm_q, norm_k, norm_v, eps)
    return _run(x, branch, gamma, keep, pos_embed=pos_embed, ids=ids, norms=(norm_q, norm_k, norm_v), eps=eps)


def _run(x, branch, gamma, keep, *, pos_embed, ids, norms, eps):
    norm_q, (weight_k, bias_k), (weight_v, bias_v) = norms
    weight_q, bias_q = norm_q or (None, None)
    check_rows(x, branch, keep, (gamma, weight_q, bias_q, weight_k, bias_k, weight_v, bias_v))
    if ids.shape != x.shape[:2] or pos_embed.shape[1:] != x.shape[2:]:
        raise ValueError(
            f"ids and pos_embed have shapes {tuple(ids.shape)} and {tuple(pos_embed.shape)}: with x {tuple(x.shape)} "
            f"they must be {tuple(x.shape[:2])} and (N, {x.shape[2]})"
        )

    inputs = Inputs(
        x=x, branch=branch, gamma=gamma, keep=keep, pos_embed=pos_embed, ids=ids, weight_q=weight_q, bias_q=bias_q,
        weight_k=weight_k, bias_k=bias_k, weight_v=weight_v, bias_v=bias_v, eps=eps,
    )  # fmt: skip
    x_new, q, k, v, _ = _qkv_norm(*inputs)
    return x_new, (None if weight_q is None else q, k, v)
