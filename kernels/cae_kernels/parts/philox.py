"""Counter-based random numbers: Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).

A number is a pure function of (seed; draw, global sample position, stream), so no generator has a state to save, and
the order, the split into batches and the device do not matter. Counter words: c0 draw number, c1 and c3 the low and
high 32 bits of the position, c2 the stream; key: the low and high 32 bits of the seed.
"""

import torch
from torch import Tensor

from .triton_language import tl, triton

# Uses of one position's numbers; all other streams belong to the data pipeline.
STREAM_MASK = 3
STREAM_DROP_PATH = 4
ROUNDS = 10

_LOW_32 = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = tl.constexpr(ROUNDS)


def philox4x32(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit random words per counter.

    seed: the key, taken modulo 2**64. c0 to c3: counter words, int64 in [0, 2**32), shapes that broadcast.
    Returns four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    k0, k1 = seed & _LOW_32, seed >> 32 & _LOW_32
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _LOW_32, (k1 + _WEYL_1) & _LOW_32
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit words; all intermediates stay below 2**49, so int64 never overflows."""
    lower = a * (b & 0xFFFF)
    upper = a * (b >> 16) + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1), a multiple of 2**-24, from the top 24 of 32 random bits (int64 in [0, 2**32))."""
    return (bits >> 8).to(torch.float32) * 2.0**-24


def draw(seed: int, stream: int, draws: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """philox4x32 with this project's counter layout; draws and positions are int64 tensors >= 0 that broadcast."""
    stream_word = torch.full((), stream, device=positions.device)
    return philox4x32(seed, draws, positions & _LOW_32, stream_word, positions >> 32)


@triton.jit
def draw_words(draw, position, seed_low, seed_high, STREAM: tl.constexpr):
    """`draw` in a kernel; draw: uint32, position: int64, of one shape or scalars; the seed in halves of `signed`."""
    zero = draw & 0
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    key_low, key_high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    return tl.philox_impl(draw, zero + low, zero + STREAM, zero + high, key_low, key_high, _ROUNDS)


@triton.jit
def uniform_word(bits):
    return (bits >> 8).to(tl.float32) * (2.0**-24)


def signed(word: int) -> int:
    """The int32 with the same bits as the low 32 of `word`, so that every seed gives arguments of one type."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word
