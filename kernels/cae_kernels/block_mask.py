"""Which patches of each image are masked: block-wise (BEiT, arXiv 2106.08254, Algorithm 1, as in CAE).

Rectangles are proposed independently and the first acceptable one is masked, until the count is reached.
With `limit` = min(patches still to mask, max_block), a proposal has
    area   uniform between min_block and limit (in this order also when limit < min_block),
    aspect log-uniform in [min_aspect, 1 / min_aspect],
    size   round(sqrt(area * aspect)) x round(sqrt(area / aspect)), at a uniform place inside the grid,
and is acceptable if its sides are smaller than the grid's and it adds between 1 and `limit` patches. (The original
tries ten proposals and starts again with the same limit when all fail, which is the same law.)

Proposal t of the image at global position p takes the four words of draw t of STREAM_MASK: area, aspect, row, column.
All arithmetic is float32 additions, multiplications, one division and square roots, each rounded on its own, and no
library exponential, so that every device and every implementation that rounds likewise makes the same masks. The
kernel, one image a program, is compiled without fused multiply-adds and rounds divisions and square roots correctly.

Shapes: B images, N = height * width patches (row-major), Nm masked, Nv = N - Nm visible, T proposals drawn at once.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import backend
from .parts.philox import STREAM_MASK, draw, draw_words, signed, uniform, uniform_word
from .parts.triton_language import tl, triton
from .random_mask import SETTINGS, check_count, new_ids, store_ids

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
    check_count(height, width, num_masked)
    max_block = num_masked if max_block is None else max_block
    _check_blocks(height, width, num_masked, min_block, max_block, min_aspect)

    run = {"triton": _launch, "reference": block_mask_reference}[backend("block_mask", positions)]
    return run(
        positions.contiguous(), seed=seed, height=height, width=width, num_masked=num_masked,
        min_block=min_block, max_block=max_block, min_aspect=min_aspect, max_proposals=MAX_PROPOSALS,
    )  # fmt: skip


def block_mask_reference(
    positions: Tensor,
    *,
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

    # An image that still lacks patches gets its first visible ones masked.
    free = free.flatten(1)
    rank = free.cumsum(dim=1)  # (B, N), 1 at the first visible patch
    masked_first = free.masked_fill(rank <= remaining[:, None], 0.0).argsort(dim=1, stable=True)  # (B, N)
    return masked_first[:, num_masked:].contiguous(), masked_first[:, :num_masked].contiguous()


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


@triton.jit
def _exp_one(x):
    """As _exp."""
    x = x * 0.0625
    power = x * (1.0 / 720.0) + 1.0 / 120.0
    power = power * x + 1.0 / 24.0
    power = power * x + 1.0 / 6.0
    power = power * x + 0.5
    power = power * x + 1.0
    power = power * x + 1.0
    power = power * power
    power = power * power
    power = power * power
    return power * power


@triton.jit
def _place_one(limit, stretch, area, place, SIDE: tl.constexpr, MIN_BLOCK: tl.constexpr):
    """Start and length of a proposal along one side."""
    root = tl.sqrt_rn((limit - MIN_BLOCK) * area + MIN_BLOCK)
    length = tl.minimum(tl.floor(root * stretch + 0.5), SIDE)
    return tl.floor((SIDE - length + 1.0) * place), length


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _block_kernel(
    positions,  # (B,) int64
    visible_ids, masked_ids,  # (B, Nv), (B, Nm) int64
    seed_low, seed_high,  # halves of the seed, int32
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, NUM_MASKED: tl.constexpr,
    MIN_BLOCK: tl.constexpr, MAX_BLOCK: tl.constexpr,  # areas, as floats
    LOG_SLOPE: tl.constexpr, LOG_START: tl.constexpr,  # log(sqrt(aspect)) of a uniform number
    MAX_PROPOSALS: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + image)
    patch = tl.arange(0, BLOCK)
    row, column = (patch // WIDTH).to(tl.float32), (patch % WIDTH).to(tl.float32)
    free = (patch < HEIGHT * WIDTH).to(tl.float32)
    remaining = tl.sum(free, 0) * 0.0 + NUM_MASKED
    proposal = tl.program_id(0) * 0

    while (proposal < MAX_PROPOSALS) & (remaining > 0.0):
        area, aspect, vertical, horizontal = draw_words(proposal.to(tl.uint32), position, seed_low, seed_high, STREAM)
        stretch = _exp_one(uniform_word(aspect) * LOG_SLOPE + LOG_START)
        limit = tl.minimum(remaining, MAX_BLOCK)
        area = uniform_word(area)
        top, rows = _place_one(limit, stretch, area, uniform_word(vertical), HEIGHT, MIN_BLOCK)
        stretch = tl.div_rn(1.0, stretch)
        left, columns = _place_one(limit, stretch, area, uniform_word(horizontal), WIDTH, MIN_BLOCK)

        inside = (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns)
        new = tl.sum(tl.where(inside, free, 0.0), 0)
        fits = (rows < HEIGHT) & (columns < WIDTH) & (new > 0.0) & (new <= limit)
        free = tl.where(inside & fits, 0.0, free)
        remaining = tl.where(fits, remaining - new, remaining)
        proposal += 1

    rank = tl.cumsum(free, 0)
    masked = (free == 0.0) | (rank <= remaining)
    store_ids(visible_ids, masked_ids, image, masked, HEIGHT * WIDTH, NUM_MASKED, BLOCK)


def _launch(positions, *, seed, height, width, num_masked, min_block, max_block, min_aspect, max_proposals):
    visible_ids, masked_ids = new_ids(positions, height * width, num_masked)
    half_log = 0.5 * math.log(min_aspect)
    _block_kernel[(len(positions),)](
        positions=positions, visible_ids=visible_ids, masked_ids=masked_ids,
        seed_low=signed(seed), seed_high=signed(seed >> 32), HEIGHT=height, WIDTH=width, NUM_MASKED=num_masked,
        MIN_BLOCK=float(min_block), MAX_BLOCK=float(max_block), LOG_SLOPE=-2.0 * half_log, LOG_START=half_log,
        MAX_PROPOSALS=max_proposals, STREAM=STREAM_MASK, BLOCK=triton.next_power_of_2(height * width), **SETTINGS,
    )  # fmt: skip
    return visible_ids, masked_ids


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
