"""Mean squared error in float32: of predicted latents to the encoder's latents, and of predicted pixels to pixels.

loss = sum((prediction - target)^2) / n, gradient = grad * 2 (prediction - target) / n; n = B * Nm * D.
B batch, Nm masked, D width, R rows: all tokens of all images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend
from .parts.registration import fused_op
from .parts.triton_language import tl, triton

TILE = 4096  # elements of a tile of whole rows
NUM_WARPS = 8
PROGRAMS = 1056  # 8 for each of an H100's 132 processors; fixed, so that sums do not depend on the device
FLAT_WIDTH = 1024


def _wide(target: Tensor) -> Tensor:
    return target.detach().to(torch.promote_types(target.dtype, torch.float32))


def squared_error_reference(prediction: Tensor, target: Tensor) -> Tensor:
    target = _wide(target)
    return F.mse_loss(prediction.to(target.dtype), target)


def squared_error_backward_reference(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    target = _wide(target)
    scale = 2.0 * grad.to(target.dtype) / prediction.numel()
    return (scale * (prediction.to(target.dtype) - target)).to(prediction.dtype)


@triton.jit
def _difference(
    prediction, target, row, num_rows, num_tokens, batch_stride, token_stride, D: tl.constexpr, BLOCK: tl.constexpr
):
    """prediction - target of some rows, float32, 0 outside, and the offsets and mask of the rows in prediction."""
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (columns < D)
    row = row.to(tl.int64)
    starts = row // num_tokens * batch_stride + row % num_tokens * token_stride
    wanted = tl.load(target + starts[:, None] + columns, mask=inside, other=0.0).to(tl.float32)

    offsets = row[:, None] * D + columns
    predicted = tl.load(prediction + offsets, mask=inside, other=0.0).to(tl.float32)
    return predicted - wanted, offsets, inside


@triton.jit
def _forward_kernel(
    prediction, target,  # (R, D), contiguous; (B, Nm, D), rows spaced anyhow
    partial,  # (programs,) float32
    num_rows, num_tokens, batch_stride, token_stride,  # R, Nm, strides of target
    share,  # 1 / n
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,  # a tile's rows and columns
):  # fmt: skip
    program = tl.program_id(0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        difference, _, _ = _difference(
            prediction, target, row, num_rows, num_tokens, batch_stride, token_stride, D, BLOCK
        )
        total += difference * difference
    tl.store(partial + program, tl.sum(tl.sum(total, 1), 0) * share)


@triton.jit
def _backward_kernel(
    grad,  # float32 scalar
    prediction, target,  # (R, D), contiguous; (B, Nm, D), rows spaced anyhow
    out,  # (R, D), contiguous
    num_rows, num_tokens, batch_stride, token_stride,  # R, Nm, strides of target
    share,  # 1 / n
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,  # a tile's rows and columns
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    difference, offsets, inside = _difference(
        prediction, target, row, num_rows, num_tokens, batch_stride, token_stride, D, BLOCK
    )
    scale = 2.0 * share * tl.load(grad).to(tl.float32)
    tl.store(out + offsets, (scale * difference).to(out.dtype.element_ty), mask=inside)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile; columns are the next power of two."""
    block = triton.next_power_of_2(width)
    return max(1, TILE // block), block


def _arguments(prediction: Tensor, target: Tensor) -> tuple[int, dict]:
    """Tiles of rows, and what both kernels are told: rows as they are, or FLAT_WIDTH wide where that is possible."""
    prediction = prediction.contiguous()
    if target.is_contiguous() and prediction.numel() % FLAT_WIDTH == 0:
        prediction, target = prediction.view(1, -1, FLAT_WIDTH), target.view(1, -1, FLAT_WIDTH)
    elif target.stride(-1) != 1:
        target = target.contiguous()

    batch, tokens, width = prediction.shape
    rows, block = _tile(width)
    return triton.cdiv(batch * tokens, rows), {
        "prediction": prediction,
        "target": target,
        "num_rows": batch * tokens,
        "num_tokens": tokens,
        "batch_stride": target.stride(0),
        "token_stride": target.stride(1),
        "share": 1.0 / prediction.numel(),
        "D": width,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": NUM_WARPS,
    }


def _forward(prediction: Tensor, target: Tensor) -> Tensor:
    tiles, arguments = _arguments(prediction, target)
    partial = prediction.new_empty(min(PROGRAMS, tiles), dtype=torch.float32)  # (programs,)
    _forward_kernel[(len(partial),)](**arguments, partial=partial)
    return partial.sum()


def _backward(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    tiles, arguments = _arguments(prediction, target)
    out = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    _backward_kernel[(tiles,)](**arguments, grad=grad, out=out)
    return out


_squared_error = fused_op(
    "squared_error",
    run=_forward,
    reference=squared_error_reference,
    fake=lambda prediction, target: prediction.new_empty((), dtype=torch.float32),
    back=_backward,
    back_reference=squared_error_backward_reference,
)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of (prediction - target)^2 over everything (paper, section 3.2: the alignment loss; and that of pixels).

    prediction, target: (B, Nm, D). The target gets no gradient. Returns a float32 scalar.
    Raises ValueError for tensors of different shapes.
    """
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise ValueError(
            f"squared_error needs two (B, Nm, D) tensors, not {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    if backend("squared_error", prediction) == "reference":
        return squared_error_reference(prediction, target)
    return _squared_error(prediction, target.detach())
