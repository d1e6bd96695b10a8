"""The regressor's input norms: LN(x + position) for queries and keys, LN(x) for values, in one read of x.

With a branch, x is the residual stream after its update: x' = x + keep * gamma * branch (as in residual_norm.py).
Queries and keys share statistics and differ in weight and bias. positions: rows `ids` of a table without gradient,
gathered inside. Backward, with N_p and N_v the LayerNorm backwards of hat_p = norm(x' + position), hat_v = norm(x'):
d_x = d_x' + N_p(d_q * weight_q + d_k * weight_k) + N_v(d_v * weight_v), d_branch = keep * gamma * d_x.
B batch, n tokens, N patches, D width, K parameter vectors: weights and biases of k, v, (q), then (gamma).
"""

import torch
from torch import Tensor

from .dispatch import backend, custom_ops_wanted
from .norm_rows import (
    BACKWARD_LAUNCH,
    FORWARD_LAUNCH,
    STAGES,
    block_of,
    check_rows,
    new_gradients,
    sum_rows,
    unit_columns,
)
from .qkv_norm_kernels import backward_kernel, forward_kernel
from .residual_norm import (
    Norm,
    layer_norm_reference,
    normalize_backward_reference,
    residual_reference,
    statistics_reference,
)
from .triton_language import INTERPRETED, triton

QKV = tuple[Tensor | None, Tensor, Tensor]  # inputs of the query, key and value projections, each (B, n, D)
Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x', q, k, v, statistics; nothing in x', q where absent


def qkv_norm_reference(
    x: Tensor, pos_embed: Tensor, ids: Tensor, norm_q: Norm | None, norm_k: Norm, norm_v: Norm, eps: float
) -> QKV:
    positioned = x + pos_embed[ids]  # (B, n, D)
    query = None if norm_q is None else layer_norm_reference(positioned, *norm_q, eps)
    return query, layer_norm_reference(positioned, *norm_k, eps), layer_norm_reference(x, *norm_v, eps)


def _forward_reference(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    pos_embed: Tensor,
    ids: Tensor,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor,
    bias_k: Tensor,
    weight_v: Tensor,
    bias_v: Tensor,
    eps: float,
) -> Forward:
    x_new = x if branch is None or gamma is None else residual_reference(x, branch, gamma, keep)
    norm_q = None if weight_q is None or bias_q is None else (weight_q, bias_q)
    query, key, value = qkv_norm_reference(x_new, pos_embed, ids, norm_q, (weight_k, bias_k), (weight_v, bias_v), eps)
    stats = torch.cat((statistics_reference(x_new + pos_embed[ids], eps), statistics_reference(x_new, eps)))
    out = x.new_empty(0) if branch is None else x_new.contiguous()
    return out, key.new_empty(0) if query is None else query.contiguous(), key.contiguous(), value.contiguous(), stats


