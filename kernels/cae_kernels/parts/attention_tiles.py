"""Tiles of one attention head: what the self- and cross-attention kernels share.

A tile is all rows of one (image, head) as a pair of column blocks, C1 and C2 wide, both powers of two, so that a head
of 80 is 64 + 16 and not 128; where C2 is 0 the second block is not computed. Rows past n and columns past C are zero.
A row is one token of a head, the same pair of blocks, in float32.
"""

import torch

from .triton_language import INTERPRETED, tl, triton

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
MAX_WIDTH = 128


def kernels_take(dtype: torch.dtype, head_width: int) -> bool:
    """Half precision, and heads up to 128 wide; float32 in Triton's interpreter only.

    A GPU multiplies exact float32 without tensor cores, and tiles of this size then do not fit in its registers (tens
    to hundreds of kilobytes of spills for each thread): torch's own float32 kernels are much faster.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return head_width <= MAX_WIDTH and (half or (INTERPRETED and dtype == torch.float32))


def most_registers(rows: int, blocks: tuple[int, int]) -> int | None:
    """Limit for a forward kernel: 128, so that two programs fit on a processor, where that costs no spills."""
    return 128 if rows == 128 and sum(blocks) <= 80 else None


def tile_rows(n: int) -> int:
    """Rows of the tile that holds n tokens: 16, 32, 64 or 128."""
    return max(16, 1 << (n - 1).bit_length())


def split_width(width: int) -> tuple[int, int]:
    """One or two powers of two, at least 16, that together cover a head: 64 -> (64, 0), 80 -> (64, 16)."""
    first = max(16, 1 << (width.bit_length() - 1))
    if width <= first:
        return first, 0
    second = max(16, 1 << (width - first - 1).bit_length())
    return (first, second) if second < first else (2 * first, 0)


@triton.jit
def load_tile(pointer, n, stride, ROWS: tl.constexpr, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, C1)[None, :]
    inside = rows < n
    if C1 > C:
        inside = inside & (columns < C)
    first = tl.load(pointer + rows * stride + columns, mask=inside, other=0.0)
    second = first
    if C2 > 0:
        columns = C1 + tl.arange(0, C2)[None, :]
        second = tl.load(pointer + rows * stride + columns, mask=(rows < n) & (columns < C), other=0.0)
    return first, second


@triton.jit
def zero_tile(ROWS: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    first = tl.zeros((ROWS, C1), tl.float32)
    second = first
    if C2 > 0:
        second = tl.zeros((ROWS, C2), tl.float32)
    return first, second


@triton.jit
def store_tile(pointer, tile, n, stride, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    rows = tl.arange(0, tile[0].shape[0])[:, None]
    columns = tl.arange(0, C1)[None, :]
    inside = rows < n
    if C1 > C:
        inside = inside & (columns < C)
    tl.store(pointer + rows * stride + columns, tile[0].to(pointer.dtype.element_ty), mask=inside)
    if C2 > 0:
        columns = C1 + tl.arange(0, C2)[None, :]
        inside = (rows < n) & (columns < C)
        tl.store(pointer + rows * stride + columns, tile[1].to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_row(pointer, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    columns = tl.arange(0, C1)
    first = tl.load(pointer + columns, mask=columns < C, other=0.0).to(tl.float32)
    second = first
    if C2 > 0:
        columns = C1 + tl.arange(0, C2)
        second = tl.load(pointer + columns, mask=columns < C, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_row(pointer, row, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    columns = tl.arange(0, C1)
    tl.store(pointer + columns, row[0].to(pointer.dtype.element_ty), mask=columns < C)
    if C2 > 0:
        columns = C1 + tl.arange(0, C2)
        tl.store(pointer + columns, row[1].to(pointer.dtype.element_ty), mask=columns < C)


@triton.jit
def dot_rows(a, b, C2: tl.constexpr):
    """a . b of two rows, a scalar."""
    product = tl.sum(a[0] * b[0], 0)
    if C2 > 0:
        product += tl.sum(a[1] * b[1], 0)
    return product


@triton.jit
def dot_row(tile, row, C2: tl.constexpr):
    """Every row of a tile . one row: (ROWS,), float32."""
    product = tl.sum(tile[0].to(tl.float32) * row[0][None, :], 1)
    if C2 > 0:
        product += tl.sum(tile[1].to(tl.float32) * row[1][None, :], 1)
    return product


@triton.jit
def add_rank_one(tile, weights, row, C2: tl.constexpr):
    """tile + weights row^T."""
    first = tile[0] + weights[:, None] * row[0][None, :]
    second = first
    if C2 > 0:
        second = tile[1] + weights[:, None] * row[1][None, :]
    return first, second


@triton.jit
def weighted_rows(weights, tile, weight, row, C2: tl.constexpr):
    """sum of weights[i] * tile[i], plus weight * row: a row."""
    first = tl.sum(weights[:, None] * tile[0].to(tl.float32), 0) + weight * row[0]
    second = first
    if C2 > 0:
        second = tl.sum(weights[:, None] * tile[1].to(tl.float32), 0) + weight * row[1]
    return first, second


@triton.jit
def outer(a, b, C2: tl.constexpr):
    """a b^T over the width of a head: (rows of a, rows of b), float32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if C2 > 0:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision="ieee")
    return product


@triton.jit
def weighted(weights, tile, C2: tl.constexpr):
    """weights @ tile, a pair of column blocks, float32."""
    first = tl.dot(weights, tile[0], input_precision="ieee")
    second = first
    if C2 > 0:
        second = tl.dot(weights, tile[1], input_precision="ieee")
    return first, second


@triton.jit
def weighted_sum(total, weights, tile, C2: tl.constexpr):
    """total + weights @ tile."""
    first = tl.dot(weights, tile[0], total[0], input_precision="ieee")
    second = first
    if C2 > 0:
        second = tl.dot(weights, tile[1], total[1], input_precision="ieee")
    return first, second


@triton.jit
def scaled(tile, factor):
    return tile[0] * factor, tile[1] * factor


@triton.jit
def log2_scores(query, key, n_keys, scale, C2: tl.constexpr):
    """Scores times log2(e), -inf at the keys that are not there."""
    scores = outer(query, key, C2) * (scale * LOG2E)
    present = tl.arange(0, key[0].shape[0])[None, :] < n_keys
    return tl.where(present, scores, float("-inf"))
