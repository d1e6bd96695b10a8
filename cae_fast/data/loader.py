"""The batches of a run: a process's share of every step to train on, or all images in order to evaluate on.

Legend: B images of a micro-batch, S image size, G global batch size, L images per process and step.
"""

import logging
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cae_fast.config import UserError
from cae_fast.data.batches import Augment, Batch, Mask, PlannedImages, read_image
from cae_fast.data.dali import EncodedImages, decoded_batches
from cae_fast.data.decode import Decoder, resize_and_center_crop
from cae_fast.data.index import ImageIndex
from cae_fast.data.masking import no_mask
from cae_fast.data.sampling import SamplingPlan
from cae_fast.data.workers import data_loader, worker_items

logger = logging.getLogger(__name__)

MAX_WORKERS = 12


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
    Raises UserError for sizes that do not divide and where shared memory is too small for the workers; and while
    iterating when 16 files in a row fail, a worker dies, or the machine is in trouble for longer than a few seconds.
    """
    share = plan.global_batch_size // world_size
    if micro_batch_size < 1 or plan.global_batch_size % (world_size * micro_batch_size):
        raise UserError(
            f"train.global_batch_size={plan.global_batch_size}: must be a multiple of processes x "
            f"train.micro_batch_size = {world_size} x {micro_batch_size}"
        )
    if plan.num_samples != len(index):
        raise ValueError(f"the plan has {plan.num_samples} images, the index {len(index)}")
    if decoder == "dali" and augment is not None:
        raise UserError("data.backend is dali, which does not augment images: set data.backend=cpu")

    pixels: Decoder = "pil" if decoder == "pil" else "cpu"
    images = PlannedImages(
        index, plan, mask, image_size=image_size, token_size=token_size, decoder=pixels, augment=augment
    )

    starts = range(rank * share, (rank + 1) * share, micro_batch_size)
    places = ((step, start, start + micro_batch_size) for step in range(start_step, stop_step) for start in starts)
    if decoder != "dali":
        batch_bytes = micro_batch_size * 3 * (image_size**2 + (token_size or 0) ** 2)
        loader = data_loader(images, places, num_workers, batch_bytes=batch_bytes, pin_memory=pin_memory)
        return _announced(worker_items(loader))
    batch_bytes = micro_batch_size * int(index.sizes[:: max(1, len(index) // 1000)].mean())
    loader = data_loader(EncodedImages(images), places, num_workers, batch_bytes=batch_bytes)
    batches = decoded_batches(
        loader, images, device=torch.device(device), batch_size=micro_batch_size, micro_batches=len(starts)
    )
    return _announced(batches)


def _announced(batches: Generator[Any, None, None]) -> Generator[Batch, None, None]:
    with closing(batches):
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            for position, path, reason in batch.replaced:
                logger.warning("data: %s: %s; another image takes position %d", path, reason, position)
            yield batch


def labelled_train_loader(
    index: ImageIndex, plan: SamplingPlan, *, augment: Augment | None = None, **settings: Any
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """The plan's crops with labels: (images uint8 (B, 3, S, S), labels int64 (B,), positions int64 (B,)).

    settings: those of pretrain_loader but mask and token_size; files that fail and errors are treated as there.
    Raises UserError for an index with images outside the folders of classes.
    """
    if index.labels.min() < 0:
        raise UserError(f"data: {index.source} has images without a label: each must lie in the folder of its class")
    batches = pretrain_loader(index, plan, no_mask, token_size=None, augment=augment, **settings)
    return _with_labels(index, batches)


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
    cannot be used is left out of its batch and logged. Raises UserError where the machine is in trouble.
    """
    sample_ids = range(len(index)) if sample_ids is None else sample_ids
    places = [sample_ids[start : start + batch_size] for start in range(0, len(sample_ids), batch_size)]
    dataset = _LabelledImages(index, image_size, crop_pct)
    loader = data_loader(dataset, places, num_workers, batch_bytes=batch_size * 3 * image_size**2)
    with closing(worker_items(loader)) as items:
        for item in items:
            if isinstance(item, UserError):
                raise item
            images, labels, failed = item
            for path, reason in failed:
                logger.warning("data: %s: %s; left out", path, reason)
            yield images, labels


@dataclass
class _LabelledImages(Dataset[tuple[Tensor, Tensor, list[tuple[str, str]]] | UserError]):
    """Batches by the numbers of their images."""

    index: ImageIndex
    image_size: int
    crop_pct: float

    def __getitem__(self, sample_ids: Sequence[int]) -> tuple[Tensor, Tensor, list[tuple[str, str]]] | UserError:
        try:
            return self.load(sample_ids)
        except UserError as error:
            return error  # raised by the main process, without a worker's traceback

    def load(self, sample_ids: Sequence[int]) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        images, labels, failed = [], [], []
        for i in sample_ids:
            pixels = read_image(self.index, i)
            if isinstance(pixels, str):
                failed.append((str(self.index.path(i)), pixels))
                continue
            images.append(resize_and_center_crop(pixels, self.image_size, self.crop_pct))
            labels.append(int(self.index.labels[i]))
        empty = torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.stack(images) if images else empty, torch.tensor(labels, dtype=torch.int64), failed