def _backward_reference(
    d_x_new: Tensor | None,
    d_q: Tensor | None,
    d_k: Tensor,
    d_v: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    pos_embed: Tensor,
    ids: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor,
    weight_v: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    value = x if branch is None or gamma is None else residual_reference(x, branch, gamma, keep)
    positioned = value + pos_embed[ids]
    d_x, *sums = normalize_backward_reference(d_k, positioned, weight_k, stats[:2])
    for grad, rows, weight, where in ((d_v, value, weight_v, stats[2:]), (d_q, positioned, weight_q, stats[:2])):
        if grad is not None and weight is not None:
            d_rows, *more = normalize_backward_reference(grad, rows, weight, where)
            d_x, sums = d_x + d_rows, [*sums, *more]
    if d_x_new is not None:
        d_x = d_x + d_x_new
    d_branch = x.new_empty(0)
    if branch is not None and gamma is not None:
        d_kept = d_x if keep is None else d_x * keep[:, None, None]
        d_branch = (d_kept * gamma).to(branch.dtype)
        sums.append((d_kept * branch).sum((0, 1)))
    return d_x.to(x.dtype), d_branch, torch.stack(sums).to(weight_k.dtype)


def _new_outputs(x: Tensor, branch: Tensor | None, weight_q: Tensor | None, weight_k: Tensor) -> Forward:
    x_new = x.new_empty(0 if branch is None else x.shape)
    q = weight_k.new_empty(0 if weight_q is None else x.shape)
    k, v = weight_k.new_empty(x.shape), weight_k.new_empty(x.shape)  # (B, n, D)
    return x_new, q, k, v, x.new_empty((4, *x.shape[:2]), dtype=torch.promote_types(x.dtype, torch.float32))


def _forward(x, branch, gamma, keep, pos_embed, ids, weight_q, bias_q, weight_k, bias_k, weight_v, bias_v, eps):
    x, branch = unit_columns(x), None if branch is None else branch.contiguous()
    pos_embed, ids = pos_embed.contiguous(), unit_columns(ids)
    outputs = _new_outputs(x, branch, weight_q, weight_k)
    batch, tokens, width = x.shape
    block = block_of(width)
    tile, num_warps = FORWARD_LAUNCH[block]
    inputs = x, branch, gamma, keep, pos_embed, ids, weight_q, bias_q, weight_k, bias_k, weight_v, bias_v
    sizes = batch * tokens, tokens, x.stride(0), x.stride(1), ids.stride(0), eps, width, block, tile
    forward_kernel[(triton.cdiv(batch * tokens, tile),)](*inputs, *outputs, *sizes, num_warps=num_warps)
    return outputs


def _backward(d_x_new, d_q, d_k, d_v, x, branch, gamma, keep, pos_embed, ids, weight_q, weight_k, weight_v, stats):
    x, pos_embed, ids = unit_columns(x), pos_embed.contiguous(), unit_columns(ids)
    grads = [None if grad is None else grad.contiguous() for grad in (d_x_new, d_q, d_k, d_v)]
    branch = None if branch is None else branch.contiguous()
    d_x, d_branch = new_gradients(x, branch)
    batch, tokens, width = x.shape
    block = block_of(width)
    tile, num_warps, most = BACKWARD_LAUNCH[block]
    programs = min(most, triton.cdiv(batch * tokens, tile))
    partial = x.new_empty((_vectors(branch, weight_q), programs, width), dtype=torch.float32)  # (K, programs, D)
    inputs = x, branch, gamma, keep, pos_embed, ids, weight_q, weight_k, weight_v, stats
    sizes = batch * tokens, tokens, x.stride(0), x.stride(1), ids.stride(0), width, block, tile, STAGES
    backward_kernel[(programs,)](*grads, *inputs, d_x, d_branch, partial, *sizes, num_warps=num_warps)
    return d_x, d_branch, sum_rows(partial, weight_k.dtype)


def _vectors(branch: Tensor | None, weight_q: Tensor | None) -> int:
    return 4 + 2 * (weight_q is not None) + (branch is not None)


_forward_op = torch.library.custom_op("cae::qkv_norm", _forward_reference, mutates_args=())
_backward_op = torch.library.custom_op("cae::qkv_norm_backward", _backward_reference, mutates_args=())
for _device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
    _forward_op.register_kernel(_device, _forward)
    _backward_op.register_kernel(_device, _backward)


@_forward_op.register_fake
def _forward_fake(x, branch, gamma, keep, pos_embed, ids, weight_q, bias_q, weight_k, *rest):
    return _new_outputs(x, branch, weight_q, weight_k)


@_backward_op.register_fake
def _backward_fake(d_x_new, d_q, d_k, d_v, x, branch, gamma, keep, pos_embed, ids, weight_q, weight_k, *rest):
    return *new_gradients(x, branch), weight_k.new_empty((_vectors(branch, weight_q), x.shape[2]))


def _save(ctx, inputs, output):
    x, branch, gamma, keep, pos_embed, ids, weight_q, _, weight_k, _, weight_v, _, _ = inputs
    ctx.save_for_backward(x, branch, gamma, keep, pos_embed, ids, weight_q, weight_k, weight_v, output[4])
    ctx.normed_dtype = output[2].dtype
    ctx.set_materialize_grads(False)  # where x' is not used, no zeros are made and read for it


def _gradients(backward, ctx, d_x_new, *grads):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives each of them once
    x, branch, gamma, _, _, _, weight_q, *_ = saved
    d_q, d_k, d_v = (
        x.new_zeros(x.shape, dtype=ctx.normed_dtype) if grad is None and used else grad
        for grad, used in zip(grads, (weight_q is not None, True, True), strict=True)
    )
    d_q = None if weight_q is None else d_q  # of the empty tensor that stands for no queries
    d_x, d_branch, sums = backward(d_x_new if branch is not None else None, d_q, d_k, d_v, *saved)
    d_norms = (None, None, *sums[:4]) if weight_q is None else (*sums[4:6], *sums[:4])
    if branch is None:
        return d_x, None, None, None, None, None, *d_norms, None
    return d_x, d_branch, sums[-1].to(gamma.dtype), None, None, None, *d_norms, None


_forward_op.register_autograd(
    lambda ctx, d_x_new, d_q, d_k, d_v, d_stats: _gradients(_backward_op, ctx, d_x_new, d_q, d_k, d_v),
    setup_context=_save,
)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output[:4]

    @staticmethod
    def backward(ctx, *grads):
        return _gradients(_backward, ctx, *grads)


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
    return _run(x, None, None, None, pos_embed, ids, norm_q, norm_k, norm_v, eps)[1]


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
    return _run(x, branch, gamma, keep, pos_embed, ids, norm_q, norm_k, norm_v, eps)


def _run(x, branch, gamma, keep, pos_embed, ids, norm_q, norm_k, norm_v, eps):
    query = norm_q or (None, None)
    check_rows(x, branch, keep, (gamma, *query, *norm_k, *norm_v))
    if ids.shape != x.shape[:2] or pos_embed.shape[1:] != x.shape[2:]:
        raise ValueError(
            f"ids and pos_embed have shapes {tuple(ids.shape)} and {tuple(pos_embed.shape)}: with x {tuple(x.shape)} "
            f"they must be {tuple(x.shape[:2])} and (N, {x.shape[2]})"
        )
    apply = _forward_op if custom_ops_wanted() else _Function.apply
    x_new, q, k, v, *_ = apply(x, branch, gamma, keep, pos_embed, ids, *query, *norm_k, *norm_v, eps)
    return x_new, (None if norm_q is None else q, k, v)
