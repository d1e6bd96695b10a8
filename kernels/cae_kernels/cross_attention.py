"""Cross-attention of masked queries to two sources of keys and values, without concatenating their inputs.

out = softmax(scale * q [k_visible ; k_masked]^T) [v_visible ; v_masked], per head.
B batch, Nv visible, Nm masked, H heads, C head width. One program per (image, head) reads everything once; each source
is read where it is, so nothing is concatenated and 98 + 98 keys are not padded to one tile of 256.
The forward takes keys in chunks of 64, one source after the other, and rescales what it has when a chunk's scores are
larger: so two programs fit on a processor. The backward is that of attention.py with one tile for each source and
delta_i = sum over both sources of P_ij dP_ij.

More than 128 visible or masked tokens, heads wider than 128 and, on a GPU, float32 take torch's
scaled_dot_product_attention on concatenated keys and values: `route`. So do the backends of other libraries.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend
from .parts.attention_libraries import library_attention
from .parts.attention_tiles import (
    kernels_take,
    load_tile,
    log2_scores,
    most_registers,
    outer,
    scaled,
    split_width,
    store_tile,
    tile_rows,
    weighted,
    weighted_sum,
    zero_tile,
)
from .parts.registration import fused_op
from .parts.triton_language import tl, triton

MAX_TOKENS = 128
NUM_WARPS = {16: 4, 32: 4, 64: 4, 128: 8}  # by rows of the largest tile
KEYS, STAGES = 64, 3  # forward: keys in a chunk; with 3 stages both chunks of a source are on their way together
Source = tuple[Tensor, Tensor]


def cross_attention_reference(query: Tensor, visible: Source, masked: Source, scale: float) -> Tensor:
    key = torch.cat((visible[0], masked[0]), 1).transpose(1, 2)  # (B, H, Nv + Nm, C)
    value = torch.cat((visible[1], masked[1]), 1).transpose(1, 2)  # (B, H, Nv + Nm, C)
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, scale=scale).transpose(1, 2)


def cross_attention_backward_reference(
    dout: Tensor, query: Tensor, k_visible: Tensor, v_visible: Tensor, k_masked: Tensor, v_masked: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    dout, query = (x.to(wide).transpose(1, 2) for x in (dout, query))  # (B, H, Nm, C) each
    key = torch.cat((k_visible, k_masked), 1).to(wide).transpose(1, 2)  # (B, H, Nv + Nm, C)
    value = torch.cat((v_visible, v_masked), 1).to(wide).transpose(1, 2)

    p = (scale * query @ key.mT).softmax(-1)  # (B, H, Nm, Nv + Nm)
    dp = dout @ value.mT
    ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
    dq, dk, dv = ds @ key, ds.mT @ query, p.mT @ dout

    sizes = (k_visible.shape[1], k_masked.shape[1])
    dq, dk, dv = (x.transpose(1, 2).to(k_visible.dtype) for x in (dq, dk, dv))
    (dk_visible, dk_masked), (dv_visible, dv_masked) = (
        [part.clone(memory_format=torch.contiguous_format) for part in x.split(sizes, 1)] for x in (dk, dv)
    )
    return dq, dk_visible, dv_visible, dk_masked, dv_masked


@triton.jit
def _attend(result, top, total, q, k, v, n_keys, scale, C2: tl.constexpr):
    """Softmax over the keys so far and one chunk more: what there was shrinks where the chunk's scores are higher."""
    scores = log2_scores(q, k, n_keys, scale, C2)
    higher = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - higher)
    p = tl.exp2(scores - higher[:, None])
    result = weighted_sum(scaled(result, shrink[:, None]), p.to(v[0].dtype), v, C2)
    return result, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def _forward_kernel(
    query,  # (B, Nm, H, C), columns side by side, as of all inputs
    k_visible, v_visible,  # (B, Nv, H, C), the same strides
    k_masked, v_masked,  # (B, Nm, H, C), the same strides
    out,  # (B, Nm, H, C), contiguous
    query_image, query_row, query_head,  # strides of query: of an image, a token, a head
    visible_image, visible_row, visible_head,  # of k_visible and v_visible
    masked_image, masked_row, masked_head,  # of k_masked and v_masked
    n_visible, n_masked, scale,  # Nv, Nm; float32 factor on the scores
    H: tl.constexpr, C: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr,  # blocks of columns
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,  # queries of the tile, keys of a chunk
):  # fmt: skip
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    visible = batch * visible_image + head * visible_head
    masked = batch * masked_image + head * masked_head
    q = load_tile(query + batch * query_image + head * query_head, n_masked, query_row, ROWS, C, C1, C2)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = zero_tile(ROWS, C1, C2)
    for start in tl.range(0, n_visible, KEYS, num_stages=STAGES):
        rows, first = n_visible - start, visible + start * visible_row
        k = load_tile(k_visible + first, rows, visible_row, KEYS, C, C1, C2)
        v = load_tile(v_visible + first, rows, visible_row, KEYS, C, C1, C2)
        result, top, total = _attend(result, top, total, q, k, v, rows, scale, C2)
    for start in tl.range(0, n_masked, KEYS, num_stages=STAGES):
        rows, first = n_masked - start, masked + start * masked_row
        k = load_tile(k_masked + first, rows, masked_row, KEYS, C, C1, C2)
        v = load_tile(v_masked + first, rows, masked_row, KEYS, C, C1, C2)
        result, top, total = _attend(result, top, total, q, k, v, rows, scale, C2)

    out += (batch * n_masked * H + head) * C
    store_tile(out, scaled(result, (1.0 / total)[:, None]), n_masked, H * C, C, C1, C2)


