"""Which images, crops and flips make up a step: a pure function of (seed, step, global sample position).

Nothing here has a state, so a run resumes at any step and with any number of processes with the same batches.
Image j of step s has the global position s * global_batch_size + j. The order of an epoch is a Feistel permutation
keyed by (seed, epoch) (constant memory, no shuffled list), of all images or of tar files (ShardOrder); crops and flips
are Philox4x32-10 numbers keyed by the seed and counted by (draw, low word of the position, stream, high word of the
position).

Legend: n images, T tries, G global batch size.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cae_fast.config import RunConfig, UserError
from cae_fast.data.index import ImageIndex

# Streams keep the uses of one position's numbers apart; 3 (masks) and 4 (drop path) are drawn by cae_kernels.
ORDER = 0
CROP = 1
FLIP = 2
REPLACEMENT = 5
AUGMENT = 6
SHARD_START = 7
SHARD_SPREAD = 8

CROP_TRIES = 10
FEISTEL_ROUNDS = 8
WINDOW = 16  # tar files that are read at a time
CHUNK = 64  # neighbouring images of a tar file that are shuffled among each other
KEPT_WINDOWS = 4

_WORD = 0xFFFFFFFF

IntArray = NDArray[np.int64]
WordArray = NDArray[np.uint64]


def philox4x32(
    seed: int, c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike
) -> tuple[WordArray, WordArray, WordArray, WordArray]:
    """Philox4x32-10 (Salmon et al. 2011, Random123) of counters (c0, c1, c2, c3) under a 64-bit key.

    The counters are integers or uint64 arrays below 2**32 that broadcast; the four results are uint64 arrays of
    32-bit words, uniform and independent over counters and seeds.
    """
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in (c0, c1, c2, c3)))
    for _ in range(10):
        product0, product1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x2 = (product1 >> 32) ^ (x1 ^ np.uint64(key0)), (product0 >> 32) ^ (x3 ^ np.uint64(key1))
        x1, x3 = product1 & _WORD, product0 & _WORD
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return x0, x1, x2, x3


def _position_words(seed: int, draw: ArrayLike, positions: IntArray, stream: int) -> tuple[WordArray, ...]:
    return philox4x32(seed, draw, positions & _WORD, stream, positions >> 32)


def permute(indices: IntArray, size: int, seed: int, epoch: int) -> IntArray:
    """The images of `indices` under the permutation of range(size) keyed by (seed, epoch).

    An alternating Feistel network on Z_a x Z_b with a * b the least near-square product >= size; results outside the
    range are sent through it again (cycle-walking), which keeps it a bijection of range(size).
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    keys = _round_keys(seed, epoch)
    permuted = _feistel(indices.astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(permuted >= size)
    while len(outside):
        permuted[outside] = _feistel(permuted[outside], a, b, keys)
        outside = outside[permuted[outside] >= size]
    return permuted.astype(np.int64)


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    low, high, _, _ = philox4x32(seed, np.arange(FEISTEL_ROUNDS), epoch & _WORD, ORDER, epoch >> 32)
    return tuple(low | (high << 32))


def _feistel(x: WordArray, a: int, b: int, keys: tuple[np.uint64, ...]) -> WordArray:
    left, right = np.divmod(x, np.uint64(b))
    for key_left, key_right in zip(keys[::2], keys[1::2], strict=True):
        left = (left + _mix(right, key_left) % np.uint64(a)) % np.uint64(a)
        right = (right + _mix(left, key_right) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(x: WordArray, key: np.uint64) -> WordArray:
    """A 64-bit hash (the finalizer of SplitMix64) of x under a key."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class ShardOrder:
    """The order of an epoch over tar files: shuffled, read WINDOW at a time, each nearly from front to back.

    The images of a window are put in the order of their times in [0, 1): each tar file begins at a random image and
    goes round once, evenly over the whole window, and within each CHUNK of it the times are random. So all images of
    a window are mixed where the tar files hold at most CHUNK images, and where they hold more, about WINDOW * CHUNK
    neighbours in time are. Memory: the starts of all tar files and the images of a few windows.

    shard_starts: int64 (shards + 1,), the first image of each, then the number of images.
    """

    def __init__(self, shard_starts: IntArray, seed: int) -> None:
        self.shard_starts, self.seed = np.array(shard_starts, np.int64), seed
        self.epoch = -1  # that of what follows
        self.shards: list[IntArray] = []
        self.window_starts = np.zeros(1, np.int64)
        self.windows: dict[int, IntArray] = {}

    def sample_ids(self, places: IntArray, epoch: int) -> IntArray:
        """The images at places of the epoch's order, int64 (n,); a bijection of range(number of images)."""
        if epoch != self.epoch:
            num_shards = len(self.shard_starts) - 1
            order = permute(np.arange(num_shards), num_shards, self.seed, epoch)
            self.shards = [order[i : i + WINDOW] for i in range(0, num_shards, WINDOW)]
            sizes = np.add.reduceat(np.diff(self.shard_starts)[order], np.arange(0, num_shards, WINDOW))
            self.window_starts = np.append(0, sizes.cumsum())
            self.epoch, self.windows = epoch, {}

        numbers = np.searchsorted(self.window_starts, places, side="right") - 1
        sample_ids = np.empty_like(places)
        for number in np.unique(numbers).tolist():
            inside = numbers == number
            sample_ids[inside] = self._window(number)[places[inside] - self.window_starts[number]]
        return sample_ids

    def _window(self, number: int) -> IntArray:
        """The images of a window in the epoch's order."""
        if number not in self.windows:
            while len(self.windows) >= KEPT_WINDOWS:
                del self.windows[next(iter(self.windows))]
            self.windows[number] = self._order(self.shards[number])
        return self.windows[number]

    def _order(self, shards: IntArray) -> IntArray:
        starts = self.shard_starts[shards]
        sizes = self.shard_starts[shards + 1] - starts
        words, *_ = _position_words(self.seed, self.epoch, shards, SHARD_START)
        firsts = (words.astype(np.int64) * sizes) >> 32
        turns = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)  # when its tar file reads an image
        starts, firsts, sizes = (np.repeat(values, sizes) for values in (starts, firsts, sizes))
        sample_ids = starts + (firsts + turns) % sizes
        words, *_ = _position_words(self.seed, self.epoch, sample_ids, SHARD_SPREAD)
        chunks = turns - turns % CHUNK
        times = (chunks + words * 2.0**-32 * np.minimum(CHUNK, sizes - chunks)) / sizes
        return sample_ids[np.argsort(times, kind="stable")]


@dataclass
class SamplePlan:
    """What to read for n images of one step."""

    positions: IntArray  # global sample positions, (n,)
    sample_ids: IntArray  # entries of the index, (n,)
    boxes: NDArray[np.int32]  # crops in pixels as top, left, height, width, (n, 4)
    flips: NDArray[np.bool_]  # mirror left to right, (n,)


class SamplingPlan:
    """The sampling plan of a run.

    heights and widths are integer arrays of num_samples pixels (memory maps are welcome: only the drawn entries are
    read). An epoch is num_samples // global_batch_size steps; the images at the end of its order that do not fill a
    batch are left out of that epoch. shuffle: "global", or "shard" with shard_starts, the first image of each tar
    file (ShardOrder). Raises UserError for settings out of range.
    """

    def __init__(
        self,
        num_samples: int,
        heights: NDArray[np.integer],
        widths: NDArray[np.integer],
        global_batch_size: int,
        seed: int,
        crop_scale: Sequence[float],
        crop_ratio: Sequence[float],
        horizontal_flip: float,
        shuffle: str = "global",
        shard_starts: IntArray | None = None,
    ) -> None:
        if not 0 < global_batch_size <= num_samples:
            raise UserError(
                f"train.global_batch_size={global_batch_size}: must be 1 to {num_samples}, the number of images"
            )
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(f"data.crop_scale={list(crop_scale)}: must be two shares of the area, 0 < low <= high <= 1")
        if len(crop_ratio) != 2 or not 0 < crop_ratio[0] <= crop_ratio[1] < math.inf:
            raise UserError(f"data.crop_ratio={list(crop_ratio)}: must be two ratios, 0 < low <= high")
        if not 0 <= horizontal_flip <= 1:
            raise UserError(f"data.horizontal_flip={horizontal_flip}: must be a probability between 0 and 1")
        if shuffle not in ("global", "shard"):
            raise UserError(f"data.shuffle={shuffle}: must be global or shard")
        if shuffle == "shard" and shard_starts is None:
            raise UserError("data.shuffle=shard: the images are in a folder, not in tar files; set data.shuffle=global")

        self.num_samples = num_samples
        self.shard_order = ShardOrder(shard_starts, seed) if shuffle == "shard" and shard_starts is not None else None
        self.heights = np.asarray(heights)
        self.widths = np.asarray(widths)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.crop_scale = (float(crop_scale[0]), float(crop_scale[1]))
        self.crop_ratio = (float(crop_ratio[0]), float(crop_ratio[1]))
        self.horizontal_flip = horizontal_flip

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    def draw(self, step: int, start: int, stop: int) -> SamplePlan:
        """Images start..stop (0 <= start <= stop <= G) of the global batch of a step."""
        if step < 0 or not 0 <= start <= stop <= self.global_batch_size:
            raise ValueError(f"step {step}, images {start}..{stop}: outside a global batch of {self.global_batch_size}")
        epoch, first = self._place(step * self.global_batch_size)
        positions = step * self.global_batch_size + np.arange(start, stop, dtype=np.int64)
        sample_ids = self._sample_ids(first + np.arange(start, stop, dtype=np.int64), epoch)
        words, *_ = _position_words(self.seed, 0, positions, FLIP)
        flips = words < self.horizontal_flip * 2.0**32
        return SamplePlan(positions, sample_ids, self.boxes(positions, sample_ids), flips)

    def replacement(self, position: int, attempt: int) -> int:
        """The substitute for the image at a position whose file cannot be used; attempt counts from 1.

        It is another image of the same epoch's order, at a pseudo-random distance; the attempts
        1..num_samples - 1 are all different and none is the image itself.
        """
        epoch, place = self._place(position)
        others = max(self.num_samples - 1, 1)
        word, *_ = _position_words(self.seed, 0, np.array([position]), REPLACEMENT)
        distance = 1 + (int(word[0]) + attempt - 1) % others
        place = (place + distance) % self.num_samples
        return int(self._sample_ids(np.array([place]), epoch)[0])

    def _sample_ids(self, places: IntArray, epoch: int) -> IntArray:
        if self.shard_order is not None:
            return self.shard_order.sample_ids(places, epoch)
        return permute(places, self.num_samples, self.seed, epoch)

    def augment_seed(self, position: int) -> int:
        """The seed, below 2**32, of whatever else is random about the image at a position."""
        word, *_ = _position_words(self.seed, 0, np.array([position]), AUGMENT)
        return int(word[0])

    def _place(self, position: int) -> tuple[int, int]:
        """(epoch, place in the epoch's order) of a global position."""
        step, image = divmod(position, self.global_batch_size)
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_of_epoch * self.global_batch_size + image

    def boxes(self, positions: IntArray, sample_ids: IntArray) -> NDArray[np.int32]:
        """Random resized crops, int32 (n, 4): top, left, height, width in pixels.

        The law of torchvision's RandomResizedCrop.get_params: the first of ten tries (area share uniform, log of the
        ratio uniform) that fits into the image, at a uniform place; else the largest central crop of a valid ratio.
        """
        heights, widths = self.heights[sample_ids].astype(np.int64), self.widths[sample_ids].astype(np.int64)
        boxes = self._central_boxes(heights, widths)
        todo = np.arange(len(positions))
        for draws in (np.arange(1), np.arange(1, CROP_TRIES)):  # the first try is enough for most images
            tried, fits = self._try_boxes(positions[todo], heights[todo], widths[todo], draws)
            found = fits.any(axis=1)
            boxes[todo[found]] = tried[found, fits[found].argmax(axis=1)]
            todo = todo[~found]
            if not len(todo):
                break
        return boxes

    def _try_boxes(
        self, positions: IntArray, heights: IntArray, widths: IntArray, draws: IntArray
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Crops int32 (n, T, 4) of the given draws and whether they fit, bool (n, T)."""
        heights, widths = heights[:, None], widths[:, None]
        share, ratio, row, column = _position_words(self.seed, draws, positions[:, None], CROP)
        low, high = self.crop_scale
        area = (low + (high - low) * (share * 2.0**-32)) * (heights * widths)  # (n, T)
        log_low, log_high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        aspect = np.exp(log_low + (log_high - log_low) * (ratio * 2.0**-32))  # (n, T)
        crop_widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        crop_heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (crop_widths > 0) & (crop_widths <= widths) & (crop_heights > 0) & (crop_heights <= heights)
        tops = (row.astype(np.int64) * np.maximum(heights - crop_heights + 1, 1)) >> 32
        lefts = (column.astype(np.int64) * np.maximum(widths - crop_widths + 1, 1)) >> 32
        return np.stack([tops, lefts, crop_heights, crop_widths], axis=-1).astype(np.int32), fits

    def _central_boxes(self, heights: IntArray, widths: IntArray) -> NDArray[np.int32]:
        """The largest central crops whose ratio is allowed, int32 (n, 4); at least one pixel."""
        low, high = self.crop_ratio
        ratio = widths / heights
        crop_heights = np.where(ratio < low, np.rint(widths / low), heights).clip(1).astype(np.int64)
        crop_widths = np.where(ratio > high, np.rint(heights * high), widths).clip(1).astype(np.int64)
        tops, lefts = (heights - crop_heights) // 2, (widths - crop_widths) // 2
        return np.stack([tops, lefts, crop_heights, crop_widths], axis=-1).astype(np.int32)


def sampling_plan(config: RunConfig, index: ImageIndex) -> SamplingPlan:
    """The plan of a run over the images of an index, by the settings under data. and train."""
    data, train = config.data, config.train
    return SamplingPlan(
        len(index),
        index.heights,
        index.widths,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        horizontal_flip=data.horizontal_flip,
        shuffle=data.shuffle,
        shard_starts=index.shard_starts,
    )
