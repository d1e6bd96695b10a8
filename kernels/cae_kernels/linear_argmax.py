"""Codes of a tokenizer's head: argmax over V of x W^T + b, the product kept on chip and never stored.

A program multiplies a block of rows with one tile of codes after the other, in float32 accumulators (tensor cores for
float16 and bfloat16, plain float32 otherwise), and keeps each row's largest logit and its code. The codes are split
over several programs where rows alone do not fill the device; a second kernel picks the winner among the splits.
Of equal logits the smallest code wins, in and between tiles and splits, so the split does not change the result.

M rows asked for, D width, V codes, S splits.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend, custom_ops_wanted
from .report_spec import Spec
from .triton_language import INTERPRETED, tl, triton

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
    x, weight, bias, rows, values, indices, count, codes, x_stride, tiles,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr,
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
def _select_kernel(values, indices, out, count, splits, BLOCK: tl.constexpr):
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
    *tile, num_warps, num_stages = _settings(x)
    row_blocks = triton.cdiv(count, tile[0])
    splits, tiles = _splits(row_blocks, triton.cdiv(codes, tile[1]))
    values = x.new_empty(splits, count, dtype=torch.float32)
    indices = x.new_empty(splits, count, dtype=torch.int32)
    _kernel[(row_blocks, splits)](
        x, weight, bias, rows, values, indices, count, codes, x.stride(0), tiles,
        x.shape[1], bias is not None, rows is not None, *tile, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    _select_kernel[(triton.cdiv(count, SELECT_BLOCK),)](values, indices, out, count, splits, SELECT_BLOCK)
    return out


_op = torch.library.custom_op("cae::linear_argmax", linear_argmax_reference, mutates_args=())
for _device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
    _op.register_kernel(_device, _forward)
_op.register_fake(lambda x, weight, bias, rows: x.new_empty(len(x) if rows is None else len(rows), dtype=torch.int64))


@torch.no_grad()
def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
    """For each row the code of the largest logit, the first of equal ones; logits in float32, never rounded.

    x: (N, D); weight: (V, D); bias: (V,) or None; one dtype of float16, bfloat16, float32; rows: None for all of x, or
    (M,) int64 in [0, N), in any order. Returns (M,) int64. NaN logits are passed over by the kernel.
    """
    if backend("linear_argmax", x) == "reference":
        return linear_argmax_reference(x, weight, bias, rows)
    return (_op if custom_ops_wanted() else _forward)(x, weight, bias, rows)


def report_specs() -> list[Spec]:
    """Requested rows of the DALL-E tokenizer's head (2048 -> 8192) at ViT-L, batch 256 and ViT-H, batch 128."""
    specs = []
    for model, count in (("ViT-L", 256 * 98), ("ViT-H", 128 * 128)):
        for dtype, launch in (("fp16", HALF_LAUNCH), ("bf16", HALF_LAUNCH), ("fp32", FLOAT_LAUNCH)):
            *tile, num_warps, num_stages = launch
            signature: dict[str, Any] = dict.fromkeys(("x", "weight", "bias"), f"*{dtype}:16")
            signature |= {"rows": "*i64:16", "values": "*fp32:16", "indices": "*i32:16"}
            signature |= {"count": "i32:16", "codes": "i32:16", "x_stride": "i32:16", "tiles": "i32:16"}
            signature |= {"WIDTH": 2048, "HAS_BIAS": True, "HAS_ROWS": True}
            signature |= dict(zip(("TILE_ROWS", "TILE_CODES", "TILE_WIDTH"), tile, strict=True))
            row_blocks = triton.cdiv(count, tile[0])
            splits, _ = _splits(row_blocks, triton.cdiv(8192, tile[1]))
            size = (count + 8192) * 2048 * (4 if dtype == "fp32" else 2)
            name = f"linear_argmax {model} {dtype}"
            flops = 2 * count * 2048 * 8192
            narrow = "row numbers and bias, once per row block and tile of codes"
            programs = row_blocks * splits
            specs.append(Spec(name, _kernel, signature, num_warps, num_stages, programs, flops, size, narrow=narrow))
        signature = {"values": "*fp32:16", "indices": "*i32:16", "out": "*i64:16", "count": "i32:16", "splits": "i32"}
        signature |= {"BLOCK": SELECT_BLOCK}
        splits, _ = _splits(triton.cdiv(count, HALF_LAUNCH[0]), 8192 // HALF_LAUNCH[1])
        launch = (4, 1, triton.cdiv(count, SELECT_BLOCK), 0, count * (8 * splits + 8))
        narrow = "a block has two numbers for each thread"
        specs.append(Spec(f"linear_argmax select {model}", _select_kernel, signature, *launch, narrow=narrow))
    return specs