@triton.jit
def _backward_kernel(
    dout,  # (B, Nm, H, C)
    query,  # (B, Nm, H, C), columns side by side, as of all inputs
    k_visible, v_visible,  # (B, Nv, H, C), the same strides
    k_masked, v_masked,  # (B, Nm, H, C), the same strides
    d_query, dk_visible, dv_visible, dk_masked, dv_masked,  # shaped like the inputs, contiguous
    dout_image, dout_row, dout_head,  # strides of dout: of an image, a token, a head
    query_image, query_row, query_head,  # of query
    visible_image, visible_row, visible_head,  # of k_visible and v_visible
    masked_image, masked_row, masked_head,  # of k_masked and v_masked
    n_visible, n_masked, scale,  # Nv, Nm; float32 factor on the scores
    H: tl.constexpr, C: tl.constexpr,
    C1: tl.constexpr, C2: tl.constexpr,  # blocks of columns
    ROWS: tl.constexpr, VISIBLE: tl.constexpr,  # rows of the masked and of the visible tile
):  # fmt: skip
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    visible = batch * visible_image + head * visible_head
    masked = batch * masked_image + head * masked_head
    to_visible = (batch * n_visible * H + head) * C
    to_masked = (batch * n_masked * H + head) * C
    q = load_tile(query + batch * query_image + head * query_head, n_masked, query_row, ROWS, C, C1, C2)
    k = load_tile(k_visible + visible, n_visible, visible_row, VISIBLE, C, C1, C2)
    k_second = load_tile(k_masked + masked, n_masked, masked_row, ROWS, C, C1, C2)
    g = load_tile(dout + batch * dout_image + head * dout_head, n_masked, dout_row, ROWS, C, C1, C2)
    v = load_tile(v_visible + visible, n_visible, visible_row, VISIBLE, C, C1, C2)
    v_second = load_tile(v_masked + masked, n_masked, masked_row, ROWS, C, C1, C2)
    kind = q[0].dtype

    # Probabilities over the keys of both sources.
    p = log2_scores(q, k, n_visible, scale, C2)
    p_second = log2_scores(q, k_second, n_masked, scale, C2)
    top = tl.maximum(tl.max(p, 1), tl.max(p_second, 1))[:, None]
    p, p_second = tl.exp2(p - top), tl.exp2(p_second - top)
    factor = (1.0 / (tl.sum(p, 1) + tl.sum(p_second, 1)))[:, None]
    p, p_second = p * factor, p_second * factor

    dv = weighted(tl.trans(p.to(kind)), g, C2)
    store_tile(dv_visible + to_visible, dv, n_visible, H * C, C, C1, C2)
    dv = weighted(tl.trans(p_second.to(kind)), g, C2)
    store_tile(dv_masked + to_masked, dv, n_masked, H * C, C, C1, C2)

    delta = tl.sum(p * outer(g, v, C2), 1)
    dp = outer(g, v_second, C2)
    delta = (delta + tl.sum(p_second * dp, 1))[:, None]

    ds = (p_second * (dp - delta)).to(kind)
    dq = weighted(ds, k_second, C2)
    dk = scaled(weighted(tl.trans(ds), q, C2), scale)
    store_tile(dk_masked + to_masked, dk, n_masked, H * C, C, C1, C2)

    # Read and multiplied again: dP of both sources at once would not fit in registers.
    v = load_tile(v_visible + visible, n_visible, visible_row, VISIBLE, C, C1, C2)
    ds = (p * (outer(g, v, C2) - delta)).to(kind)
    dq = scaled(weighted_sum(dq, ds, k, C2), scale)
    store_tile(d_query + to_masked, dq, n_masked, H * C, C, C1, C2)
    dk = scaled(weighted(tl.trans(ds), q, C2), scale)
    store_tile(dk_visible + to_visible, dk, n_visible, H * C, C, C1, C2)


class Inputs(NamedTuple):
    query: Tensor  # (B, Nm, H, C)
    k_visible: Tensor  # (B, Nv, H, C)
    v_visible: Tensor
    k_masked: Tensor  # (B, Nm, H, C)
    v_masked: Tensor
    scale: float


def _readable(inputs: Inputs) -> Inputs:
    """Columns side by side, keys and values of a source with the same strides: what the kernels can read."""
    query = inputs.query if inputs.query.stride(3) == 1 else inputs.query.contiguous()
    visible = _same_layout(inputs.k_visible, inputs.v_visible)
    return Inputs(query, *visible, *_same_layout(inputs.k_masked, inputs.v_masked), scale=inputs.scale)


