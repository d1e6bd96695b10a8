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

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_libraries import library_attention
from .attention_tiles import (
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
from .dispatch import backend, custom_ops_wanted
from .report_spec import Spec
from .triton_language import INTERPRETED, tl, triton

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
    sizes = (k_visible.shape[1], k_masked.shape[1])
    dq, dk, dv = ds @ key, ds.mT @ query, p.mT @ dout
    dq, dk, dv = (x.transpose(1, 2).to(k_visible.dtype) for x in (dq, dk, dv))
    (dk_visible, dk_masked), (dv_visible, dv_masked) = (
        [part.contiguous() for part in x.split(sizes, 1)] for x in (dk, dv)
    )
    return dq.contiguous(), dk_visible, dv_visible, dk_masked, dv_masked


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
    query, k_visible, v_visible, k_masked, v_masked, out, query_image, query_row, query_head,
    visible_image, visible_row, visible_head, masked_image, masked_row, masked_head, n_visible, n_masked, scale,
    H: tl.constexpr, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
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
    dout, query, k_visible, v_visible, k_masked, v_masked,
    d_query, dk_visible, dv_visible, dk_masked, dv_masked,
    dout_image, dout_row, dout_head, query_image, query_row, query_head,
    visible_image, visible_row, visible_head, masked_image, masked_row, masked_head, n_visible, n_masked, scale,
    H: tl.constexpr, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, ROWS: tl.constexpr, VISIBLE: tl.constexpr,
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


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _same_layout(source: Source) -> Source:
    """Keys and values that the kernels can read: columns side by side, both with the same strides."""
    if source[0].stride() == source[1].stride() and source[0].stride(3) == 1:
        return source
    return source[0].contiguous(), source[1].contiguous()


def _forward(
    query: Tensor, k_visible: Tensor, v_visible: Tensor, k_masked: Tensor, v_masked: Tensor, scale: float
) -> Tensor:
    query = query if query.stride(3) == 1 else query.contiguous()
    visible, masked = _same_layout((k_visible, v_visible)), _same_layout((k_masked, v_masked))
    batch, n_masked, heads, width = query.shape
    n_visible = visible[0].shape[1]
    out = query.new_empty(query.shape)
    rows, keys = tile_rows(n_masked), min(KEYS, max(tile_rows(n_visible), tile_rows(n_masked)))
    strides = _strides(query, visible[0], masked[0])
    constants = heads, width, *split_width(width), rows, keys, STAGES
    launch = _forward_kernel[(batch * heads,)]
    options = {"num_warps": NUM_WARPS[rows], "maxnreg": most_registers(rows, constants[2:4])}
    launch(query, *visible, *masked, out, *strides, n_visible, n_masked, scale, *constants, **options)
    return out


def _backward(
    dout: Tensor, query: Tensor, k_visible: Tensor, v_visible: Tensor, k_masked: Tensor, v_masked: Tensor, scale: float
) -> tuple[Tensor, ...]:
    dout, query = (x if x.stride(3) == 1 else x.contiguous() for x in (dout, query))
    visible, masked = _same_layout((k_visible, v_visible)), _same_layout((k_masked, v_masked))
    batch, n_masked, heads, width = query.shape
    n_visible = visible[0].shape[1]
    gradients = tuple(x.new_empty(x.shape) for x in (query, *visible, *masked))
    rows, visible_rows = tile_rows(n_masked), tile_rows(n_visible)
    strides = _strides(dout, query, visible[0], masked[0])
    constants = heads, width, *split_width(width), rows, visible_rows
    launch = _backward_kernel[(batch * heads,)]
    num_warps = NUM_WARPS[max(rows, visible_rows)]
    launch(
        dout, query, *visible, *masked, *gradients, *strides, n_visible, n_masked, scale, *constants,
        num_warps=num_warps,
    )  # fmt: skip
    return gradients


def _contiguous_reference(
    query: Tensor, k_visible: Tensor, v_visible: Tensor, k_masked: Tensor, v_masked: Tensor, scale: float
) -> Tensor:
    return cross_attention_reference(query, (k_visible, v_visible), (k_masked, v_masked), scale).contiguous()


_forward_op = torch.library.custom_op("cae::cross_attention", _contiguous_reference, mutates_args=())
_backward_op = torch.library.custom_op(
    "cae::cross_attention_backward", cross_attention_backward_reference, mutates_args=()
)
for _device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
    _forward_op.register_kernel(_device, _forward)
    _backward_op.register_kernel(_device, _backward)
_forward_op.register_fake(lambda query, *rest: query.new_empty(query.shape))
_backward_op.register_fake(lambda dout, *inputs: tuple(x.new_empty(x.shape) for x in inputs[:5]))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale = inputs[5]


def _registered_backward(ctx, dout: Tensor):
    return *_backward_op(dout, *ctx.saved_tensors, ctx.scale), None


_forward_op.register_autograd(_registered_backward, setup_context=_save)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        ctx.save_for_backward(*inputs[:5])
        ctx.scale = inputs[5]
        return _forward(*inputs)

    @staticmethod
    def backward(ctx, dout: Tensor):
        query, k_visible, v_visible, k_masked, v_masked = ctx.saved_tensors
        return *_backward(dout, query, k_visible, v_visible, k_masked, v_masked, ctx.scale), None


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
        return (_forward_op if custom_ops_wanted() else _Function.apply)(query, *visible, *masked, scale)
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


def report_specs() -> list[Spec]:
    """ViT-L B = 256, 98 queries to 98 + 98 keys, and ViT-H B = 128, 128 to 128 + 128: forward and backward."""
    specs = []
    for model, batch, n, heads, width in (("ViT-L", 256, 98, 16, 64), ("ViT-H", 128, 128, 16, 80)):
        rows = tile_rows(n)
        tokens = "i32:16" if n % 16 == 0 else "i32"
        common = (tokens, tokens, "fp32", heads, width, *split_width(width), rows)
        forward = (*("*bf16:16",) * 6, *("i32:16",) * 9, *common, KEYS, STAGES)
        backward = (*("*bf16:16",) * 11, *("i32:16",) * 12, *common, rows)
        element, products = 2 * batch * n * heads * width, 2 * batch * heads * n * 2 * n * width
        registers = {"maxnreg": most_registers(rows, split_width(width))}
        for name, kernel, arguments, count, moved, options in (
            ("forward", _forward_kernel, forward, 2, 6, registers), ("backward", _backward_kernel, backward, 5, 11, {}),
        ):  # fmt: skip
            signature = dict(zip(kernel.arg_names, arguments, strict=True))
            launch = NUM_WARPS[rows], 3, batch * heads, count * products, moved * element
            narrow = "the last 16 columns of 64 keys: 8 bytes a thread" if options and split_width(width)[1] else ""
            specs.append(Spec(f"cross_attention {name} {model}", kernel, signature, *launch, options, narrow))
    return specs
