"""Self-attention on packed queries, keys and values: out = softmax(scale * q k^T) v, per head.

B batch, N tokens, H heads, C head width. One program per (image, head) reads its queries, keys and values once and
holds the whole score tile (16, 32, 64 or 128 rows) on chip. One token more than a tile (129: 128 patches and a class
token) is done apart, by vector operations, instead of padding to the next tile.

Backward, with P the softmax computed again, dP = dout v^T and delta_i = sum_j P_ij dP_ij:
dS = P * (dP - delta), dq = scale * dS k, dk = scale * dS^T q, dv = P^T dout. delta comes from registers, so neither
the output nor a log-sum-exp is saved; nothing is atomic, so results repeat exactly.

More than 129 tokens, heads wider than 128 and, on a GPU, float32 take torch's scaled_dot_product_attention: `route`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend
from .parts.attention_libraries import library_attention
from .parts.attention_tiles import (
    LOG2E,
    add_rank_one,
    dot_row,
    dot_rows,
    kernels_take,
    load_row,
    load_tile,
    log2_scores,
    most_registers,
    outer,
    scaled,
    split_width,
    store_row,
    store_tile,
    tile_rows,
    weighted,
    weighted_rows,
)
from .parts.registration import fused_op
from .parts.triton_language import tl, triton

MAX_TOKENS = 129
NUM_WARPS = {16: 4, 32: 4, 64: 4, 128: 8}  # by rows of the tile; with 4, 128 rows spill


def attention_reference(qkv: Tensor, scale: float) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, C) each
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)  # (B, N, H, C)


def attention_backward_reference(dout: Tensor, qkv: Tensor, scale: float) -> Tensor:
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    query, key, value = qkv.to(wide).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, C) each
    dout = dout.to(wide).transpose(1, 2)  # (B, H, N, C)

    p = (scale * query @ key.mT).softmax(-1)  # (B, H, N, N)
    dp = dout @ value.mT
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    dqkv = torch.stack((ds @ key, ds.mT @ query, p.mT @ dout))  # (3, B, H, N, C)
    return dqkv.permute(1, 3, 0, 2, 4).to(qkv.dtype)


@triton.jit
def _exponentials(q, k, column, rows, scale, C2: tl.constexpr, EXTRA: tl.constexpr):
    """Unnormalized probabilities of the tile's keys (ROWS, ROWS), of the extra key (ROWS,), and their sums (ROWS,)."""
    scores = log2_scores(q, k, rows, scale, C2)
    top = tl.max(scores, 1)
    if EXTRA:
        top = tl.maximum(top, column)
    p = tl.exp2(scores - top[:, None])
    total = tl.sum(p, 1)
    p_column = total
    if EXTRA:
        p_column = tl.exp2(column - top)
        total += p_column
    return p, p_column, total


@triton.jit
def _extra_softmax(extra_q, k, extra_k, scale, C2: tl.constexpr):
    """Probabilities of the extra token's query: over the tile's keys (ROWS,), and for its own key."""
    line = dot_row(k, extra_q, C2) * (scale * LOG2E)
    corner = dot_rows(extra_q, extra_k, C2) * (scale * LOG2E)
    top = tl.maximum(tl.max(line, 0), corner)
    line, corner = tl.exp2(line - top), tl.exp2(corner - top)
    factor = 1.0 / (tl.sum(line, 0) + corner)
    return line * factor, corner * factor


@triton.jit
def _extra_gradients(p_line, p_corner, extra_g, v, extra_v, scale, C2: tl.constexpr):
    """dS of the extra token's query."""
    line, corner = dot_row(v, extra_g, C2), dot_rows(extra_g, extra_v, C2)
    delta = tl.sum(p_line * line, 0) + p_corner * corner
    return scale * p_line * (line - delta), scale * p_corner * (corner - delta)


