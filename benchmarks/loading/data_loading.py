"""Images per second and CPU time per image of ways to load CAE's two views, side by side on the same JPEGs.

    python -m benchmarks.loading.data_loading --json data_loading.json        # Linux; workers 1 .. cores

The files are 500x375 crops of the bundled photographs, 4:2:0, about 100 kB each, made once. Every way yields
micro-batches of 64: one random crop and flip, 224 px bicubic and 112 px for the tokenizer. What they end in differs:
"float32" is normalized and mapped on the CPU, "uint8" leaves that to the device (as ours does), DALI draws no masks.
Every sample runs in a process of its own, repeats are interleaved, medians are shown. A sample lets the loader fill
its queues, then counts images, wall time and the CPU time (user + system) of the process and its workers for some
seconds. The last column is the number of cores that 1,400 images/s take.
"""

import argparse
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.loading.masks import PythonBlockMask
from benchmarks.record import earlier_rows, record, save
from cae_fast.data.bundled import bundled_path
from cae_fast.data.dali import why_not
from cae_fast.data.index import build_index
from cae_fast.data.loader import pretrain_loader
from cae_fast.data.normalize import Normalize
from cae_fast.data.sampling import SamplingPlan
from cae_kernels import block_mask

BATCH = 64
SIZE, TOKEN_SIZE = 224, 112
SCALE, RATIO, FLIP = (0.08, 1.0), (3 / 4, 4 / 3), 0.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WANTED = 1400  # images per second and GPU
TARGET_BYTES = 100_000


