"""Which patches of each image are masked: block-wise (BEiT, arXiv 2106.08254, Algorithm 1, as in CAE) or at random.

Block-wise: rectangles are proposed independently and the first acceptable one is masked, until the count is reached.
With `limit` = min(patches still to mask, max_block), a proposal has
    area   uniform between min_block and limit (in this order also when limit < min_block),
    aspect log-uniform in [min_aspect, 1 / min_aspect],
    size   round(sqrt(area * aspect)) x round(sqrt(area / aspect)), at a uniform place inside the grid,
and is acceptable if its sides are smaller than the grid's and it adds between 1 and `limit` patches. (The original
tries ten proposals and starts again with the same limit when all fail, which is the same law.)

Proposal t of the image at global position p takes the four words of draw t of STREAM_MASK: area, aspect, row, column.
All arithmetic is float32 additions, multiplications, one division and square roots, each rounded on its own, and no
library exponential, so that every device and every implementation that rounds likewise makes the same masks.

Shapes: B images, N = height * width patches (row-major), Nm masked, Nv = N - Nm visible, T proposals drawn at once.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import backend
from .mask_kernels import launch_block_mask, launch_random_mask
from .philox import STREAM_MASK, draw, uniform

MAX_PROPOSALS = 4096
_DRAWN_AT_ONCE = 32
_LOWEST_FITTING_SHARE = 0.01


def block_mask(
    positions: Tensor,
    *,
    seed: int,
    height: int,
    width: int,
    num_masked: int,
    min_block: int = 16,
    max_block: int | None = None,
    min_aspect: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Block-wise masks with exactly `num_masked` masked patches each.

    positions: (B,) int64 >= 0, the images' global positions in the run; the masks depend on nothing else and `seed`.
    height, width: the grid in patches. min_block, max_block: areas in patches; max_block None means num_masked.
    Returns visible_ids (B, Nv) and masked_ids (B, Nm), int64, ascending, on the device of `positions`.
    An image that still lacks patches after MAX_PROPOSALS proposals gets its first visible ones masked.
    Raises ValueError, naming the argument, for sizes that no mask can have.
    """
    _check_count(height, width, num_masked)
    max_block = num_masked if max_block is None else max_block
    _check_blocks(height, width, num_masked, min_block, max_block, min_aspect)
    run = {"triton": launch_block_mask, "reference": block_mask_reference}[backend("block_mask", positions)]
    positions = positions.contiguous()
    return run(positions, seed, height, width, num_masked, min_block, max_block, min_aspect, MAX_PROPOSALS)


def block_mask_reference(
    positions: Tensor,
    seed: int,
    height: int,
    width: int,
    num_masked: int,
    min_block: int,
    max_block: int,
    min_aspect: float,
    max_proposals: int,
) -> tuple[Tensor, Tensor]:
    free = torch.ones(len(positions), height, width, dtype=torch.float32, device=positions.device)  # 0 once masked
    remaining = free.new_full((len(positions),), num_masked)  # (B,) patches left to mask
    active = torch.arange(len(positions), device=positions.device)
    for first in range(0, max_proposals, _DRAWN_AT_ONCE):
        proposals = _draw_proposals(positions[active], seed, first, min_aspect)
        free[active], remaining[active] = _place(free[active], remaining[active], proposals, min_block, max_block)
        active = active[remaining[active] > 0]
        if len(active) == 0:
            break
    free = free.flatten(1)
    rank = free.cumsum(dim=1)  # (B, N), 1 at the first visible patch
    return _split(free.masked_fill(rank <= remaining[:, None], 0.0), num_masked)


def random_mask(positions: Tensor, *, seed: int, height: int, width: int, num_masked: int) -> tuple[Tensor, Tensor]:
    """Uniformly random masks; arguments, results and errors as in `block_mask`.

    Masks the patches with the smallest 32-bit random numbers; patch n takes word n % 4 of draw n // 4 of STREAM_MASK.
    """
    _check_count(height, width, num_masked)
    run = {"triton": launch_random_mask, "reference": random_mask_reference}[backend("random_mask", positions)]
    return run(positions.contiguous(), seed, height * width, num_masked)


