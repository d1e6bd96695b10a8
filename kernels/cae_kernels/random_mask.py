"""Which patches of each image are masked, at random: those with the smallest random numbers.

Patch n takes word n % 4 of draw n // 4 of STREAM_MASK; the kernel makes the same bits as the torch version, one image a
program.

B images, N = height * width patches (row-major), Nm masked, Nv = N - Nm visible.
"""

import torch
from torch import Tensor

from .dispatch import backend
from .parts.philox import STREAM_MASK, draw, draw_words, signed
from .parts.triton_language import tl, triton

SETTINGS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


def random_mask(positions: Tensor, *, seed: int, height: int, width: int, num_masked: int) -> tuple[Tensor, Tensor]:
    """Uniformly random masks; arguments, results and errors as in `block_mask`."""
    check_count(height, width, num_masked)
    run = {"triton": _launch, "reference": random_mask_reference}[backend("random_mask", positions)]
    return run(positions.contiguous(), seed, height * width, num_masked)


def random_mask_reference(positions: Tensor, seed: int, patches: int, num_masked: int) -> tuple[Tensor, Tensor]:
    draws = torch.arange((patches + 3) // 4, device=positions.device)  # (ceil(N / 4),)
    words = torch.stack(draw(seed, STREAM_MASK, draws, positions[:, None]), dim=-1).flatten(1)  # (B, >= N)
    order = words[:, :patches].argsort(dim=1, stable=True)  # (B, N)
    return order[:, num_masked:].sort(dim=1).values, order[:, :num_masked].sort(dim=1).values


@triton.jit
def store_ids(visible_ids, masked_ids, image, masked, N: tl.constexpr, NUM_MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The patches that are masked (bool) and those that are not, each in ascending order."""
    patch = tl.arange(0, BLOCK)
    masked = masked & (patch < N)
    rank = tl.cumsum(masked.to(tl.int32), 0)  # 1 at the first masked patch
    ids = patch.to(tl.int64)
    tl.store(masked_ids + image * NUM_MASKED + rank - 1, ids, mask=masked)
    visible = (patch < N) & (masked == 0)
    tl.store(visible_ids + image * (N - NUM_MASKED) + patch - rank, ids, mask=visible)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _random_kernel(
    positions,  # (B,) int64
    visible_ids, masked_ids,  # (B, Nv), (B, Nm) int64
    seed_low, seed_high,  # halves of the seed, int32
    N: tl.constexpr, NUM_MASKED: tl.constexpr, STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK)
    draw = (patch // 4).to(tl.uint32)
    first, second, third, fourth = draw_words(draw, tl.load(positions + image), seed_low, seed_high, STREAM)
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
    store_ids(visible_ids, masked_ids, image, key <= threshold, N, NUM_MASKED, BLOCK)


def new_ids(positions: Tensor, patches: int, num_masked: int) -> tuple[Tensor, Tensor]:
    visible_ids = positions.new_empty(len(positions), patches - num_masked)  # (B, Nv)
    return visible_ids, positions.new_empty(len(positions), num_masked)  # (B, Nm)


def _launch(positions: Tensor, seed: int, patches: int, num_masked: int) -> tuple[Tensor, Tensor]:
    visible_ids, masked_ids = new_ids(positions, patches, num_masked)
    _random_kernel[(len(positions),)](
        positions=positions, visible_ids=visible_ids, masked_ids=masked_ids,
        seed_low=signed(seed), seed_high=signed(seed >> 32),
        N=patches, NUM_MASKED=num_masked, STREAM=STREAM_MASK, BLOCK=triton.next_power_of_2(patches), **SETTINGS,
    )  # fmt: skip
    return visible_ids, masked_ids


def check_count(height: int, width: int, num_masked: int) -> None:
    for name, side in (("height", height), ("width", width)):
        if side < 1:
            raise ValueError(f"{name}: {side} patches; at least 1 is needed")
    if not 1 <= num_masked < height * width:
        raise ValueError(
            f"num_masked: {num_masked} of {height}x{width} patches; must be from 1 to {height * width - 1}"
        )
