"""Decode, crop and resize with NVIDIA DALI: on the GPU, or the same pipeline on the CPU.

Worker processes read the files of a micro-batch in the order of the plan, check them and hand them on; DALI decodes
whole images (decoding only the crop has crashed on Hopper GPUs), cuts the crops out (its resize would do so too, but
looks beyond the crop's edges) and resizes them twice. On the CPU, DALI's decoded pixels are those of libjpeg-turbo
with the accurate DCT; the views of a photograph differ from the CPU path's by 0.15 gray levels on average and 3 at
most, because DALI does not round between rows and columns and repeats the pixels at the edges, which Pillow leaves out.

A worker refuses what the CPU path would refuse, as far as that can be seen without decoding. What damage leaves the
structure of a JPEG intact is only seen by DALI's decoders: a batch that they refuse is loaded again by the CPU path,
which finds and replaces the bad file; what they accept in spite of it, they accept.

Legend: B images of a micro-batch, S image size, T token image size.
"""

import logging
import re
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cae_fast.config import UserError
from cae_fast.data.batches import Batch, PlannedImages, Replaced
from cae_fast.data.decode import Pixels, decode_rgb
from cae_fast.data.workers import worker_items

logger = logging.getLogger(__name__)

PREFETCH = 2  # micro-batches that DALI works on ahead
HW_DECODER_LOAD = 0.65  # share of the JPEGs for the GPU's JPEG engines; DALI's default
MAX_FAILED_IN_ROW = 16

SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # 0xFF in compressed data is stuffed with 0 or a restart mark
LOST_BLOCK = bytes(512)


def why_not() -> str | None:
    """Why DALI cannot be used at all, or None."""
    try:
        import_module("nvidia.dali")
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return f"nvidia-dali cannot be imported ({error}); pip install 'cae-fast[data]'"
    return None


def is_whole_jpeg(data: bytes, size: tuple[int, int]) -> bool:
    """Whether this is a color or gray JPEG of (height, width) whose segments and scans lead to its end mark.

    False is no judgement: CMYK, rare chroma layouts and 512 zero bytes in a row (a lost disk block, but also a large
    flat area) are left to the CPU path's decoder too.
    """
    if data[:2] != b"\xff\xd8":
        return False

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    if (height, width) != size or colorspace not in ("YCbCr", "Gray"):
        return False

    place = 2  # from segment to segment; behind the one that opens a scan, over its compressed data
    while data[place : place + 1] == b"\xff":
        kind = data[place + 1] if place + 1 < len(data) else 0
        if kind == 0xD9:
            return True
        if not 0xC0 <= kind < 0xFF:
            return False
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if kind == 0xDA:
            end = SCAN_END.search(data, place)
            if end is None or data.find(LOST_BLOCK, place, end.start()) >= 0:
                return False
            place = end.start()
    return False


def jpeg_or_pixels(data: bytes, size: tuple[int, int]) -> Pixels:
    """A JPEG for DALI as it is, uint8 (bytes,), or what the CPU path decodes, uint8 (H, W, 3). Raises DecodeError."""
    return np.frombuffer(data, np.uint8) if is_whole_jpeg(data, size) else decode_rgb(data, size)


