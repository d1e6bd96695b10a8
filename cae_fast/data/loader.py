"""Batches for training, decoded by worker processes in the order of the sampling plan.

Legend: B images of a micro-batch, S image size, T token image size, Nv visible patches, Nm masked patches,
G global batch size, L images per process and step.
"""

import copy
import ctypes
import logging
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cae_fast.config import UserError
from cae_fast.data.decode import DecodeError, Decoder, Pixels, decode_rgb, resize_and_center_crop, resized_crop
from cae_fast.data.index import ImageIndex
from cae_fast.data.sampling import SamplingPlan

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 16
MAX_WORKERS = 12

Mask = Callable[[Tensor], tuple[Tensor, Tensor]]
Augment = Callable[[Image.Image], Image.Image]
Decode = Callable[[bytes, tuple[int, int]], Pixels]


@dataclass
class Batch:
    """One micro-batch."""

    images: Tensor
    """The encoder's view, uint8 (B, 3, S, S), bicubic."""
    token_images: Tensor | None
    """The tokenizer's view of the same crops, uint8 (B, 3, T, T), Lanczos."""
    visible_ids: Tensor
    """int64 (B, Nv), sorted."""
    masked_ids: Tensor
    """int64 (B, Nm), sorted."""
    positions: Tensor
    """Global sample positions, int64 (B,)."""
    sample_ids: Tensor
    """Entries of the index, after replacement, int64 (B,)."""
    replaced: list[tuple[int, str, str]] = field(default_factory=list)
    """(position, path, reason) of every file that could not be used."""

    def pin_memory(self) -> "Batch":
        return self._apply(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; from pinned memory the copies do not wait."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def _apply(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, function(value))
        return moved


def resolve_num_workers(num_workers: int | None, world_size: int) -> int:
    """Decoding processes of this training process: as given, else this machine's share of cores less one, 0 to 12.

    world_size: training processes on this machine. Raises UserError for a negative number.
    """
    if num_workers is not None:
        if num_workers < 0:
            raise UserError(f"data.num_workers={num_workers}: must be 0 or more, or empty")
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS: all
    return max(0, min(MAX_WORKERS, cores // world_size - 1))


def pretrain_loader(
    index: ImageIndex,
    plan: SamplingPlan,
    mask: Mask,
    *,
    image_size: int,
    token_size: int | None,
    start_step: int,
    stop_step: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    num_workers: int,
    pin_memory: bool,
    decoder: str = "cpu",
    device: torch.device | str = "cpu",
    augment: Augment | None = None,
) -> Generator[Batch, None, None]:
    """The micro-batches of process `rank` for the steps start_step..stop_step, in order.

    A process owns the images [rank * L, (rank + 1) * L) of each global batch, L = G / world_size, cut in order into
    L / micro_batch_size micro-batches. `mask` maps positions (B,) to (visible_ids, masked_ids) and must pickle.
    decoder: cpu or pil, both in worker processes into memory that `pin_memory` may pin, or dali, which decodes on
    `device` and leaves the batches there; crops, flips, masks and replacements are the same.
    `augment` changes the encoder's view, a Pillow image of S x S that it may not resize; it must pickle, and the global
    random numbers of random, numpy and torch are seeded by the position for it.
    A file that fails is replaced by plan.replacement and logged; `.close()` (or dropping the generator) ends the
    worker processes. They ignore SIGINT, and SIGTERM from others than the main process, so that it can finish its
    step.
    Raises UserError for sizes that do not divide, and while iterating when 16 files in a row fail.
    """
    share = plan.global_batch_size // world_size
    if micro_batch_size < 1 or plan.global_batch_size % (world_size * micro_batch_size):
        raise UserError(
            f"train.global_batch_size={plan.global_batch_size}: must be a multiple of processes x "
            f"train.micro_batch_size = {world_size} x {micro_batch_size}"
        )
    if plan.num_samples != len(index):
        raise ValueError(f"the plan has {plan.num_samples} images, the index {len(index)}")
    images = PlannedImages(index, plan, mask, image_size, token_size, "pil" if decoder == "pil" else "cpu", augment)
    sampler = _MicroBatches(range(start_step, stop_step), rank * share, share, micro_batch_size)
    if decoder == "dali":
        if augment is not None:
            raise UserError("data.backend is dali, which does not augment images: set data.backend=cpu")
        from cae_fast.data.dali import EncodedImages, decoded_batches

        loader = _data_loader(EncodedImages(images), sampler, num_workers)
        micro_batches = share // micro_batch_size
        return _announced(decoded_batches(loader, images, torch.device(device), micro_batch_size, micro_batches))
    return _announced(worker_items(_data_loader(images, sampler, num_workers, pin_memory)))


def _data_loader(
    dataset: Dataset, sampler: Sampler | Sequence, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the default one would take a number from the global generator
    )


def _announced(batches: Generator[Any, None, None]) -> Generator[Batch, None, None]:
    with closing(batches):
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            for position, path, reason in batch.replaced:
                logger.warning("data: %s: %s; another image takes position %d", path, reason, position)
            yield batch


def worker_items(loader: DataLoader) -> Generator[Any, None, None]:
    """What the loader yields; its workers end with this generator, whatever ends it."""
    iterator: Any = iter(loader)
    try:
        yield from iterator
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()  # garbage collection comes too late when someone keeps an error's traceback


class _MicroBatches(Sampler[tuple[int, int, int]]):
    """(step, start, stop) of every micro-batch of one process."""

    def __init__(self, steps: range, first: int, share: int, micro_batch_size: int) -> None:
        self.steps, self.starts, self.size = steps, range(first, first + share, micro_batch_size), micro_batch_size

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return ((step, start, start + self.size) for step in self.steps for start in self.starts)

    def __len__(self) -> int:
        return len(self.steps) * len(self.starts)


@dataclass
class PlannedImages(Dataset[Batch | UserError]):
    """Micro-batches by (step, start, stop)."""

    index: ImageIndex
    plan: SamplingPlan
    mask: Mask
    image_size: int
    token_size: int | None
    decoder: Decoder
    augment: Augment | None

    def __getstate__(self) -> dict[str, Any]:
        plan = copy.copy(self.plan)  # a worker maps the index's arrays again instead of receiving their content
        plan.heights = plan.widths = np.empty(0, np.int32)
        return self.__dict__ | {"plan": plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.plan.heights, self.plan.widths = np.asarray(self.index.heights), np.asarray(self.index.widths)

    def __getitem__(self, micro_batch: tuple[int, int, int]) -> Batch | UserError:
        try:
            return self.load(*micro_batch)
        except UserError as error:
            return error  # raised by the main process, without a worker's traceback

    def load(self, step: int, start: int, stop: int) -> Batch:
        sample = self.plan.draw(step, start, stop)
        size, token_size = self.image_size, self.token_size
        images = torch.empty(stop - start, 3, size, size, dtype=torch.uint8)  # (B, 3, S, S)
        token_images = None
        if token_size is not None:
            token_images = torch.empty(stop - start, 3, token_size, token_size, dtype=torch.uint8)  # (B, 3, T, T)
        replaced: list[tuple[int, str, str]] = []
        sample_ids, decode = sample.sample_ids, partial(decode_rgb, decoder=self.decoder)
        for i, position in enumerate(sample.positions.tolist()):
            pixels, sample_ids[i], box = self.decode(decode, position, int(sample_ids[i]), sample.boxes[i], replaced)
            top, left, height, width = box
            crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])  # copied once for both views
            whole, flip = (0, 0, height, width), bool(sample.flips[i])
            images[i] = resized_crop(crop, whole, flip, size, "bicubic", self.decoder)
            if token_images is not None and token_size is not None:
                token_images[i] = resized_crop(crop, whole, flip, token_size, "lanczos", self.decoder)
            if self.augment is not None:
                with _seeded(self.plan.augment_seed(position)):
                    augmented = self.augment(Image.fromarray(images[i].permute(1, 2, 0).numpy()))
                images[i] = torch.from_numpy(np.array(augmented)).permute(2, 0, 1)
        positions = torch.from_numpy(sample.positions)
        visible_ids, masked_ids = self.mask(positions)
        return Batch(images, token_images, visible_ids, masked_ids, positions, torch.from_numpy(sample_ids), replaced)

    def decode(
        self, decode: Decode, position: int, sample_id: int, box: np.ndarray, replaced: list[tuple[int, str, str]]
    ) -> tuple[Pixels, int, np.ndarray]:
        """(pixels, sample id, crop) of a position: the planned image or the first substitute that can be used."""
        failed: list[str] = []
        while True:
            pixels = _read_image(self.index, sample_id, decode)
            if isinstance(pixels, np.ndarray):
                return pixels, sample_id, box
            path = str(self.index.path(sample_id))
            replaced.append((position, path, pixels))
            failed.append(path)
            if len(failed) > MAX_ATTEMPTS:
                names = ", ".join(failed)
                raise UserError(f"data: {len(failed)} files in a row cannot be used (last: {pixels}): {names}")
            sample_id = self.plan.replacement(position, len(failed))
            box = self.plan.boxes(np.array([position]), np.array([sample_id]))[0]


def _read_image(index: ImageIndex, sample_id: int, decode: Decode = decode_rgb) -> Pixels | str:
    """The pixels of an image, uint8 (H, W, 3), or the reason why its file cannot be used."""
    size = int(index.heights[sample_id]), int(index.widths[sample_id])
    try:
        return decode(index.read(sample_id), size)
    except DecodeError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random numbers as `seed` makes them, and afterwards as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - what libraries draw from
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _start_worker(worker_id: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process of a run; only the main process decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    if main_process is not None and hasattr(signal, "sigwaitinfo"):  # macOS has none: there SIGTERM ends the workers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(main_process.pid,), daemon=True).start()
    torch.set_num_threads(1)
    _keep_freed_memory()


def _end_when_told_by(main_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)


def _keep_freed_memory() -> None:
    """Let malloc use an image's memory for the next one; glibc gives it back, and its page faults cost a fifth."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that glibc allows
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


def labelled_train_loader(
    index: ImageIndex, plan: SamplingPlan, *, augment: Augment | None = None, **settings: Any
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """The plan's crops with labels: (images uint8 (B, 3, S, S), labels int64 (B,), positions int64 (B,)).

    settings: those of pretrain_loader but mask and token_size; files that fail and errors are treated as there.
    Raises UserError for an index with images outside the folders of classes.
    """
    if index.labels.min() < 0:
        raise UserError(f"data: {index.source} has images without a label: each must lie in the folder of its class")
    batches = pretrain_loader(index, plan, _no_masks, token_size=None, augment=augment, **settings)
    return _with_labels(index, batches)


def _no_masks(positions: Tensor) -> tuple[Tensor, Tensor]:
    none = positions.new_empty(len(positions), 0)
    return none, none


def _with_labels(
    index: ImageIndex, batches: Generator[Batch, None, None]
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    with closing(batches):
        for batch in batches:
            labels = torch.from_numpy(index.labels[batch.sample_ids.numpy()].astype(np.int64))  # (B,)
            yield batch.images, labels, batch.positions


def labelled_loader(
    index: ImageIndex,
    image_size: int,
    batch_size: int,
    num_workers: int,
    sample_ids: Sequence[int] | None = None,
    crop_pct: float = 1.0,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Images of the index (all, or sample_ids) in order with labels: (uint8 (B, 3, S, S), int64 (B,)), for evaluation.

    The shorter side is resized to image_size / crop_pct (bicubic), then the central square is cut out. A file that
    cannot be used is left out of its batch and logged.
    """
    sample_ids = range(len(index)) if sample_ids is None else sample_ids
    batches = [sample_ids[start : start + batch_size] for start in range(0, len(sample_ids), batch_size)]
    return _labelled_batches(_data_loader(_LabelledImages(index, image_size, crop_pct), batches, num_workers))


def _labelled_batches(loader: DataLoader) -> Generator[tuple[Tensor, Tensor], None, None]:
    with closing(worker_items(loader)) as items:
        for images, labels, failed in items:
            for path, reason in failed:
                logger.warning("data: %s: %s; left out", path, reason)
            yield images, labels


class _LabelledImages(Dataset[tuple[Tensor, Tensor, list[tuple[str, str]]]]):
    """Batches by the numbers of their images."""

    def __init__(self, index: ImageIndex, image_size: int, crop_pct: float) -> None:
        self.index, self.image_size, self.crop_pct = index, image_size, crop_pct

    def __getitem__(self, sample_ids: Sequence[int]) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        images, labels, failed = [], [], []
        for i in sample_ids:
            pixels = _read_image(self.index, i)
            if isinstance(pixels, str):
                failed.append((str(self.index.path(i)), pixels))
                continue
            images.append(resize_and_center_crop(pixels, self.image_size, self.crop_pct))
            labels.append(int(self.index.labels[i]))
        empty = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.stack(images) if images else empty, torch.tensor(labels, dtype=torch.int64), failed
