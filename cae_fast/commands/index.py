"""`cae-fast index SOURCE`: scan a folder of images, or tar files of images, once and write the index."""

import argparse
from pathlib import Path

import numpy as np

from cae_fast.config import DataConfig, UserError
from cae_fast.data.index import build_index, find_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="folder of images, nested (its first level are the classes) or flat; or tar files: paths or URLs, "
        "a folder of them, a glob or a range such as 'shards/{000000..013999}.tar'",
    )
    parser.add_argument("--out", metavar="X.index", help="index folder to write (default: ./NAME.index)")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=DataConfig().max_pixels,
        metavar="N",
        help="list larger images as bad (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    if args.max_pixels < 1:
        raise UserError(f"--max-pixels={args.max_pixels}: must be at least 1")
    source = find_source(args.source)
    out = Path(args.out) if args.out else Path(f"{source.name or 'root'}.index")
    index = build_index(source, out, args.max_pixels)

    print(f"{out}: {len(index):,} images, {int(index.sizes.sum()):,} bytes, in {source}")
    if index.classes:
        sizes = np.bincount(index.labels[index.labels >= 0], minlength=len(index.classes))
        print(f"classes: {len(index.classes):,}, of {sizes.min():,} to {sizes.max():,} images")
    else:
        print("classes: none (no subfolders)" if index.shard_starts is None else "classes: none (no labels)")
    listed = f", listed with the reasons in {index.bad_files}" if index.num_bad else ""
    print(f"bad files: {index.num_bad:,}{listed}")
    print(f"use it with data.index={out}")
    return 0
