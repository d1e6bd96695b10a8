"""block_mask and random_mask as Triton kernels: one image a program, the same bits as the torch versions.

Every float32 operation is rounded on its own, so the block kernel must be compiled without fused multiply-adds and
divide and take square roots with correct rounding.

B images, N = height * width patches, Nm masked, Nv visible.
"""

import math

from torch import Tensor

from .philox import STREAM_MASK
from .report_spec import Spec
from .triton_language import tl, triton

ROUNDS = 10
SETTINGS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def words(draw, position, seed_low, seed_high, STREAM: tl.constexpr, ROUNDS: tl.constexpr):
    """The four words of philox.draw; draw: uint32, position: int64 scalar."""
    zero = draw & 0
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    key_low, key_high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    return tl.philox_impl(draw, zero + low, zero + STREAM, zero + high, key_low, key_high, ROUNDS)


@triton.jit
def uniform(bits):
    return (bits >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def _exp(x):
    """As block_mask._exp."""
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
def _place(limit, stretch, area, place, SIDE: tl.constexpr, MIN_BLOCK: tl.constexpr):
    """Start and length of a proposal along one side."""
    root = tl.sqrt_rn((limit - MIN_BLOCK) * area + MIN_BLOCK)
    length = tl.minimum(tl.floor(root * stretch + 0.5), SIDE)
    return tl.floor((SIDE - length + 1.0) * place), length


@triton.jit
def _store_ids(visible_ids, masked_ids, image, masked, N: tl.constexpr, NUM_MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The patches that are masked (bool) and those that are not, each in ascending order."""
    patch = tl.arange(0, BLOCK)
    masked = masked & (patch < N)
    rank = tl.cumsum(masked.to(tl.int32), 0)  # 1 at the first masked patch
    ids = patch.to(tl.int64)
    tl.store(masked_ids + image * NUM_MASKED + rank - 1, ids, mask=masked)
    visible = (patch < N) & (masked == 0)
    tl.store(visible_ids + image * (N - NUM_MASKED) + patch - rank, ids, mask=visible)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _block_kernel(
    positions, visible_ids, masked_ids, seed_low, seed_high,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, NUM_MASKED: tl.constexpr, MIN_BLOCK: tl.constexpr,
    MAX_BLOCK: tl.constexpr, LOG_SLOPE: tl.constexpr, LOG_START: tl.constexpr, MAX_PROPOSALS: tl.constexpr,
    STREAM: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + image)
    patch = tl.arange(0, BLOCK)
    row, column = (patch // WIDTH).to(tl.float32), (patch % WIDTH).to(tl.float32)
    free = (patch < HEIGHT * WIDTH).to(tl.float32)
    remaining = tl.sum(free, 0) * 0.0 + NUM_MASKED
    proposal = tl.program_id(0) * 0
    while (proposal < MAX_PROPOSALS) & (remaining > 0.0):
        area, aspect, vertical, horizontal = words(
            proposal.to(tl.uint32), position, seed_low, seed_high, STREAM, ROUNDS
        )
        stretch = _exp(uniform(aspect) * LOG_SLOPE + LOG_START)
        limit = tl.minimum(remaining, MAX_BLOCK)
        top, rows = _place(limit, stretch, uniform(area), uniform(vertical), HEIGHT, MIN_BLOCK)
        left, columns = _place(limit, tl.div_rn(1.0, stretch), uniform(area), uniform(horizontal), WIDTH, MIN_BLOCK)
        inside = (row >= top) & (row < top + rows) & (column >= left) & (column < left + columns)
        new = tl.sum(tl.where(inside, free, 0.0), 0)
        fits = (rows < HEIGHT) & (columns < WIDTH) & (new > 0.0) & (new <= limit)
        free = tl.where(inside & fits, 0.0, free)
        remaining = tl.where(fits, remaining - new, remaining)
        proposal += 1
    rank = tl.cumsum(free, 0)
    masked = (free == 0.0) | (rank <= remaining)
    _store_ids(visible_ids, masked_ids, image, masked, HEIGHT * WIDTH, NUM_MASKED, BLOCK)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _random_kernel(
    positions, visible_ids, masked_ids, seed_low, seed_high,
    N: tl.constexpr, NUM_MASKED: tl.constexpr, STREAM: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    draw = (patch // 4).to(tl.uint32)
    first, second, third, fourth = words(draw, tl.load(positions + image), seed_low, seed_high, STREAM, ROUNDS)
    word = patch % 4
    number = tl.where(word == 0, first, tl.where(word == 1, second, tl.where(word == 2, third, fourth)))
    key = number.to(tl.int64) * BLOCK + patch  # all different: equal numbers in the order of their patches
    key = tl.where(patch < N, key, BLOCK << 32)
    # The largest value below which there are fewer than NUM_MASKED keys is the NUM_MASKED-th smallest key.
    threshold = image * 0
    step = threshold + (BLOCK << 31)
    while step > 0:
        below = tl.sum((key < threshold + step).to(tl.int32), 0)
        threshold = tl.where(below < NUM_MASKED, threshold + step, threshold)
        step = step >> 1
    _store_ids(visible_ids, masked_ids, image, key <= threshold, N, NUM_MASKED, BLOCK)


def signed(word: int) -> int:
    """The int32 with the same bits as the low 32 of `word`, so that every seed gives arguments of one type."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def _outputs(positions: Tensor, patches: int, num_masked: int) -> tuple[Tensor, Tensor]:
    visible_ids = positions.new_empty(len(positions), patches - num_masked)  # (B, Nv)
    return visible_ids, positions.new_empty(len(positions), num_masked)  # (B, Nm)


def launch_block_mask(
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
    """visible_ids and masked_ids of block_mask for checked arguments; positions: (B,) int64, contiguous."""
    outputs = _outputs(positions, height * width, num_masked)
    half_log = 0.5 * math.log(min_aspect)
    _block_kernel[(len(positions),)](
        positions,
        *outputs,
        signed(seed),
        signed(seed >> 32),
        height,
        width,
        num_masked,
        float(min_block),
        float(max_block),
        -2.0 * half_log,
        half_log,
        max_proposals,
        STREAM_MASK,
        ROUNDS,
        triton.next_power_of_2(height * width),
        **SETTINGS,
    )
    return outputs


def launch_random_mask(positions: Tensor, seed: int, patches: int, num_masked: int) -> tuple[Tensor, Tensor]:
    """visible_ids and masked_ids of random_mask for checked arguments; positions: (B,) int64, contiguous."""
    outputs = _outputs(positions, patches, num_masked)
    block = triton.next_power_of_2(patches)
    _random_kernel[(len(positions),)](
        positions,
        *outputs,
        signed(seed),
        signed(seed >> 32),
        patches,
        num_masked,
        STREAM_MASK,
        ROUNDS,
        block,
        **SETTINGS,
    )
    return outputs


def report_specs() -> list[Spec]:
    pointers = dict.fromkeys(("positions", "visible_ids", "masked_ids"), "*i64:16")
    shared = {**pointers, "seed_low": "i32", "seed_high": "i32", "STREAM": STREAM_MASK, "ROUNDS": ROUNDS, "BLOCK": 256}
    blocks = {"MIN_BLOCK": 16.0, "LOG_SLOPE": 1.2, "LOG_START": -0.6, "MAX_PROPOSALS": 4096}
    options, narrow = {"enable_fp_fusion": False}, "ids go where their ranks say, a few KB an image"
    specs = []
    for model, batch, side, masked in (("ViT-L B256", 256, 14, 98), ("ViT-H B128", 128, 16, 128)):
        size = 8 * batch * (side * side + 1)
        grid = {"HEIGHT": side, "WIDTH": side, "NUM_MASKED": masked, "MAX_BLOCK": float(masked)}
        block, random = shared | blocks | grid, shared | {"N": side * side, "NUM_MASKED": masked}
        specs += [
            Spec(f"block_mask {model}", _block_kernel, block, 1, 1, batch, 0, size, options, narrow),
            Spec(f"random_mask {model}", _random_kernel, random, 1, 1, batch, 0, size, options, narrow),
        ]
    return specs
