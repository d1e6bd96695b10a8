"""Codes of a tokenizer's head: argmax over V of x W^T + b, the product kept on chip and never stored.

A program multiplies a block of rows with one tile of codes after the other, in float32 accumulators (tensor cores for
float16 and bfloat16, plain float32 otherwise), and keeps each row's largest logit and its code. The codes are split
over several programs where rows alone do not fill the device; a second kernel picks the winner among the splits.
Of equal logits the smallest code wins, in and between tiles and splits, so the split does not change the result.

M rows asked for, D width, V codes, S splits.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend
from .parts.registration import fused_op
from .parts.triton_language import tl, triton

# Rows, codes, width of a tile; warps, stages.
HALF_LAUNCH = (128, 256, 64, 8, 4)  # 192 KB of shared memory: Hopper
SMALL_HALF_LAUNCH = (128, 128, 32, 8, 3)  # 48 KB: all others
FLOAT_LAUNCH = (64, 64, 32, 4, 2)
SELECT_BLOCK = 256
PROCESSORS = 132  # of an H100
REFERENCE_ROWS = 4096  # logits of so many rows at a time


def linear_argmax_reference(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    wide, shift = weight.float(), None if bias is None else bias.float()
    parts = (x if rows is None else x[rows]).split(REFERENCE_ROWS)
    return torch.cat([F.linear(part.float(), wide, shift).argmax(-1) for part in parts])


@triton.jit
def _kernel(
    x, weight, bias,  # (N, D), columns side by side; (V, D), contiguous; (V,) or None
    rows,  # (M,) int64 or None
    values, indices,  # (S, M) float32, int32: best logit and its code
    count, codes, x_stride, tiles,  # M, V, stride of x's rows, tiles of codes of a split
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr,  # D
    TILE_ROWS: tl.constexpr, TILE_CODES: tl.constexpr, TILE_WIDTH: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    source = tl.minimum(row, count - 1).to(tl.int64)  # rows past the end repeat the last one, unmasked
    if HAS_ROWS:
        source = tl.load(rows + source)
    depth = tl.arange(0, TILE_WIDTH)
    x_tile = x + source[:, None] * x_stride + depth[None, :]
    best = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    index = tl.zeros((TILE_ROWS,), tl.int32)

    for tile in range(split * tiles, min((split + 1) * tiles, tl.cdiv(codes, TILE_CODES))):
        code = tile * TILE_CODES + tl.arange(0, TILE_CODES)
        known = tl.minimum(code, codes - 1)
        weight_tile = weight + known.to(tl.int64)[None, :] * WIDTH + depth[:, None]
        logits = tl.zeros((TILE_ROWS, TILE_CODES), tl.float32)
        for start in range(0, WIDTH, TILE_WIDTH):
            if WIDTH % TILE_WIDTH == 0:
                a = tl.load(x_tile + start)
                b = tl.load(weight_tile + start)
            else:
                a = tl.load(x_tile + start, mask=(depth < WIDTH - start)[None, :], other=0.0)
                b = tl.load(weight_tile + start, mask=(depth < WIDTH - start)[:, None], other=0.0)
            logits = tl.dot(a, b, logits, input_precision="ieee")

        if HAS_BIAS:
            logits += tl.load(bias + known).to(tl.float32)[None, :]
        # Codes past the end repeat the last one, which comes before them.
        largest = tl.max(logits, 1)
        first = tl.min(tl.where(logits == largest[:, None], code[None, :], 2147483647), 1)
        index = tl.where(largest > best, first, index)
        best = tl.maximum(best, largest)

    place = split * count + row
    tl.store(values + place, best, mask=row < count)
    tl.store(indices + place, index, mask=row < count)


@triton.jit
def _select_kernel(
    values, indices, out,  # (S, M) float32, (S, M) int32, (M,) int64
    count, splits,  # M, S
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK,), tl.int32)
    for split in range(splits):
        value = tl.load(values + split * count + row, mask=inside, other=float("-inf"))
        candidate = tl.load(indices + split * count + row, mask=inside, other=0)
        index = tl.where(value > best, candidate, index)
        best = tl.maximum(best, value)
    tl.store(out + row, index.to(tl.int64), mask=inside)


def _settings(x: Tensor) -> tuple[int, int, int, int, int]:
    if x.dtype is torch.float32:
        return FLOAT_LAUNCH
    hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] == 9
    return HALF_LAUNCH if hopper else SMALL_HALF_LAUNCH


@functools.lru_cache(maxsize=256)
def _splits(row_blocks: int, code_tiles: int) -> tuple[int, int]:
    """Number of splits and code tiles of each: the fewest splits within 5 % of the least rounds of tiles."""

    def rounds(splits: int) -> int:
        return triton.cdiv(row_blocks * splits, PROCESSORS) * triton.cdiv(code_tiles, splits)

    least = min(map(rounds, range(1, code_tiles + 1)))
    splits = next(splits for splits in range(1, code_tiles + 1) if rounds(splits) <= 1.05 * least)
    tiles = triton.cdiv(code_tiles, splits)
    return triton.cdiv(code_tiles, tiles), tiles


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    weight = weight.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    count, codes = len(x) if rows is None else len(rows), len(weight)
    out = x.new_empty(count, dtype=torch.int64)
    if count == 0:
        return out

    tile_rows, tile_codes, tile_width, num_warps, num_stages = _settings(x)
    row_blocks = triton.cdiv(count, tile_rows)
    splits, tiles = _splits(row_blocks, triton.cdiv(codes, tile_codes))
    values = x.new_empty(splits, count, dtype=torch.float32)
    indices = x.new_empty(splits, count, dtype=torch.int32)
    _kernel[(row_blocks, splits)](
        x=x, weight=weight, bias=bias, rows=rows, values=values, indices=indices,
        count=count, codes=codes, x_stride=x.stride(0), tiles=tiles,
        WIDTH=x.shape[1], HAS_BIAS=bias is not None, HAS_ROWS=rows is not None,
        TILE_ROWS=tile_rows, TILE_CODES=tile_codes, TILE_WIDTH=tile_width, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip

    _select_kernel[(triton.cdiv(count, SELECT_BLOCK),)](
        values=values, indices=indices, out=out, count=count, splits=splits, BLOCK=SELECT_BLOCK
    )
    return out


_linear_argmax = fused_op(
    "linear_argmax",
    run=_forward,
    reference=linear_argmax_reference,
    fake=lambda x, weight, bias, rows: x.new_empty(len(x) if rows is None else len(rows), dtype=torch.int64),
)


@torch.no_grad()
def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """For each row the code of the largest logit, the first of equal ones; logits in float32, never rounded.

    x: (N, D); weight: (V, D); bias: (V,) or None; one dtype of float16, bfloat16, float32; rows: None for all of x, or
    (M,) int64 in [0, N), in any order. Returns (M,) int64. NaN logits are passed over by the kernel.
    """
    if backend("linear_argmax", x) == "reference":
        return linear_argmax_reference(x, weight, bias, rows)
    return _linear_argmax(x, weight, bias, rows)