def make_images(count: int) -> Path:
    """A folder of `count` JPEGs of 500x375 pixels, about 100 kB each, from the bundled photographs in colour."""
    folder = Path(os.environ.get("CAE_FAST_CACHE", tempfile.gettempdir())) / f"cae-fast-benchmark-{count}"
    if folder.is_dir():
        return folder
    photographs = [Image.open(path) for path in sorted(bundled_path("photographs").glob("*.jpg"))]
    photographs = [image for image in photographs if image.mode == "RGB"]
    numbers = random.Random(0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        for number in range(count):
            image = photographs[number % len(photographs)]
            least = max(500 / image.width, 375 / image.height)
            scale = numbers.uniform(least, max(1.0, 1.5 * least))
            image = image.resize((math.ceil(image.width * scale), math.ceil(image.height * scale)), Image.LANCZOS)
            left, top = numbers.randint(0, image.width - 500), numbers.randint(0, image.height - 375)
            content = encoded(image.crop((left, top, left + 500, top + 375)))
            (Path(temporary) / f"{number:05}.jpg").write_bytes(content)
        os.rename(temporary, folder)
        Path(temporary).mkdir()
    return folder


def encoded(image: Image.Image) -> bytes:
    """A 4:2:0 JPEG of the quality, 75 to 98, whose size is nearest to the wanted one."""
    low, high, found = 75, 98, []
    while low <= high:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=(middle := (low + high) // 2), subsampling="4:2:0")
        found.append(stream.getvalue())
        low, high = (middle + 1, high) if stream.tell() < TARGET_BYTES else (low, middle - 1)
    return min(found, key=lambda content: abs(len(content) - TARGET_BYTES))


class Endless(torch.utils.data.Sampler[int]):
    """Shuffled epochs without an end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        for epoch in itertools.count():
            yield from torch.randperm(self.count, generator=torch.Generator().manual_seed(epoch)).tolist()


class PillowImages(Dataset):
    """The original's way: Pillow, float32 tensors, a mask in Python."""

    def __init__(self, folder: Path) -> None:
        from torchvision import transforms

        self.paths = sorted(folder.glob("*.jpg"))
        self.mask = PythonBlockMask(SIZE // 16, 98)
        self.to_view = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        self.to_token_view = transforms.Compose([transforms.ToTensor(), lambda x: 0.8 * x + 0.1])

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        from torchvision.transforms import InterpolationMode, RandomResizedCrop, functional

        with open(self.paths[i], "rb") as stream:
            image = Image.open(stream).convert("RGB")
        if random.random() < FLIP:
            image = functional.hflip(image)
        crop = RandomResizedCrop.get_params(image, SCALE, RATIO)
        view = functional.resized_crop(image, *crop, [SIZE, SIZE], InterpolationMode.BICUBIC)
        token_view = functional.resized_crop(image, *crop, [TOKEN_SIZE, TOKEN_SIZE], InterpolationMode.LANCZOS)
        return self.to_view(view), self.to_token_view(token_view), self.mask()


class TensorImages(Dataset):
    """torchvision's decoder and transforms.v2 on tensors, which has no Lanczos: both views are bicubic."""

    def __init__(self, folder: Path) -> None:
        self.paths = [str(path) for path in sorted(folder.glob("*.jpg"))]
        self.mask = PythonBlockMask(SIZE // 16, 98)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        from torchvision.io import ImageReadMode, decode_jpeg, read_file
        from torchvision.transforms import InterpolationMode, RandomResizedCrop
        from torchvision.transforms.v2 import functional

        image = decode_jpeg(read_file(self.paths[i]), ImageReadMode.RGB)
        top, left, height, width = RandomResizedCrop.get_params(image, SCALE, RATIO)
        crop = functional.crop(image, top, left, height, width)
        if random.random() < FLIP:
            crop = functional.horizontal_flip(crop)
        view, token_view = (
            functional.to_dtype(functional.resize(crop, [size, size], InterpolationMode.BICUBIC), scale=True)
            for size in (SIZE, TOKEN_SIZE)
        )
        return functional.normalize(view, list(MEAN), list(STD)), 0.8 * token_view + 0.1, self.mask()


def torchvision_loader(images: type[Dataset], folder: Path, workers: int) -> Iterator[Any]:
    dataset: Any = images(folder)
    return iter(DataLoader(dataset, BATCH, sampler=Endless(len(dataset.paths)), num_workers=workers))


def dali_loader(device_id: int | None, folder: Path, workers: int) -> Iterator[Any]:
    """A plain DALI pipeline: random crop while decoding on the CPU, whole images on the GPU's decoder."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device_id is not None
    if gpu and not torch.cuda.is_available():
        raise ImportError("a CUDA GPU")

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=device_id, seed=0)
    def two_views() -> Any:
        files, _ = fn.readers.file(files=[str(path) for path in sorted(folder.glob("*.jpg"))], random_shuffle=True)
        images = fn.decoders.image_random_crop(
            files,
            device="mixed" if gpu else "cpu",
            random_area=list(SCALE),
            random_aspect_ratio=list(RATIO),
            adjust_orientation=False,
        )

        # Both views are of one crop; its pixels are bytes, so mean and standard deviation are 255 times as large.
        mirror = fn.random.coin_flip(probability=FLIP)
        views = [
            (SIZE, types.INTERP_CUBIC, [255 * x for x in MEAN], [255 * x for x in STD]),
            (TOKEN_SIZE, types.INTERP_LANCZOS3, [-0.1 * 255 / 0.8] * 3, [255 / 0.8] * 3),
        ]
        return tuple(
            fn.crop_mirror_normalize(
                fn.resize(images, size=[size, size], interp_type=filter, antialias=True),
                mirror=mirror,
                mean=mean,
                std=std,
                output_layout="CHW",
            )
            for size, filter, mean, std in views
        )

    pipeline = two_views()
    pipeline.build()
    while True:
        yield pipeline.run()


def our_loader(decoder: str, device: str, floats: bool, folder: Path, workers: int) -> Iterator[Any]:
    if decoder == "dali" and (missing := why_not()):
        raise ImportError(missing)
    if device == "cuda" and not torch.cuda.is_available():
        raise ImportError("a CUDA GPU")

    with tempfile.TemporaryDirectory() as temporary:
        index = build_index(folder, Path(temporary) / "x.index", 10**8)
        plan = SamplingPlan(
            num_samples=len(index),
            heights=index.heights,
            widths=index.widths,
            global_batch_size=BATCH,
            seed=0,
            crop_scale=SCALE,
            crop_ratio=RATIO,
            horizontal_flip=FLIP,
        )

        normalize = Normalize(list(MEAN), list(STD), torch.device("cpu"))
        batches = pretrain_loader(
            index,
            plan,
            functools.partial(block_mask, seed=0, height=SIZE // 16, width=SIZE // 16, num_masked=98),
            image_size=SIZE,
            token_size=TOKEN_SIZE,
            start_step=0,
            stop_step=10**9,
            rank=0,
            world_size=1,
            micro_batch_size=BATCH,
            num_workers=workers,
            pin_memory=False,
            decoder=decoder,
            device=device,
        )

        for batch in batches:
            if floats:
                yield normalize(batch.images), batch.token_images.float() * (0.8 / 255) + 0.1
            else:
                yield batch


BASELINE = "PIL + torchvision DataLoader"
WAYS: dict[str, tuple[str, Callable[[Path, int], Iterator[Any]]]] = {
    BASELINE: ("float32", functools.partial(torchvision_loader, PillowImages)),
    "torchvision.io + v2": ("float32", functools.partial(torchvision_loader, TensorImages)),
    "DALI CPU": ("float32", functools.partial(dali_loader, None)),
    "DALI GPU": ("float32", functools.partial(dali_loader, 0)),
    "ours, pil": ("uint8", functools.partial(our_loader, "pil", "cpu", False)),
    "ours, DALI CPU": ("uint8", functools.partial(our_loader, "dali", "cpu", False)),
    "ours, DALI GPU": ("uint8", functools.partial(our_loader, "dali", "cuda", False)),
    "ours": ("uint8", functools.partial(our_loader, "cpu", "cpu", False)),
    "ours, float32 on the CPU": ("float32", functools.partial(our_loader, "cpu", "cpu", True)),
}


def cpu_seconds() -> float:
    """User and system time so far of this process, its threads and its living workers."""
    workers = [f"/proc/{process.pid}/stat" for process in multiprocessing.active_children()]
    ticks = sum(sum(map(int, Path(stat).read_text().rpartition(")")[2].split()[11:13])) for stat in workers)
    own = os.times()
    return own.user + own.system + ticks / os.sysconf("SC_CLK_TCK")


def sample(way: str, folder: Path, workers: int, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    try:
        batches = WAYS[way][1](folder, workers)
        for _ in range(3 * workers + 3):
            next(batches)
    except ImportError as error:
        return {"missing": getattr(error, "name", None) or str(error)}
    images, began, cpu = 0, time.perf_counter(), cpu_seconds()
    while (elapsed := time.perf_counter() - began) < seconds:
        next(batches)
        images += BATCH
    return {"images": images, "seconds": elapsed, "cpu_seconds": cpu_seconds() - cpu}


def sample_in_process(way: str, folder: Path, workers: int, seconds: float) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.loading.data_loading",
        "--sample",
        json.dumps([way, str(folder), workers, seconds]),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table_row(row: dict[str, Any], baseline_ms: float | None) -> str:
    start = f"{row['way']:30s} {row['output']:8s} {row['workers']:3d}"
    why = next((f"{key}: {s[key]}" for s in row["samples"] for key in ("missing", "failed") if key in s), None)
    if why:
        return f"{start}   {why}"
    rate = statistics.median(s["images"] / s["seconds"] for s in row["samples"])
    milliseconds = cpu_milliseconds(row)
    ratio = f"{baseline_ms / milliseconds:6.2f}x" if baseline_ms else "       "
    return f"{start} {rate:9.0f} {milliseconds:9.2f} {ratio} {milliseconds * WANTED / 1000:8.1f}"


def cpu_milliseconds(row: dict[str, Any]) -> float:
    return statistics.median(1e3 * s["cpu_seconds"] / s["images"] for s in row["samples"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, nargs="+", default=list(range(1, cores + 1)))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of counting per sample")
    parser.add_argument("--json", type=Path, help="write raw samples here, after every sample")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    parser.add_argument("--sample", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()

    # One way, in a process of its own that another one started.
    if args.sample:
        way, folder, workers, seconds = args.sample
        print(json.dumps(sample(way, Path(folder), workers, seconds)), flush=True)
        os._exit(0)  # endless loaders have nothing to finish

    folder = make_images(args.images)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    print(f"{len(sizes)} JPEGs in {folder}, median {statistics.median(sizes) / 1000:.0f} kB", flush=True)

    found = {} if args.again else earlier_rows(args.json, ("way", "workers"), seconds=args.seconds)
    rows = [
        found.get((way, workers), {"way": way, "output": WAYS[way][0], "workers": workers, "samples": []})
        for workers in args.workers
        for way in args.ways
    ]
    for row in rows:
        row["samples"] = [sample for sample in row["samples"] if "images" in sample]

    # In turns, so that what else the machine does falls on all ways alike.
    for repeat in range(args.repeats):
        for row in (row for row in rows if len(row["samples"]) <= repeat):
            row["samples"].append(sample_in_process(row["way"], folder, row["workers"], args.seconds))
            if args.json:
                save(args.json, record("data_loading", seconds=args.seconds, bytes=sizes, rows=rows))

    print(f"{'':30s} {'':8s} {'workers':>3s}  images/s  CPU ms/im   ratio  cores for {WANTED}/s")
    for row in rows:
        same = [r for r in rows if r["way"] == BASELINE and r["workers"] == row["workers"]]
        measured = same and all("images" in s for s in same[0]["samples"])
        print(table_row(row, cpu_milliseconds(same[0]) if measured else None))


if __name__ == "__main__":
    main()
