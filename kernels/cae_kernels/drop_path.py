"""Drop path (Huang et al., Deep Networks with Stochastic Depth, arXiv 1603.09382): what every branch is multiplied by.

A pure function of seed and position, as everything random here. The torch version is 234 small launches, which a
GPU waits for where few images share a step; the kernel is one.

B samples, L residual branches.
"""

import torch
from torch import Tensor

from .dispatch import backend
from .parts.philox import STREAM_DROP_PATH, draw, draw_words, signed, uniform, uniform_word
from .parts.triton_language import tl, triton

BLOCK = 128
SETTINGS = {"num_warps": 4, "num_stages": 1}


def drop_path_scales(seed: int, positions: Tensor, rates: Tensor) -> Tensor:
    """What each residual branch of each sample is multiplied by.

    positions: (B,) int64, the samples' global positions. rates: (L,) float32 in [0, 1), drop probability per branch,
    on the same device. Returns (L, B) float32: 0 with probability rates[l], else 1 / (1 - rates[l]).
    Branch l uses word l % 4 of draw l // 4 of STREAM_DROP_PATH.
    """
    run = {"triton": _launch, "reference": drop_path_scales_reference}[backend("drop_path", positions)]
    return run(seed, positions, rates)


def drop_path_scales_reference(seed: int, positions: Tensor, rates: Tensor) -> Tensor:
    draws = torch.arange((len(rates) + 3) // 4, device=positions.device)[:, None]  # (ceil(L / 4), 1)
    numbers = torch.stack(draw(seed, STREAM_DROP_PATH, draws, positions[None]), dim=1)  # (ceil(L / 4), 4, B)
    keep = uniform(numbers.flatten(0, 1)[: len(rates)]) >= rates[:, None]  # (L, B)
    return keep.to(torch.float32) / (1.0 - rates[:, None])  # (L, B)


@triton.jit
def _store_scale(scales, rates, branch, word, sample, batch, branches):
    inside = (sample < batch) & (branch < branches)
    rate = tl.load(rates + branch, mask=branch < branches, other=0.0)
    kept = uniform_word(word) >= rate
    scale = tl.where(kept, tl.div_rn(1.0, 1.0 - rate), 0.0)
    tl.store(scales + branch.to(tl.int64) * batch + sample, scale, mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _kernel(
    positions, rates, scales,  # (B,) int64; (L,), (L, B) float32
    seed_low, seed_high,  # halves of the seed, int32
    batch, branches,  # B, L
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(1)
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions + sample, mask=sample < batch, other=0)
    draws = (sample * 0 + number).to(tl.uint32)
    first, second, third, fourth = draw_words(draws, position, seed_low, seed_high, STREAM)
    _store_scale(scales, rates, 4 * number, first, sample, batch, branches)
    _store_scale(scales, rates, 4 * number + 1, second, sample, batch, branches)
    _store_scale(scales, rates, 4 * number + 2, third, sample, batch, branches)
    _store_scale(scales, rates, 4 * number + 3, fourth, sample, batch, branches)


def _launch(seed: int, positions: Tensor, rates: Tensor) -> Tensor:
    batch, branches = len(positions), len(rates)
    scales = rates.new_empty(branches, batch)  # (L, B)
    grid = triton.cdiv(batch, BLOCK), triton.cdiv(branches, 4)
    _kernel[grid](
        positions=positions.contiguous(), rates=rates.contiguous(), scales=scales,
        seed_low=signed(seed), seed_high=signed(seed >> 32), batch=batch, branches=branches,
        STREAM=STREAM_DROP_PATH, BLOCK=BLOCK, **SETTINGS,
    )  # fmt: skip
    return scales