@triton.jit
def _forward_kernel(
    qkv,  # (B, N, 3, H, C), columns side by side
    out,  # (B, N, H, C), contiguous
    image, row, part, head,  # strides of qkv: of an image, a token, from query to key to value, of a head
    n, scale,  # N; float32 factor on the scores
    H: tl.constexpr, C: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr,  # blocks of columns
    ROWS: tl.constexpr, EXTRA: tl.constexpr,  # rows of the tile; whether one token is left over
):  # fmt: skip
    batch, number = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    query = qkv + batch * image + number * head
    key, value = query + part, query + 2 * part
    out += (batch * n * H + number) * C
    rows = n - EXTRA
    q = load_tile(query, rows, row, ROWS, C, C1, C2)
    k = load_tile(key, rows, row, ROWS, C, C1, C2)
    v = load_tile(value, rows, row, ROWS, C, C1, C2)

    # The extra token: its own query first, then what its key adds to the tile's queries.
    column = 0.0
    if EXTRA:
        extra_k = load_row(key + rows * row, C, C1, C2)
        column = dot_row(q, extra_k, C2) * (scale * LOG2E)
        p_line, p_corner = _extra_softmax(load_row(query + rows * row, C, C1, C2), k, extra_k, scale, C2)
        extra = weighted_rows(p_line, v, p_corner, load_row(value + rows * row, C, C1, C2), C2)
        store_row(out + rows * H * C, extra, C, C1, C2)

    p, p_column, total = _exponentials(q, k, column, rows, scale, C2, EXTRA)
    result = weighted(p.to(v[0].dtype), v, C2)
    if EXTRA:
        result = add_rank_one(result, p_column, load_row(value + rows * row, C, C1, C2), C2)
    store_tile(out, scaled(result, (1.0 / total)[:, None]), rows, H * C, C, C1, C2)


@triton.jit
def _backward_kernel(
    dout,  # (B, N, H, C), columns side by side
    qkv,  # (B, N, 3, H, C), columns side by side
    dqkv,  # (B, N, 3, H, C), contiguous
    dout_image, dout_row, dout_head,  # strides of dout: of an image, a token, a head
    image, row, part, head,  # strides of qkv: of an image, a token, from query to key to value, of a head
    n, scale,  # N; float32 factor on the scores
    H: tl.constexpr, C: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr,  # blocks of columns
    ROWS: tl.constexpr, EXTRA: tl.constexpr,  # rows of the tile; whether one token is left over
):  # fmt: skip
    batch, number = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    query = qkv + batch * image + number * head
    key, value = query + part, query + 2 * part
    dout += batch * dout_image + number * dout_head
    dquery = dqkv + (batch * n * (3 * H) + number) * C
    dkey, dvalue = dquery + H * C, dquery + 2 * H * C
    rows = n - EXTRA
    q = load_tile(query, rows, row, ROWS, C, C1, C2)
    k = load_tile(key, rows, row, ROWS, C, C1, C2)
    g = load_tile(dout, rows, dout_row, ROWS, C, C1, C2)
    v = load_tile(value, rows, row, ROWS, C, C1, C2)

    # The extra token's query; what its key and value need waits for the tile's probabilities.
    column = 0.0
    if EXTRA:
        extra_q, extra_k = load_row(query + rows * row, C, C1, C2), load_row(key + rows * row, C, C1, C2)
        extra_g, extra_v = load_row(dout + rows * dout_row, C, C1, C2), load_row(value + rows * row, C, C1, C2)
        column, dp_column = dot_row(q, extra_k, C2) * (scale * LOG2E), dot_row(g, extra_v, C2)
        p_line, p_corner = _extra_softmax(extra_q, k, extra_k, scale, C2)
        ds_line, ds_corner = _extra_gradients(p_line, p_corner, extra_g, v, extra_v, scale, C2)
        end = rows * (3 * H * C)
        store_row(dquery + end, weighted_rows(ds_line, k, ds_corner, extra_k, C2), C, C1, C2)
        tl.debug_barrier()  # so that rows and tiles used again are read again, not kept in registers

    p, p_column, total = _exponentials(q, k, column, rows, scale, C2, EXTRA)
    p_column = p_column * (1.0 / total)
    p = p * (1.0 / total)[:, None]

    dv = weighted(tl.trans(p.to(q[0].dtype)), g, C2)
    if EXTRA:
        dv = add_rank_one(dv, p_line, load_row(dout + rows * dout_row, C, C1, C2), C2)
    store_tile(dvalue, dv, rows, 3 * H * C, C, C1, C2)

    dp = outer(g, v, C2)
    delta = tl.sum(p * dp, 1)
    if EXTRA:
        delta += p_column * dp_column
        ds_column = scale * p_column * (dp_column - delta)
    ds = (scale * p * (dp - delta[:, None])).to(q[0].dtype)

    dq = weighted(ds, k, C2)
    if EXTRA:
        dq = add_rank_one(dq, ds_column, load_row(key + rows * row, C, C1, C2), C2)
    store_tile(dquery, dq, rows, 3 * H * C, C, C1, C2)
    dk = weighted(tl.trans(ds), q, C2)
    if EXTRA:
        dk = add_rank_one(dk, ds_line, load_row(query + rows * row, C, C1, C2), C2)
    store_tile(dkey, dk, rows, 3 * H * C, C, C1, C2)

    if EXTRA:
        g, extra_g = load_tile(dout, rows, dout_row, ROWS, C, C1, C2), load_row(dout + rows * dout_row, C, C1, C2)
        store_row(dvalue + end, weighted_rows(p_column, g, p_corner, extra_g, C2), C, C1, C2)
        q, extra_q = load_tile(query, rows, row, ROWS, C, C1, C2), load_row(query + rows * row, C, C1, C2)
        store_row(dkey + end, weighted_rows(ds_column, q, ds_corner, extra_q, C2), C, C1, C2)


