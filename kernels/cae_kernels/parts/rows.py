"""What the kernels that normalize rows share: launch table, row arithmetic, sums of partial parameter gradients.

B batch, n tokens, D width, P programs, K parameter vectors.
A program works on a tile of ROWS rows and BLOCK columns, the power of two that holds D; statistics are float32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .triton_language import tl, triton

MAX_WIDTH = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_BLOCK = 128
# Eight elements of a row a thread: one 128-bit load of bfloat16, two of float32.
FORWARD_LAUNCH = {128: (16, 4), 256: (8, 4), 512: (4, 4), 1024: (2, 4), 2048: (2, 8), 4096: (1, 16)}  # ROWS, num_warps
# (ROWS, num_warps, programs): as many programs as an H100 holds; fixed, so that sums do not depend on the device.
BACKWARD_LAUNCH = {
    128: (8, 4, 396),
    256: (4, 4, 396),
    512: (2, 4, 396),
    1024: (1, 4, 396),
    2048: (1, 8, 264),
    4096: (1, 16, 132),
}
STAGES = 2  # rows in flight in a backward pass: the next ones are on their way while one tile is worked on
SUM_ROWS, SUM_COLUMNS = 64, 32


def block_of(width: int) -> int:
    """The tile's columns for rows of `width`. Raises ValueError above MAX_WIDTH."""
    if width > MAX_WIDTH:
        raise ValueError(f"rows are {width} wide: the kernels take at most {MAX_WIDTH}; CAE_KERNELS=op=reference runs")
    return max(SMALLEST_BLOCK, 1 << (width - 1).bit_length())


def launch_of(x: Tensor, table: Mapping[int, tuple[int, ...]]) -> tuple[int, dict[str, int]]:
    """Programs, and what a kernel is told about x, (B, n, D) with contiguous rows."""
    batch, tokens, width = x.shape
    block = block_of(width)
    tile, num_warps, *most = table[block]
    return min([triton.cdiv(batch * tokens, tile), *most]), {
        "rows": batch * tokens, "tokens": tokens, "batch_stride": x.stride(0), "row_stride": x.stride(1),
        "D": width, "BLOCK": block, "ROWS": tile, "num_warps": num_warps,
    }  # fmt: skip


def check_rows(x: Tensor, branch: Tensor | None, keep: Tensor | None, vectors: tuple[Tensor | None, ...]) -> None:
    """Raises ValueError unless x is (B, n, D), branch like it, keep (B,) and each of `vectors` (D,) without gaps."""
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}: it must be (B, n, D), float32, bfloat16 or float16")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}: it must be x's, {tuple(x.shape)}")
    if keep is not None and (keep.shape != x.shape[:1] or keep.stride(0) != 1):
        raise ValueError(f"keep is {tuple(keep.shape)} with strides {keep.stride()}: it must be ({len(x)},), no gaps")
    for vector in vectors:
        if vector is not None and (vector.shape != x.shape[2:] or vector.stride(0) != 1):
            shape, strides = tuple(vector.shape), vector.stride()
            raise ValueError(f"a parameter is {shape} with strides {strides}: it must be ({x.shape[2]},), no gaps")


def unit_columns(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous (however they are spaced), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def new_gradients(x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for d_x and d_branch, contiguous; nothing in the latter without a branch."""
    return x.new_empty(x.shape), x.new_empty(0) if branch is None else branch.new_empty(branch.shape)


@triton.jit
def tile_rows(first, rows, tokens, ROWS: tl.constexpr):
    """Row numbers, which of them exist, and the image of each."""
    row = first + tl.arange(0, ROWS)
    return row, row < rows, row // tokens


@triton.jit
def load_x(x, row, image, tokens, batch_stride, row_stride, column, inside):
    """Rows of x, (B, n, D) spaced anyhow, in float32."""
    offset = image.to(tl.int64) * batch_stride + (row - image * tokens) * row_stride
    return tl.load(x + offset[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_vector(vector, column, D: tl.constexpr):
    """All of a (D,) vector, as one row in float32."""
    return tl.load(vector + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_branch(branch, keep, offset, image, exists, inside):
    """Rows of the branch and their drop-path factor, a column. Those of dropped samples are not read: zeros."""
    if keep is not None:
        kept = tl.load(keep + image, mask=exists, other=0.0).to(tl.float32)[:, None]
        inside = inside & (kept != 0.0)
    else:
        kept = tl.full((1, 1), 1.0, tl.float32)
    return tl.load(branch + offset, mask=inside, other=0.0).to(tl.float32), kept


@triton.jit
def normalize(value, inside, eps, D: tl.constexpr):
    """(value - mean) / sqrt(var + eps) of each row, mean, and 1 / sqrt(var + eps)."""
    mean = tl.sum(value, 1) / D
    centered = tl.where(inside, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / D + eps)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def renormalize(value, stats, row, rows, exists):
    """The normalized rows and 1 / std again, from mean and 1 / std that the forward pass stored one after the other."""
    mean = tl.load(stats + row, mask=exists, other=0.0)
    rstd = tl.load(stats + rows + row, mask=exists, other=0.0)
    return (value - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def normalize_backward(d_hat, hat, rstd, D: tl.constexpr):
    """Gradient of the rows from that of the normalized rows, which is zero outside of the width."""
    along = tl.sum(d_hat * hat, 1) / D
    mean = tl.sum(d_hat, 1) / D
    return (d_hat - hat * along[:, None] - mean[:, None]) * rstd[:, None]


@triton.jit
def store_partial(partial, which, total, column, D: tl.constexpr):
    """This program's sum over its rows of vector number `which`, into partial (K, P, D)."""
    offset = (which * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * D
    tl.store(partial + offset + column, tl.sum(total, 0), mask=column < D)


@triton.jit
def _sum_rows_kernel(
    x, out,  # (K, rows, D), rows spaced anyhow; (K, D), contiguous
    rows, set_stride, row_stride,  # the number of rows; strides of x
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # a tile's rows and columns
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        offset = which * set_stride + row.to(tl.int64)[:, None] * row_stride + column[None, :]
        total += tl.load(x + offset, mask=(row < rows)[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    tl.store(out + which * D + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < D)


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums in a fixed order, float32 inside: (K, rows, D), rows spaced anyhow -> (K, D) in `dtype`."""
    sets, rows, width = x.shape
    out = x.new_empty((sets, width), dtype=dtype)  # (K, D)
    grid = (triton.cdiv(width, SUM_COLUMNS), sets)
    _sum_rows_kernel[grid](
        x=x, out=out, rows=rows, set_stride=x.stride(0), row_stride=x.stride(1),
        D=width, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
