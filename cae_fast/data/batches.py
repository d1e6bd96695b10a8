"""Micro-batches as worker processes decode them, in the order of the sampling plan.

Legend: B images of a micro-batch, S image size, T token image size, Nv visible patches, Nm masked patches,
H, W height and width in pixels.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cae_fast.config import UserError
from cae_fast.data.decode import DecodeError, Decoder, Pixels, decode_rgb, resized_crop
from cae_fast.data.index import ImageIndex
from cae_fast.data.patience import patiently
from cae_fast.data.sampling import SamplingPlan

MAX_ATTEMPTS = 16

Mask = Callable[[Tensor], tuple[Tensor, Tensor]]
Augment = Callable[[Image.Image], Image.Image]
Decode = Callable[[bytes, tuple[int, int]], Pixels]
Replaced = tuple[int, str, str]  # position, path and reason of a file that could not be used


@dataclass
class Batch:
    """One micro-batch."""

    images: Tensor  # the encoder's view, uint8 (B, 3, S, S), bicubic
    token_images: Tensor | None  # the tokenizer's view of the same crops, uint8 (B, 3, T, T), Lanczos
    visible_ids: Tensor  # int64 (B, Nv), sorted
    masked_ids: Tensor  # int64 (B, Nm), sorted
    positions: Tensor  # global sample positions, int64 (B,)
    sample_ids: Tensor  # entries of the index, after replacement, int64 (B,)
    replaced: list[Replaced] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        return self._apply(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; from pinned memory the copies do not wait."""
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def _apply(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {
            name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


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
        sample, size, token_size = self.plan.draw(step, start, stop), self.image_size, self.token_size
        images = torch.empty(stop - start, 3, size, size, dtype=torch.uint8)  # (B, 3, S, S)
        token_images = None
        if token_size is not None:
            token_images = torch.empty(stop - start, 3, token_size, token_size, dtype=torch.uint8)  # (B, 3, T, T)
        replaced: list[Replaced] = []
        sample_ids, decode = sample.sample_ids, partial(decode_rgb, decoder=self.decoder)

        for i, position in enumerate(sample.positions.tolist()):
            pixels, sample_ids[i], box = self.decode(
                decode, position=position, sample_id=int(sample_ids[i]), box=sample.boxes[i], replaced=replaced
            )

            # The crop is copied once for both views.
            top, left, height, width = box
            crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
            view = partial(resized_crop, crop, (0, 0, height, width), bool(sample.flips[i]))
            images[i] = view(size, "bicubic", self.decoder)
            if token_images is not None and token_size is not None:
                token_images[i] = view(token_size, "lanczos", self.decoder)

            # Only the encoder's view is augmented.
            if self.augment is not None:
                with _seeded(self.plan.augment_seed(position)):
                    augmented = self.augment(Image.fromarray(images[i].permute(1, 2, 0).numpy()))
                images[i] = torch.from_numpy(np.array(augmented)).permute(2, 0, 1)

        positions = torch.from_numpy(sample.positions)
        visible_ids, masked_ids = self.mask(positions)
        ids = torch.from_numpy(sample_ids)
        return Batch(
            images, token_images, visible_ids, masked_ids, positions=positions, sample_ids=ids, replaced=replaced
        )

    def decode(
        self, decode: Decode, *, position: int, sample_id: int, box: np.ndarray, replaced: list[Replaced]
    ) -> tuple[Pixels, int, np.ndarray]:
        """(pixels, sample id, crop) of a position: the planned image or the first substitute that can be used."""
        failed: list[str] = []
        while True:
            pixels = read_image(self.index, sample_id, decode)
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


def read_image(index: ImageIndex, sample_id: int, decode: Decode = decode_rgb) -> Pixels | str:
    """The pixels of an image, uint8 (H, W, 3), or the reason why its file cannot be used.

    Raises UserError where not the file but the machine is in trouble, also after waiting, or a tar file has changed.
    """
    size, path = (int(index.heights[sample_id]), int(index.widths[sample_id])), str(index.path(sample_id))
    try:
        return patiently(path, lambda: decode(index.read(sample_id), size))
    except DecodeError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


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