def tile_of(n_tokens: int) -> tuple[int, bool]:
    """Rows of the score tile, and whether one token is left over: 99 -> (128, False), 129 -> (128, True)."""
    extra = n_tokens > 16 and (n_tokens - 1).bit_count() == 1
    return tile_rows(n_tokens - extra), extra


def _constants(n_tokens: int, heads: int, width: int) -> dict[str, int]:
    """Constant arguments of both kernels."""
    (first, second), (rows, extra) = split_width(width), tile_of(n_tokens)
    return {"H": heads, "C": width, "C1": first, "C2": second, "ROWS": rows, "EXTRA": extra}


def _forward(qkv: Tensor, scale: float) -> Tensor:
    qkv = qkv if qkv.stride(4) == 1 else qkv.contiguous()
    image, row, part, head, _ = qkv.stride()
    batch, n, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, n, heads, width)
    constants = _constants(n, heads, width)
    rows = constants["ROWS"]

    _forward_kernel[(batch * heads,)](
        qkv=qkv, out=out, image=image, row=row, part=part, head=head, n=n, scale=scale, **constants,
        num_warps=NUM_WARPS[rows], maxnreg=most_registers(rows, split_width(width)),
    )  # fmt: skip
    return out


def _backward(dout: Tensor, qkv: Tensor, scale: float) -> Tensor:
    qkv = qkv if qkv.stride(4) == 1 else qkv.contiguous()
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    dout_image, dout_row, dout_head, _ = dout.stride()
    image, row, part, head, _ = qkv.stride()
    batch, n, _, heads, width = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    constants = _constants(n, heads, width)

    _backward_kernel[(batch * heads,)](
        dout=dout, qkv=qkv, dqkv=dqkv, dout_image=dout_image, dout_row=dout_row, dout_head=dout_head,
        image=image, row=row, part=part, head=head, n=n, scale=scale, **constants,
        num_warps=NUM_WARPS[constants["ROWS"]],
    )  # fmt: skip
    return dqkv


_attention = fused_op(
    "attention",
    run=_forward,
    reference=lambda qkv, scale: attention_reference(qkv, scale).contiguous(),
    fake=lambda qkv, scale: qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:]),
    back=_backward,
    back_reference=attention_backward_reference,
)


def route(n_tokens: int, head_width: int = 64, dtype: torch.dtype = torch.bfloat16) -> str:
    """Where the "triton" backend sends a call: "triton" where the kernels take it, otherwise "sdpa"."""
    return "triton" if n_tokens <= MAX_TOKENS and kernels_take(dtype, head_width) else "sdpa"


def attention(qkv: Tensor, scale: float) -> Tensor:
    """Attention of every token to every token of its image.

    qkv: (B, N, 3, H, C), float; scale: factor on the scores. Returns (B, N, H, C) in qkv's dtype. Raises ValueError
    for another shape.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: it must be (B, N, 3, H, C)")
    chosen = backend("attention", qkv)
    if chosen == "triton" and route(qkv.shape[1], qkv.shape[4], qkv.dtype) == "triton":
        return _attention(qkv, scale)
    if chosen in ("triton", "reference"):
        return attention_reference(qkv, scale)
    query, key, value = qkv.unbind(2)
    return library_attention(chosen, query, key, value, scale)