def random_mask_reference(positions: Tensor, seed: int, patches: int, num_masked: int) -> tuple[Tensor, Tensor]:
    draws = torch.arange((patches + 3) // 4, device=positions.device)  # (ceil(N / 4),)
    words = torch.stack(draw(seed, STREAM_MASK, draws, positions[:, None]), dim=-1).flatten(1)  # (B, >= N)
    order = words[:, :patches].argsort(dim=1, stable=True)  # (B, N)
    return order[:, num_masked:].sort(dim=1).values, order[:, :num_masked].sort(dim=1).values


class _Proposals(NamedTuple):
    area: Tensor  # (B, T) float32 in [0, 1), from one end of the range of areas to the other
    stretch: Tensor  # (2, B, T) float32, sqrt(aspect) for the rows and 1 / sqrt(aspect) for the columns
    place: Tensor  # (2, B, T) float32 in [0, 1), from the first possible row and column to the last


def _draw_proposals(positions: Tensor, seed: int, first: int, min_aspect: float) -> _Proposals:
    draws = torch.arange(first, first + _DRAWN_AT_ONCE, device=positions.device)  # (T,)
    words = draw(seed, STREAM_MASK, draws, positions[:, None])
    area, aspect, row, column = (uniform(bits) for bits in words)  # each (B, T)
    half_log = 0.5 * math.log(min_aspect)
    stretch = _exp(aspect * (-2.0 * half_log) + half_log)  # (B, T)
    return _Proposals(area, torch.stack((stretch, 1.0 / stretch)), torch.stack((row, column)))


def _exp(x: Tensor) -> Tensor:
    """exp by its Taylor polynomial at x / 16, squared four times; relative error below 3e-6 for |x| <= 4."""
    x = x * 0.0625
    power = torch.full_like(x, 1.0 / 720.0)
    for coefficient in (1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0):
        power = power * x + coefficient
    for _ in range(4):
        power = power * power
    return power


def _place(
    free: Tensor, remaining: Tensor, proposals: _Proposals, min_block: int, max_block: int
) -> tuple[Tensor, Tensor]:
    """Go through T proposals per image; each round looks at all of them and masks each image's next acceptable one.

    free: (B, height, width) float32. remaining: (B,) float32. Returns both as they are after the T proposals.
    """
    images, height, width = free.shape
    count = proposals.area.shape[1]
    sides = torch.tensor([height, width], dtype=torch.float32, device=free.device)[:, None, None]  # (2, 1, 1)
    coordinate = torch.arange(max(height, width), dtype=torch.float32, device=free.device)
    index = torch.arange(count, device=free.device)
    chosen = index.new_full((images, 1), -1)  # (B, 1); `count` when no acceptable proposal is left
    while True:
        limit = remaining.clamp(max=float(max_block))[:, None]  # (B, 1), 0 once the mask is complete
        root = torch.sqrt((limit - float(min_block)) * proposals.area + float(min_block))  # (B, T)
        size = torch.minimum(torch.floor(root * proposals.stretch + 0.5), sides)  # (2, B, T) rows and columns
        start = torch.floor((sides - size + 1.0) * proposals.place)
        end = start + size
        new = _count_free(free, start, end)  # (B, T)
        acceptable = (size < sides).all(dim=0) & (new > 0.0) & (new <= limit) & (index > chosen)
        chosen = torch.where(acceptable, index, count).amin(dim=1, keepdim=True)
        placed = chosen < count  # (B, 1)
        if not placed.any():
            return free, remaining
        pick = chosen.clamp(max=count - 1)
        corner = pick.expand(2, -1, -1)
        inside = (coordinate >= start.gather(2, corner)) & (coordinate < end.gather(2, corner) * placed)
        free = free.masked_fill(inside[0, :, :height, None] & inside[1, :, None, :width], 0.0)
        remaining = remaining - (new.gather(1, pick) * placed)[:, 0]


def _count_free(free: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Free patches, of free (B, height, width), in the rectangles [start, end), both (2, B, T); a summed-area table."""
    images, height, width = free.shape
    table = free.new_zeros(images, height + 1, width + 1)
    table[:, 1:, 1:] = free.cumsum(dim=2).cumsum(dim=1)
    table = table.flatten(1)
    top, bottom = start[0] * (width + 1.0), end[0] * (width + 1.0)
    left, right = start[1], end[1]

    def at(index: Tensor) -> Tensor:
        return table.gather(1, index.to(torch.int64))

    return at(bottom + right) - at(top + right) - at(bottom + left) + at(top + left)


def _split(free: Tensor, num_masked: int) -> tuple[Tensor, Tensor]:
    order = free.argsort(dim=1, stable=True)  # (B, N): masked patches first, both groups ascending
    return order[:, num_masked:].contiguous(), order[:, :num_masked].contiguous()


def _check_count(height: int, width: int, num_masked: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side < 1:
            raise ValueError(f"{name}: {side} patches; at least 1 is needed")
    if not 1 <= num_masked < height * width:
        raise ValueError(
            f"num_masked: {num_masked} of {height}x{width} patches; must be from 1 to {height * width - 1}"
        )


def _check_blocks(height: int, width: int, num_masked: int, min_block: int, max_block: int, min_aspect: float) -> None:
    for name, side in (("height", height), ("width", width)):
        if side < 2:
            raise ValueError(f"{name}: {side} patches; blocks are smaller than the grid, so at least 2 are needed")
    if not 0.0 < min_aspect <= 1.0:
        raise ValueError(f"min_aspect: {min_aspect}; must be in (0, 1]")
    if min_block < 1:
        raise ValueError(f"min_block: {min_block}; must be at least 1")
    if max_block < 1:
        raise ValueError(f"max_block: {max_block}; must be at least 1")
    limit = min(num_masked, max_block)
    share = _fitting_share(height, width, min_block, limit, min_aspect)
    if share < _LOWEST_FITTING_SHARE:
        raise ValueError(
            f"min_block: with {min_block} (max_block {max_block}, min_aspect {min_aspect}), hardly any block is "
            f"smaller than the {height}x{width} grid and masks at most {limit} of its patches; lower it"
        )


def _fitting_share(height: int, width: int, min_block: int, limit: int, min_aspect: float) -> float:
    """Probability that the very first proposal is acceptable, from 64 x 64 areas and aspects."""
    quantile = (torch.arange(64, dtype=torch.float32, device="cpu") + 0.5) / 64.0
    root = torch.sqrt(min_block + (limit - min_block) * quantile)[:, None]
    stretch = torch.exp(math.log(min_aspect) * (0.5 - quantile))
    rows, columns = torch.floor(root * stretch + 0.5), torch.floor(root / stretch + 0.5)
    new = rows * columns
    fits = (rows < height) & (columns < width) & (new > 0) & (new <= limit)
    return float(fits.float().mean())
