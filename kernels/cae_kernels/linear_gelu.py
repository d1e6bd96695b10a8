"""First half of an MLP: out = gelu(pre + b), pre = x W^T; the product by cuBLAS, bias and GELU in one pass over pre.

    exact (Hendrycks and Gimpel, Gaussian Error Linear Units):  gelu(v) = v Phi(v),  gelu'(v) = Phi(v) + v phi(v)
    "tanh" (their approximation):  gelu(v) = v s,  s = sigmoid(2 u),  u = sqrt(2 / pi) (v + 0.044715 v^3)
    backward:  d_pre = d_out gelu'(pre + b),  d_b = sum over rows of d_pre,  d_x = d_pre W,  d_W = d_pre^T x

Only pre is saved. Bytes: forward reads pre and writes out; backward reads d_out and pre and writes d_pre.
torch._addmm_activation(use_gelu=True), cuBLASLt's epilogue, is no way around the forward pass: in torch 2.13 and 2.15
it is the tanh form on CUDA (erf on the CPU), does not return pre and has no derivative.

B batch, n tokens, D width, F hidden width, M = B * n rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend, custom_ops_wanted
from .report_spec import Spec
from .triton_language import INTERPRETED, tl, triton

FORWARD_TILE = (8, 512)  # rows, columns
BACKWARD_TILE = (8, 256)
NUM_WARPS = 4
PROGRAMS = (
    792  # of the backward kernel, 6 for each of an H100's 132 processors; fixed, so that sums do not depend on it
)


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def bias_gelu_reference(pre: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(pre + bias, approximate=approximate)


def bias_gelu_backward_reference(d_out: Tensor, pre: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    d_pre = torch.ops.aten.gelu_backward(d_out, pre + bias, approximate=approximate)
    return d_pre, d_pre.sum(0)


@triton.jit
def _gate(v, TANH: tl.constexpr):
    """What v is multiplied by, and the density (exact) or d(2 u)/dv (tanh) that the derivative needs.

    Phi(-|v|) = exp(-v^2 / 2) h(t), t = 1 / (1 + 0.4 |v|), h a minimax polynomial in the form of Abramowitz and Stegun
    7.1.26: off by less than 1.5e-7, near float32's own rounding, from the exponential that the density needs anyway.
    With erff the kernels would wait for instructions (37 an element) instead of memory.
    """
    if TANH:
        square = v * v
        gate = 1.0 / (1.0 + tl.exp2(-2.302208198144325 * v * (1.0 + 0.044715 * square)))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        density = tl.exp2(-0.7213475204444817 * v * v)
        t = 1.0 / (1.0 + 0.4 * tl.abs(v))
        h = 0.33080718 + t * (-0.24905156 + t * 0.05497098)
        h = 0.15711328 + t * (0.18602974 + t * (0.02013042 + t * h))
        tail = h * t * density
        gate = tl.where(v > 0, 1.0 - tail, tail)
        slope = 0.3989422804014327 * density
    return gate, slope


@triton.jit
def _forward_kernel(
    pre, bias, out, rows, columns, TANH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row.to(tl.int64)[:, None] * columns + column[None, :]
    v = tl.load(pre + offsets, mask=inside, other=0.0).to(tl.float32)
    v += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    gate, _ = _gate(v, TANH)
    tl.store(out + offsets, (v * gate).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    d_out, pre, bias, d_pre, partial, rows, columns, strip_rows,
    TANH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
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
        gate, slope = _gate(v, TANH)
        grad *= gate + v * slope * (gate * (1.0 - gate) if TANH else 1.0)
        tl.store(d_pre + offsets, grad.to(d_pre.dtype.element_ty), mask=inside)
        total += grad
    tl.store(partial + strip * columns + column, tl.sum(total, 0), mask=valid)


def _launch_forward(pre: Tensor, bias: Tensor, approximate: str, out: Tensor) -> Tensor:
    rows, columns = pre.shape
    grid = (triton.cdiv(rows, FORWARD_TILE[0]), triton.cdiv(columns, FORWARD_TILE[1]))
    tanh = approximate == "tanh"
    _forward_kernel[grid](pre, bias, out, rows, columns, tanh, *FORWARD_TILE, num_warps=NUM_WARPS)
    return out


def _forward(pre: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return _launch_forward(pre, bias, approximate, torch.empty_like(pre))


def _strips(rows: int, columns: int) -> tuple[int, int]:
    """Number of strips of rows and rows of each: all programs run at once, each sums a strip of its columns' bias."""
    tile_rows, tile_columns = BACKWARD_TILE
    most = max(PROGRAMS // triton.cdiv(columns, tile_columns), 1)
    strip_rows = triton.cdiv(triton.cdiv(rows, most), tile_rows) * tile_rows
    return triton.cdiv(rows, strip_rows), strip_rows


def _backward(d_out: Tensor, pre: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    d_out = d_out.contiguous()
    rows, columns = pre.shape
    strips, strip_rows = _strips(rows, columns)
    d_pre = torch.empty_like(pre)
    partial = pre.new_empty(strips, columns, dtype=torch.float32)
    _backward_kernel[(strips, triton.cdiv(columns, BACKWARD_TILE[1]))](
        d_out, pre, bias, d_pre, partial, rows, columns, strip_rows,
        approximate == "tanh", *BACKWARD_TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
    return d_pre, partial.sum(0).to(bias.dtype)


_forward_op = torch.library.custom_op("cae::bias_gelu", bias_gelu_reference, mutates_args=())
_backward_op = torch.library.custom_op("cae::bias_gelu_backward", bias_gelu_backward_reference, mutates_args=())
for _device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
    _forward_op.register_kernel(_device, _forward)
    _backward_op.register_kernel(_device, _backward)
_forward_op.register_fake(lambda pre, bias, approximate: torch.empty_like(pre))
_backward_op.register_fake(lambda d_out, pre, bias, approximate: (torch.empty_like(pre), torch.empty_like(bias)))


def _save(ctx, inputs, output) -> None:
    pre, bias, ctx.approximate = inputs
    ctx.save_for_backward(pre, bias)


def _registered_backward(ctx, d_out: Tensor):
    return *_backward_op(d_out, *ctx.saved_tensors, ctx.approximate), None


_forward_op.register_autograd(_registered_backward, setup_context=_save)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre: Tensor, bias: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(pre, bias)
        ctx.approximate = approximate
        return _forward(pre, bias, approximate)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        pre, bias = ctx.saved_tensors
        return *_backward(d_out, pre, bias, ctx.approximate), None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """x: (B, n, D); weight: (F, D); bias: (F,); one dtype. Returns (B, n, F) in x's dtype.

    approximate: "none" is the exact GELU, "tanh" its approximation (they differ by at most 4.7e-4).
    Raises ValueError for another name.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'linear_gelu has approximate={approximate!r}; it must be "none" or "tanh"')
    if backend("linear_gelu", x) == "reference":
        return linear_gelu_reference(x, weight, bias, approximate)
    pre = x.flatten(0, -2) @ weight.t()  # (M, F)
    if custom_ops_wanted():
        out = _forward_op(pre, bias, approximate)
    elif torch.is_grad_enabled() and (pre.requires_grad or bias.requires_grad):
        out = _Function.apply(pre, bias, approximate)
    else:
        out = _launch_forward(pre, bias, approximate, out=pre)
    return out.unflatten(0, x.shape[:-1])  # (B, n, F)


def report_specs() -> list[Spec]:
    """Both kernels at ViT-L, batch 256 (99 tokens, F = 4096) and ViT-H, batch 128 (129 tokens, F = 5120)."""
    specs = []
    for model, rows, columns in (("ViT-L", 256 * 99, 4096), ("ViT-H", 128 * 129, 5120)):
        for tanh in (False, True):
            form = f"{model} {'tanh' if tanh else 'erf'}"
            common: dict[str, Any] = {
                "pre": "*bf16:16",
                "bias": "*bf16:16",
                "rows": "i32:16",
                "columns": "i32:16",
                "TANH": tanh,
            }
            signature = common | {"out": "*bf16:16"} | _tile(FORWARD_TILE)
            programs = triton.cdiv(rows, FORWARD_TILE[0]) * triton.cdiv(columns, FORWARD_TILE[1])
            launch = (NUM_WARPS, 1, programs, 0, 2 * 2 * rows * columns)
            specs.append(
                Spec(f"linear_gelu forward {form}", _forward_kernel, signature, *launch, narrow="the bias, once a tile")
            )
            signature = common | {"d_out": "*bf16:16", "d_pre": "*bf16:16", "partial": "*fp32:16", "strip_rows": "i32"}
            signature |= _tile(BACKWARD_TILE)
            strips, _ = _strips(rows, columns)
            programs = strips * triton.cdiv(columns, BACKWARD_TILE[1])
            launch = (NUM_WARPS, 1, programs, 0, 3 * 2 * rows * columns + 4 * strips * columns)
            narrow = "the bias and its partial sum, once a program"
            specs.append(Spec(f"linear_gelu backward {form}", _backward_kernel, signature, *launch, narrow=narrow))
    return specs


def _tile(tile: tuple[int, int]) -> dict[str, int]:
    return {"TILE_ROWS": tile[0], "TILE_COLUMNS": tile[1]}
