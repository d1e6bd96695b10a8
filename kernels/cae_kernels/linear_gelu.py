"""First half of an MLP: out = gelu(pre + b), pre = x W^T; the product by cuBLAS, bias and GELU in one pass over pre.

    gelu(v) = v Phi(v),  gelu'(v) = Phi(v) + v phi(v)  (Hendrycks and Gimpel, Gaussian Error Linear Units)
    backward:  d_pre = d_out gelu'(pre + b),  d_b = sum over rows of d_pre,  d_x = d_pre W,  d_W = d_pre^T x

Only pre is saved. Bytes: forward reads pre and writes out; backward reads d_out and pre and writes d_pre.
torch._addmm_activation(use_gelu=True), cuBLASLt's epilogue, is no way around the forward pass: in torch 2.13 and 2.15
it is the tanh form on CUDA (erf on the CPU), does not return pre and has no derivative.

B batch, n tokens, D width, F hidden width, M = B * n rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend, custom_ops_wanted
from .parts.registration import fused_op
from .parts.triton_language import tl, triton

FORWARD_TILE = {"TILE_ROWS": 8, "TILE_COLUMNS": 512}
BACKWARD_TILE = {"TILE_ROWS": 8, "TILE_COLUMNS": 256}
NUM_WARPS = 4
PROGRAMS = 792  # of the backward kernel, 6 for each of an H100's 132 processors; fixed, so that sums are too


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def bias_gelu_reference(pre: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(pre + bias)


def bias_gelu_backward_reference(d_out: Tensor, pre: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    d_pre = torch.ops.aten.gelu_backward(d_out, pre + bias)
    return d_pre, d_pre.sum(0)


@triton.jit
def _gate(v):
    """Phi(v), what v is multiplied by, and phi(v), its density, which the derivative needs.

    Phi(-|v|) = exp(-v^2 / 2) h(t), t = 1 / (1 + 0.4 |v|), h a minimax polynomial in the form of Abramowitz and Stegun
    7.1.26: off by less than 1.5e-7, near float32's own rounding, from the exponential that the density needs anyway.
    With erff the kernels would wait for instructions (37 an element) instead of memory.
    """
    density = tl.exp2(-0.7213475204444817 * v * v)
    t = 1.0 / (1.0 + 0.4 * tl.abs(v))
    h = 0.33080718 + t * (-0.24905156 + t * 0.05497098)
    h = 0.15711328 + t * (0.18602974 + t * (0.02013042 + t * h))
    tail = h * t * density
    return tl.where(v > 0, 1.0 - tail, tail), 0.3989422804014327 * density


@triton.jit
def _forward_kernel(
    pre, bias, out,  # (M, F), contiguous; (F,); (M, F), contiguous, may be pre
    rows, columns,  # M, F
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]

    v = tl.load(pre + offsets, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    gate, _ = _gate(v)
    tl.store(out + offsets, (v * gate).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    d_out, pre, bias,  # (M, F), contiguous; (M, F), contiguous; (F,)
    d_pre, partial,  # (M, F), contiguous; (strips, F) float32
    rows, columns, strip_rows,  # M, F, rows of a strip
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    valid = column < columns
    shift = tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)

    for start in range(strip * strip_rows, min((strip + 1) * strip_rows, rows), TILE_ROWS):
        row = start + tl.arange(0, TILE_ROWS)
        inside = (row < rows)[:, None] & valid[None, :]
        offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
        grad = tl.load(d_out + offsets, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(pre + offsets, mask=inside, other=0.0).to(tl.float32) + shift
        gate, slope = _gate(v)
        grad *= gate + v * slope
        tl.store(d_pre + offsets, grad.to(d_pre.dtype.element_ty), mask=inside)
        total += grad

    tl.store(partial + strip * columns + column, tl.sum(total, 0), mask=valid)


def _launch_forward(pre: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    rows, columns = pre.shape
    grid = triton.cdiv(rows, FORWARD_TILE["TILE_ROWS"]), triton.cdiv(columns, FORWARD_TILE["TILE_COLUMNS"])
    _forward_kernel[grid](pre=pre, bias=bias, out=out, rows=rows, columns=columns, **FORWARD_TILE, num_warps=NUM_WARPS)
    return out


def _forward(pre: Tensor, bias: Tensor) -> Tensor:
    return _launch_forward(pre, bias, torch.empty_like(pre))


def _strips(rows: int, columns: int) -> tuple[int, int, int]:
    """Number of strips, rows of each, tiles of columns: all programs run at once, each sums a strip of d_b."""
    tile_rows, column_tiles = BACKWARD_TILE["TILE_ROWS"], triton.cdiv(columns, BACKWARD_TILE["TILE_COLUMNS"])
    most = max(PROGRAMS // column_tiles, 1)
    strip_rows = triton.cdiv(triton.cdiv(rows, most), tile_rows) * tile_rows
    return triton.cdiv(rows, strip_rows), strip_rows, column_tiles


def _backward(d_out: Tensor, pre: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    d_out = d_out.contiguous()
    rows, columns = pre.shape
    strips, strip_rows, column_tiles = _strips(rows, columns)
    d_pre = torch.empty_like(pre)
    partial = pre.new_empty(strips, columns, dtype=torch.float32)

    _backward_kernel[(strips, column_tiles)](
        d_out=d_out, pre=pre, bias=bias, d_pre=d_pre, partial=partial, rows=rows, columns=columns,
        strip_rows=strip_rows, **BACKWARD_TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
    return d_pre, partial.sum(0).to(bias.dtype)


_bias_gelu = fused_op(
    "bias_gelu",
    run=_forward,
    reference=bias_gelu_reference,
    fake=lambda pre, bias: torch.empty_like(pre),
    back=_backward,
    back_reference=bias_gelu_backward_reference,
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b), the exact GELU. x: (B, n, D); weight: (F, D); bias: (F,); one dtype. Returns (B, n, F)."""
    if backend("linear_gelu", x) == "reference":
        return linear_gelu_reference(x, weight, bias)

    pre = x.flatten(0, -2) @ weight.t()  # (M, F)
    if custom_ops_wanted() or (torch.is_grad_enabled() and (pre.requires_grad or bias.requires_grad)):
        out = _bias_gelu(pre, bias)
    else:
        out = _launch_forward(pre, bias, out=pre)
    return out.unflatten(0, x.shape[:-1])  # (B, n, F)
