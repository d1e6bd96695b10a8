"""What stands between the convolutions of a pre-activation network, in one pass each: bias, residual, pooling, ReLU.

    s = x + b + residual,  max-pooled 2x2 on request;  out = max(s, 0)

On CUDA torch adds the bias of a channels_last convolution in a pass of its own. Bytes: x and the residual are read,
out and, where asked for, s are written, s and out a quarter as large where pooled. Eager calls write into x. Inference
only. Sums are float32 and rounded once.

B batch, C channels, H x W positions; memory (B, H, W, C), that is channels_last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend, custom_ops_wanted
from .parts.registration import fused_op
from .parts.triton_language import tl, triton

BLOCK = {False: 2048, True: 1024}  # elements of out of a program, without and with pooling
NUM_WARPS = 4


def bias_residual_relu_reference(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, pool: bool
) -> tuple[Tensor, Tensor]:
    if bias is not None:
        x.add_(bias[:, None, None])
    if residual is not None:
        x.add_(residual)
    total = F.max_pool2d(x, 2) if pool else x
    return total, total.relu()


def bias_relu_reference(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if bias is not None:
        x.add_(bias[:, None, None])
    return (x if residual is None else x.add_(residual)).relu_()


@triton.jit
def _sum(x, residual, offsets, shift, inside):
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) + shift
    if residual is not None:
        value += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)  # as torch


@triton.jit
def _kernel(
    x,  # (B, H, W, C), contiguous
    bias, residual,  # (C,) or None; as x, or None
    total, out,  # the sum or None, its ReLU: as x, H and W halved where pooled; either may be x where they are not
    size, height, width,  # elements of out; H, W
    CHANNELS: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = place < size - start
    # Triton 3.6 does not see by itself that this is a multiple, and then no load is wide.
    first = tl.multiple_of((start % CHANNELS).to(tl.int32), 8 if CHANNELS % 8 == 0 else 1)
    place_in_pixel = first + place
    channel = place_in_pixel % CHANNELS
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + channel).to(tl.float32)

    if POOL:
        pixel = (start // CHANNELS).to(tl.int32) + place_in_pixel // CHANNELS
        row, column = pixel // (width // 2), pixel % (width // 2)
        row = row // (height // 2) * height + row % (height // 2) * 2  # an odd last row is left out
        corner = (row.to(tl.int64) * width + column * 2) * CHANNELS + channel
        value = _sum(x, residual, corner, shift, inside)
        value = _maximum(value, _sum(x, residual, corner + CHANNELS, shift, inside))
        corner += width * CHANNELS
        value = _maximum(value, _sum(x, residual, corner, shift, inside))
        value = _maximum(value, _sum(x, residual, corner + CHANNELS, shift, inside))
    else:
        value = _sum(x, residual, start + place, shift, inside)

    if total is not None:
        tl.store(total + start + place, value.to(total.dtype.element_ty), mask=inside)
    tl.store(out + start + place, _maximum(value, 0.0).to(out.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, *, total: Tensor | None, out: Tensor, pool: bool
) -> None:
    if out.numel() == 0:
        return
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = x.shape
    _kernel[(triton.cdiv(out.numel(), BLOCK[pool]),)](
        x=x, bias=bias, residual=residual, total=total, out=out, size=out.numel(), height=height, width=width,
        CHANNELS=channels, POOL=pool, BLOCK=BLOCK[pool], num_warps=NUM_WARPS,
    )  # fmt: skip


def _new(x: Tensor, pool: bool) -> Tensor:
    batch, channels, height, width = x.shape
    shape = (batch, channels, height // 2, width // 2) if pool else x.shape
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake(x, bias, residual, pool, with_sum):
    return _new(x, pool) if with_sum else x.new_empty(0), _new(x, pool)


def _forward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, pool: bool, with_sum: bool
) -> tuple[Tensor, Tensor]:
    x = x.contiguous(memory_format=torch.channels_last)
    total, out = _fake(x, bias, residual, pool, with_sum)
    _launch(x, bias, residual, total=total if with_sum else None, out=out, pool=pool)
    return total, out


def _functional_reference(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, pool: bool, with_sum: bool
) -> tuple[Tensor, Tensor]:
    x = x.clone(memory_format=torch.channels_last)
    total, out = bias_residual_relu_reference(x, bias, residual, pool)
    return total if with_sum else x.new_empty(0), out


# Registered for torch.compile only: in eager mode the functions below write into x.
_bias_relu = fused_op("bias_relu", run=_forward, reference=_functional_reference, fake=_fake)


def _by_kernel(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    if x.ndim != 4 or (bias is not None and bias.shape != x.shape[1:2]):
        found = None if bias is None else tuple(bias.shape)
        raise ValueError(f"bias_relu has x {tuple(x.shape)}, bias {found}; they must be (B, C, H, W) and (C,)")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"bias_relu has x {tuple(x.shape)}, residual {tuple(residual.shape)}; they must be equal")
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, bias, residual)):
        raise ValueError("bias_relu has no derivative: call it under torch.no_grad, or with frozen weights")
    return backend("bias_relu", x) == "triton" and x.is_contiguous(memory_format=torch.channels_last)


def conv2d_and_bias(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int | str | tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """The convolution and the bias that remains to be added: None where it costs nothing, or no less, to add it now."""
    if backend("bias_relu", x) == "triton":
        return F.conv2d(x, weight, None, padding=padding), bias
    return F.conv2d(x, weight, bias, padding=padding), None


def bias_relu(x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """max(x + bias + residual, 0). x may be overwritten.

    x, residual: (B, C, H, W); bias: (C,); float32, float16 or bfloat16. Returns (B, C, H, W) in x's dtype. The kernel
    takes x in channels_last, torch everything else. Raises ValueError for other shapes and where gradients are asked.
    """
    if not _by_kernel(x, bias, residual):
        return bias_relu_reference(x, bias, residual)
    if custom_ops_wanted():
        return _bias_relu(x, bias, residual, False, False)[1]
    _launch(x, bias, residual, total=None, out=x, pool=False)
    return x


def bias_residual_relu(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, pool: bool = False
) -> tuple[Tensor, Tensor]:
    """x + bias + residual, with `pool` max-pooled 2x2 (odd last rows and columns left out), and its ReLU.

    As bias_relu; both results are (B, C, H, W), pooled (B, C, H // 2, W // 2).
    """
    if not _by_kernel(x, bias, residual):
        return bias_residual_relu_reference(x, bias, residual, pool)
    if custom_ops_wanted():
        return _bias_relu(x, bias, residual, pool, True)
    total, out = _new(x, True) if pool else x, _new(x, pool)
    _launch(x, bias, residual, total=total, out=out, pool=pool)
    return total, out