def _same_layout(key: Tensor, value: Tensor) -> Source:
    same = key.stride() == value.stride() and key.stride(3) == 1
    return (key, value) if same else (key.contiguous(), value.contiguous())


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """What both kernels are told about the inputs: strides, sizes, constants."""
    strides = {}
    for name, tensor in (("query", inputs.query), ("visible", inputs.k_visible), ("masked", inputs.k_masked)):
        strides[f"{name}_image"], strides[f"{name}_row"], strides[f"{name}_head"], _ = tensor.stride()
    _, n_masked, heads, width = inputs.query.shape
    first, second = split_width(width)
    sizes = {"n_visible": inputs.k_visible.shape[1], "n_masked": n_masked, "H": heads, "C": width}
    return {**inputs._asdict(), **strides, **sizes, "C1": first, "C2": second, "ROWS": tile_rows(n_masked)}


def _forward(inputs: Inputs) -> Tensor:
    inputs = _readable(inputs)
    batch, n_masked, heads, width = inputs.query.shape
    out = inputs.query.new_empty(inputs.query.shape)
    rows, visible_rows = tile_rows(n_masked), tile_rows(inputs.k_visible.shape[1])

    _forward_kernel[(batch * heads,)](
        **_arguments(inputs), out=out, KEYS=min(KEYS, max(rows, visible_rows)), STAGES=STAGES,
        num_warps=NUM_WARPS[rows], maxnreg=most_registers(rows, split_width(width)),
    )  # fmt: skip
    return out


def _backward(dout: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, dout = _readable(inputs), dout if dout.stride(3) == 1 else dout.contiguous()
    batch, n_masked, heads, _ = inputs.query.shape
    d_query, dk_visible, dv_visible, dk_masked, dv_masked = (x.new_empty(x.shape) for x in inputs[:5])
    dout_image, dout_row, dout_head, _ = dout.stride()
    visible_rows = tile_rows(inputs.k_visible.shape[1])

    _backward_kernel[(batch * heads,)](
        **_arguments(inputs), dout=dout, dout_image=dout_image, dout_row=dout_row, dout_head=dout_head,
        d_query=d_query, dk_visible=dk_visible, dv_visible=dv_visible, dk_masked=dk_masked, dv_masked=dv_masked,
        VISIBLE=visible_rows, num_warps=NUM_WARPS[max(tile_rows(n_masked), visible_rows)],
    )  # fmt: skip
    return d_query, dk_visible, dv_visible, dk_masked, dv_masked


def _forward_reference(inputs: Inputs) -> Tensor:
    query, k_visible, v_visible, k_masked, v_masked, scale = inputs
    return cross_attention_reference(query, (k_visible, v_visible), (k_masked, v_masked), scale).contiguous()


_cross_attention = fused_op(
    "cross_attention",
    run=_forward,
    reference=_forward_reference,
    fake=lambda query, *rest: query.new_empty(query.shape),
    back=_backward,
    back_reference=cross_attention_backward_reference,
)


def route(n_visible: int, n_masked: int, head_width: int = 64, dtype: torch.dtype = torch.bfloat16) -> str:
    """Where the "triton" backend sends a call: "triton" where the kernels take it, otherwise "sdpa"."""
    fits = max(n_visible, n_masked) <= MAX_TOKENS and kernels_take(dtype, head_width)
    return "triton" if fits else "sdpa"


def cross_attention(query: Tensor, visible: Source, masked: Source, scale: float) -> Tensor:
    """softmax over visible and masked keys together (paper, section 3.1: the latent contextual regressor).

    query: (B, Nm, H, C); visible: keys and values, each (B, Nv, H, C); masked: the same, each (B, Nm, H, C).
    Returns (B, Nm, H, C) in query's dtype. Raises ValueError for other shapes.
    """
    _check(query, visible, masked)
    chosen = backend("cross_attention", query)
    counts = visible[0].shape[1], query.shape[1]
    if chosen == "triton" and route(*counts, query.shape[3], query.dtype) == "triton":
        return _cross_attention(query, *visible, *masked, scale)
    if chosen in ("triton", "reference"):
        return cross_attention_reference(query, visible, masked, scale)
    key, value = (torch.cat(parts, 1) for parts in zip(visible, masked, strict=True))  # (B, Nv + Nm, H, C)
    return library_attention(chosen, query, key, value, scale)


def _check(query: Tensor, visible: Source, masked: Source) -> None:
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}: it must be (B, Nm, H, C)")
    expected = (query.shape[0], visible[0].shape[1], *query.shape[2:])
    for name, source, shape in (("visible", visible, expected), ("masked", masked, tuple(query.shape))):
        for part in source:
            if part.shape != shape:
                raise ValueError(f"a key or value of `{name}` has shape {tuple(part.shape)}: it must be {tuple(shape)}")