@dataclass
class EncodedBatch:
    """A micro-batch on its way to DALI."""

    place: tuple[int, int, int]  # step, start, stop
    files: Tensor  # JPEG and PPM files, one after the other, uint8
    sizes: list[int]  # bytes of each file
    crops: Tensor  # (top, left) and (height, width) in pixels, int32 (2, B, 2)
    flips: Tensor  # int32 (B,)
    positions: Tensor  # int64 (B,)
    sample_ids: Tensor  # int64 (B,)
    replaced: list[Replaced]

    def inputs(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        files = np.split(self.files.numpy(), np.cumsum(self.sizes)[:-1])
        return files, *self.crops.numpy(), self.flips.numpy()


@dataclass
class EncodedImages(Dataset[EncodedBatch | UserError]):
    """Encoded micro-batches by (step, start, stop)."""

    images: PlannedImages

    def __getitem__(self, micro_batch: tuple[int, int, int]) -> EncodedBatch | UserError:
        try:
            return self._load(micro_batch)
        except UserError as error:
            return error  # raised by the main process, without a worker's traceback

    def _load(self, place: tuple[int, int, int]) -> EncodedBatch:
        sample = self.images.plan.draw(*place)
        files: list[Pixels] = []
        replaced: list[Replaced] = []

        for i, position in enumerate(sample.positions.tolist()):
            file, sample.sample_ids[i], sample.boxes[i] = self.images.decode(
                jpeg_or_pixels,
                position=position,
                sample_id=int(sample.sample_ids[i]),
                box=sample.boxes[i],
                replaced=replaced,
            )
            if file.ndim == 3:  # pixels: their crop goes on as a PPM file, which DALI reads too
                top, left, height, width = sample.boxes[i]
                crop = file[top : top + height, left : left + width]
                file = np.frombuffer(b"P6 %d %d 255\n%b" % (width, height, crop.tobytes()), np.uint8)
                sample.boxes[i, :2] = 0
            files.append(file)

        return EncodedBatch(
            place=place,
            files=torch.from_numpy(np.concatenate(files)),
            sizes=[len(file) for file in files],
            crops=torch.from_numpy(np.stack([sample.boxes[:, :2], sample.boxes[:, 2:]])),
            flips=torch.from_numpy(sample.flips.astype(np.int32)),
            positions=torch.from_numpy(sample.positions),
            sample_ids=torch.from_numpy(sample.sample_ids),
            replaced=replaced,
        )


def decoded_batches(
    loader: DataLoader, images: PlannedImages, *, device: torch.device, batch_size: int, micro_batches: int
) -> Generator[Batch | UserError, None, None]:
    """The batches of a loader of EncodedImages, decoded on `device` and left there.

    On a GPU the two views are DALI's own memory, which it may write again, on a stream of its own, once nobody refers
    to it. So they are kept here for two steps of `micro_batches` each: what reads them has been queued when the same
    micro-batch of the next step is asked for, and has run when the event recorded then is over. For that the host
    waits another step later, by when the GPU has long done it; at the end it waits for all. Whoever keeps a batch for
    more than two steps must have read it by then.
    """
    with closing(worker_items(loader)) as items:
        num_threads = max(1, loader.num_workers)
        pipeline = _Pipeline(items, images, device=device, batch_size=batch_size, num_threads=num_threads)
        kept: deque[Batch | UserError] = deque()
        asked: deque[torch.cuda.Event] = deque(maxlen=micro_batches + 1)
        try:
            for batch in pipeline:
                yield batch
                if device.type == "cuda":
                    kept.append(batch)
                    asked.append(torch.cuda.current_stream(device).record_event())
                    if len(kept) == 2 * micro_batches:
                        asked[0].synchronize()
                        kept.popleft()
        finally:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()


class _Pipeline:
    """A DALI pipeline that is built anew after an error, without losing the batches that it had taken in."""

    def __init__(
        self, items: Iterator[Any], images: PlannedImages, *, device: torch.device, batch_size: int, num_threads: int
    ) -> None:
        self.items, self.images, self.device = items, images, device
        self.batch_size, self.num_threads = batch_size, num_threads
        self.inside: deque[EncodedBatch] = deque()  # what the pipeline has taken in, oldest first
        self.again: deque[EncodedBatch] = deque()  # what it must take in again
        self.error: UserError | None = None  # a worker's, due when the batches before it are out
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch | UserError]:
        failed, pipe = 0, None
        while True:
            try:
                pipe = self._build() if pipe is None else pipe
                views = pipe.run(self.stream)
            except StopIteration:
                break
            except RuntimeError as error:
                pipe, failed = None, failed + 1
                yield self._load_on_cpu(error, failed)
            else:
                failed = 0
                yield self._batch(self.inside.popleft(), views)
        if self.error is not None:
            yield self.error

    def _source(self) -> Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]]:
        while self.error is None:
            item = self.again.popleft() if self.again else next(self.items, None)
            if item is None:
                return
            if isinstance(item, UserError):
                self.error = item
                return
            self.inside.append(item)
            yield item.inputs()

    def _build(self) -> Any:
        dali = import_module("nvidia.dali")
        fn, types = dali.fn, dali.types
        cuda, sizes = self.device.type == "cuda", (self.images.image_size, self.images.token_size)
        pipe = dali.Pipeline(
            batch_size=self.batch_size,
            num_threads=self.num_threads,
            device_id=torch.cuda.current_device() if cuda else None,
            prefetch_queue_depth=PREFETCH,
        )

        with pipe:
            files, starts, shapes, flips = fn.external_source(
                source=self._source(),
                num_outputs=4,
                batch=True,
                dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
                ndim=[1, 1, 1, 0],
            )

            of_mixed = {"hw_decoder_load": HW_DECODER_LOAD, "jpeg_fancy_upsampling": True} if cuda else {}
            pixels = fn.decoders.image(files, device="mixed" if cuda else "cpu", adjust_orientation=False, **of_mixed)
            crops = fn.slice(pixels, start=starts, shape=shapes, axes=[0, 1])

            views = [
                fn.resize(crops, size=[size, size], interp_type=filter)
                for size, filter in zip(sizes, (types.INTERP_CUBIC, types.INTERP_LANCZOS3), strict=True)
                if size is not None
            ]
            as_chw = {"mean": 0.0, "std": 1.0, "dtype": types.UINT8, "output_layout": "CHW"}
            pipe.set_outputs(*(fn.crop_mirror_normalize(view, mirror=flips, **as_chw) for view in views))

        pipe.build()
        return pipe

    def _batch(self, item: EncodedBatch, outputs: Any) -> Batch:
        """The views without a copy. All is made on a stream at the side; what the reader queues next waits for it."""
        positions, sample_ids = item.positions, item.sample_ids
        with torch.cuda.stream(self.stream):
            images, *token_images = (torch.from_dlpack(view.as_tensor()) for view in outputs)
            if self.stream is not None:
                positions, sample_ids = (
                    ids.pin_memory().to(self.device, non_blocking=True) for ids in (positions, sample_ids)
                )
            visible_ids, masked_ids = self.images.mask(positions)

        if self.stream is not None:
            reader = torch.cuda.current_stream(self.device)
            reader.wait_stream(self.stream)
            for ids in (positions, sample_ids, visible_ids, masked_ids):
                ids.record_stream(reader)

        tokens = token_images[0] if token_images else None
        return Batch(
            images, tokens, visible_ids, masked_ids, positions=positions, sample_ids=sample_ids, replaced=item.replaced
        )

    def _load_on_cpu(self, error: RuntimeError, failed: int) -> Batch | UserError:
        """The batch that DALI failed on; those behind it go in again."""
        said = str(error).rpartition("encountered:")[2].replace("Current pipeline object is no longer valid.", "")
        reason = " ".join(said.split())[:200]
        if failed > MAX_FAILED_IN_ROW or not self.inside:
            raise UserError(f"data.backend is dali: DALI does not work here ({reason}); set cpu") from error
        place = self.inside.popleft().place
        self.again.extendleft(reversed(self.inside))
        self.inside.clear()
        logger.warning("data: DALI: %s; step %d, images %d to %d are decoded on the CPU", reason, *place)
        batch = self.images[place]
        return batch.pin_memory().to(self.device) if self.stream is not None and isinstance(batch, Batch) else batch
