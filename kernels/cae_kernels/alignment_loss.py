"""Mean squared error in float32: of predicted latents to the encoder's latents, and of predicted pixels to pixels.

loss = sum((prediction - t)^2) / n, gradient = grad * 2 (prediction - t) / n; n = B * Nm * D; t is the target, or
LayerNorm(target) of each token, so that the encoder's last LayerNorm needs neither a pass nor a buffer of its own.
B batch, Nm masked, D width, R rows: all tokens of all images.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend, custom_ops_wanted
from .report_spec import Spec
from .triton_language import INTERPRETED, tl, triton

TILE = 4096  # elements of a tile of whole rows
NUM_WARPS = 8
PROGRAMS = 1056  # 8 for each of an H100's 132 processors; fixed, so that sums do not depend on the device
FLAT_WIDTH = 1024

Norm = tuple[Tensor, Tensor, float]  # weight (D,), bias (D,), eps


def _normalized(target: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    target = target.detach()
    wide = target.to(torch.promote_types(target.dtype, torch.float32))
    if weight is None or bias is None:
        return wide
    return F.layer_norm(wide, wide.shape[-1:], weight.detach().to(wide.dtype), bias.detach().to(wide.dtype), eps)


def alignment_loss_reference(
    prediction: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    target = _normalized(target, weight, bias, eps)
    return F.mse_loss(prediction.to(target.dtype), target)


def alignment_loss_backward_reference(
    grad: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    target = _normalized(target, weight, bias, eps)
    scale = 2.0 * grad.to(target.dtype) / prediction.numel()
    return (scale * (prediction.to(target.dtype) - target)).to(prediction.dtype)


@triton.jit
def _difference(
    prediction, target, weight, bias, row, num_rows, num_tokens, batch_stride, token_stride, eps,
    D: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """prediction - t of some rows, float32, 0 outside, and the offsets and mask of the rows in prediction."""
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (columns < D)
    row = row.to(tl.int64)
    starts = row // num_tokens * batch_stride + row % num_tokens * token_stride
    wanted = tl.load(target + starts[:, None] + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(wanted, 1) / D
        centered = tl.where(inside, wanted - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centered * centered, 1) / D + eps)
        w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        b = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
        wanted = tl.where(inside, centered * scale[:, None] * w + b, 0.0)
    offsets = row[:, None] * D + columns
    predicted = tl.load(prediction + offsets, mask=inside, other=0.0).to(tl.float32)
    return predicted - wanted, offsets, inside


@triton.jit
def _forward_kernel(
    prediction, target, weight, bias, partial, num_rows, num_tokens, batch_stride, token_stride, eps, share,
    D: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        difference, _, _ = _difference(
            prediction, target, weight, bias, row, num_rows, num_tokens, batch_stride, token_stride, eps, D, NORM, BLOCK
        )
        total += difference * difference
    tl.store(partial + program, tl.sum(tl.sum(total, 1), 0) * share)


@triton.jit
def _backward_kernel(
    grad, prediction, target, weight, bias, out, num_rows, num_tokens, batch_stride, token_stride, eps, share,
    D: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    difference, offsets, inside = _difference(
        prediction, target, weight, bias, row, num_rows, num_tokens, batch_stride, token_stride, eps, D, NORM, BLOCK
    )
    scale = 2.0 * share * tl.load(grad).to(tl.float32)
    tl.store(out + offsets, (scale * difference).to(out.dtype.element_ty), mask=inside)


def _rows(prediction: Tensor, target: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """prediction contiguous and target with contiguous rows, both (B, Nm, D); as (1, R, FLAT_WIDTH) where possible."""
    prediction = prediction.contiguous()
    if not normalize and target.is_contiguous() and prediction.numel() % FLAT_WIDTH == 0:
        return prediction.view(1, -1, FLAT_WIDTH), target.view(1, -1, FLAT_WIDTH)
    return prediction, target if target.stride(-1) == 1 else target.contiguous()


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile; columns are the next power of two."""
    block = triton.next_power_of_2(width)
    return max(1, TILE // block), block


def _forward(prediction: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normalize = weight is not None
    prediction, target = _rows(prediction, target, normalize)
    batch, tokens, width = prediction.shape
    rows, block = _tile(width)
    programs = min(PROGRAMS, triton.cdiv(batch * tokens, rows))
    partial = prediction.new_empty(programs, dtype=torch.float32)  # (programs,)
    strides = target.stride()
    _forward_kernel[(programs,)](
        prediction,
        target,
        weight,
        bias,
        partial,
        batch * tokens,
        tokens,
        strides[0],
        strides[1],
        eps,
        1.0 / prediction.numel(),
        width,
        normalize,
        rows,
        block,
        num_warps=NUM_WARPS,
    )
    return partial.sum()


def _backward(
    grad: Tensor, prediction: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    normalize = weight is not None
    out = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    prediction, target = _rows(prediction, target, normalize)
    batch, tokens, width = prediction.shape
    rows, block = _tile(width)
    strides = target.stride()
    _backward_kernel[(triton.cdiv(batch * tokens, rows),)](
        grad,
        prediction,
        target,
        weight,
        bias,
        out,
        batch * tokens,
        tokens,
        strides[0],
        strides[1],
        eps,
        1.0 / prediction.numel(),
        width,
        normalize,
        rows,
        block,
        num_warps=NUM_WARPS,
    )
    return out


_forward_op = torch.library.custom_op("cae::alignment_loss", alignment_loss_reference, mutates_args=())
_backward_op = torch.library.custom_op(
    "cae::alignment_loss_backward", alignment_loss_backward_reference, mutates_args=()
)
for _device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
    _forward_op.register_kernel(_device, _forward)
    _backward_op.register_kernel(_device, _backward)
_forward_op.register_fake(lambda prediction, *_: prediction.new_empty((), dtype=torch.float32))
_backward_op.register_fake(
    lambda grad, prediction, *_: torch.empty_like(prediction, memory_format=torch.contiguous_format)
)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _registered_backward(ctx, grad: Tensor):
    return _backward_op(grad, *ctx.saved_tensors, ctx.eps), None, None, None, None


_forward_op.register_autograd(_registered_backward, setup_context=_save)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, prediction: Tensor, target: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(prediction, target, weight, bias)
        ctx.eps = eps
        return _forward(prediction, target, weight, bias, eps)

    @staticmethod
    def backward(ctx, grad: Tensor):
        prediction, target, weight, bias = ctx.saved_tensors
        return _backward(grad, prediction, target, weight, bias, ctx.eps), None, None, None, None


def alignment_loss(prediction: Tensor, target: Tensor, norm: Norm | None = None) -> Tensor:
    """Mean of (prediction - target)^2 over everything (paper, section 3.2: the alignment loss).

    prediction, target: (B, Nm, D). norm: weight (D,), bias (D,) and eps of a LayerNorm to apply to the target first,
    in float32. Neither target nor norm gets a gradient. Returns a float32 scalar.
    Raises ValueError for tensors of different shapes.
    """
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise ValueError(
            f"alignment_loss needs two (B, Nm, D) tensors, not {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    weight, bias, eps = (norm[0].detach(), norm[1].detach(), norm[2]) if norm else (None, None, 0.0)
    inputs = prediction, target.detach(), weight, bias, eps
    if backend("alignment_loss", prediction) == "reference":
        return alignment_loss_reference(*inputs)
    return (_forward_op if custom_ops_wanted() else _Function.apply)(*inputs)


def report_specs() -> list[Spec]:
    specs = []
    for model, batch, tokens, width in (("ViT-L B256", 256, 98, 1024), ("ViT-H B128", 128, 128, 1280)):
        (rows, block), count = _tile(width), batch * tokens
        shared: dict[str, Any] = dict.fromkeys(("prediction", "target", "weight", "bias"), "*bf16:16")
        shared |= dict.fromkeys(("num_rows", "batch_stride", "token_stride"), "i32:16") | {"eps": "fp32"}
        shared |= {"num_tokens": "i32" if tokens % 16 else "i32:16", "share": "fp32"}
        shared |= {"D": width, "NORM": True, "ROWS": rows, "BLOCK": block}
        forward, backward = shared | {"partial": "*fp32:16"}, shared | {"grad": "*fp32:16", "out": "*bf16:16"}
        size, programs = count * width, triton.cdiv(count, rows)
        specs += [
            Spec(f"alignment_loss forward {model}", _forward_kernel, forward, NUM_WARPS, 3, PROGRAMS, 0, 4 * size),
            Spec(f"alignment_loss backward {model}", _backward_kernel, backward, NUM_WARPS, 3, programs, 0, 6 * size),
        ]
    return specs
