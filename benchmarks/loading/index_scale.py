"""An index of the size of ImageNet-22K: opening, private memory, and drawing plans.

  python -m benchmarks.loading.index_scale                # 14.2 million images in 21,841 tar files; 0.9 GB on disk
  python -m benchmarks.loading.index_scale --images 1000000 --shards 1000 --json FILE

The index is synthetic (no tar files), written to a temporary folder and left to the page cache. Then several
processes open it at once and draw --batches plans of --batch images from it, for each way of shuffling. Private is
what opening and drawing add to Private_Clean + Private_Dirty in /proc/self/smaps_rollup (Linux): memory that a process
does not share with the others. Seconds are the slowest process's, megabytes the largest.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np

from cae_fast.data.index import ImageIndex
from cae_fast.data.index_files import write_arrays
from cae_fast.data.sampling import SamplingPlan
from cae_fast.data.shards import Shards
from cae_fast.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=14_200_000)
    parser.add_argument("--shards", type=int, default=21_841, help="tar files, each a class")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--json", metavar="FILE", help="write the results there, too")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_synthetic_index(Path(folder), args.images, args.shards)
        rows = [measure(Path(folder), shuffle, args) for shuffle in ("global", "shard")]
        size = sum(path.stat().st_size for path in Path(folder).iterdir())

    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}"
    )
    print(f"{args.images:,} images in {args.shards:,} tar files, index of {size / 1e6:,.0f} MB; {machine}")
    print(f"{args.processes} processes at once, {args.batches:,} plans of {args.batch} images each")
    print(f"{'shuffle':10s}{'open s':>10s}{'private MB':>12s}{'draw s':>10s}{'private MB':>12s}{'ms/plan':>10s}")
    for row in rows:
        print(
            f"{row['shuffle']:10s}{row['open_seconds']:10.3f}{row['open_private_mb']:12.1f}{row['draw_seconds']:10.3f}"
            f"{row['draw_private_mb']:12.1f}{1e3 * row['draw_seconds'] / args.batches:10.3f}"
        )

    if args.json:
        facts = {"images": args.images, "shards": args.shards, "index_bytes": size, "machine": machine}
        facts |= {"processes": args.processes, "batches": args.batches, "batch": args.batch, "rows": rows}
        write_text(Path(args.json), json.dumps(facts, indent=1) + "\n")


def write_synthetic_index(folder: Path, images: int, shards: int) -> None:
    """Tar files of uneven size (as ImageNet-22K's: 1 to about 3,000 images) of images of common sizes."""
    random = np.random.default_rng(0)
    shares = random.gamma(1.5, size=shards)
    counts = 1 + np.floor(shares / shares.sum() * (images - shards)).astype(np.int64)
    counts[: images - counts.sum()] += 1
    starts = np.append(0, counts.cumsum())

    # In a tar file each image stands behind a header of 512 bytes and fills whole blocks of 512.
    sizes = random.integers(20_000, 200_000, images)
    blocks = 512 + -(-sizes // 512) * 512
    ends = blocks.cumsum()
    before = np.append(0, ends)[starts[:-1]]  # bytes of the tar files before

    digits = np.frombuffer(b"".join(b"n01440764_%08d.JPEG" % i for i in range(images)), np.uint8)
    arrays = {
        "paths": digits,
        "path_offsets": np.arange(images + 1) * 23,
        "heights": random.integers(200, 600, images),
        "widths": random.integers(200, 600, images),
        "sizes": sizes,
        "labels": np.repeat(np.arange(shards), counts),
        "offsets": ends - blocks + 512 - np.repeat(before, counts),
        "shard_starts": starts,
    }
    names = [f"n{i:08d}" for i in range(shards)]
    (folder / "bad_files.tsv").touch()
    write_arrays(
        folder,
        Shards([f"/data/imagenet22k/{name}.tar" for name in names]),
        arrays,
        states=[""] * shards,
        classes=names,
        num_bad=0,
        max_pixels=100_000_000,
        left_out=[],
    )


def measure(folder: Path, shuffle: str, args: argparse.Namespace) -> dict[str, float | str]:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(args.processes), context.Queue()
    work = (folder, shuffle, args.batches, args.batch, barrier, results)
    processes = [context.Process(target=open_and_draw, args=work) for _ in range(args.processes)]
    for process in processes:
        process.start()
    rows = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {"shuffle": shuffle} | {name: max(row[name] for row in rows) for name in rows[0]}


def open_and_draw(
    folder: Path, shuffle: str, batches: int, batch: int, barrier: Barrier, results: multiprocessing.Queue
) -> None:
    barrier.wait()  # all processes at once
    before = private_mb()
    began = time.perf_counter()

    index = ImageIndex(folder)
    plan = SamplingPlan(
        num_samples=len(index),
        heights=index.heights,
        widths=index.widths,
        global_batch_size=batch,
        seed=0,
        crop_scale=(0.08, 1),
        crop_ratio=(3 / 4, 4 / 3),
        horizontal_flip=0.5,
        shuffle=shuffle,
        shard_starts=index.shard_starts,
    )
    row = {"open_seconds": time.perf_counter() - began, "open_private_mb": private_mb() - before}

    barrier.wait()
    began = time.perf_counter()
    for step in range(batches):
        plan.draw(step, 0, batch)
    row["draw_seconds"] = time.perf_counter() - began
    barrier.wait()  # while all have the index open
    row["draw_private_mb"] = private_mb() - before
    barrier.wait()
    results.put(row)


def private_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))) / 1e3


if __name__ == "__main__":
    main()
