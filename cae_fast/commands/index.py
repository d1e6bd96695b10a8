"""`cae-fast index DIR`: scan a folder of images once and write its index."""

import argparse
import os
from collections import Counter
from pathlib import Path

from cae_fast.config import DataConfig, UserError
from cae_fast.data.index import build_index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="folder of images, nested (its first level are the classes) or flat")
    parser.add_argument("--out", metavar="X.index", help="index folder to write (default: ./NAME.index)")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=DataConfig().max_pixels,
        metavar="N",
        help="list larger images as bad (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    root = Path(os.path.abspath(Path(args.dir).expanduser()))
    if args.max_pixels < 1:
        raise UserError(f"--max-pixels={args.max_pixels}: must be at least 1")
    out = Path(args.out) if args.out else Path(f"{root.name or 'root'}.index")
    index = build_index(root, out, args.max_pixels)
    sizes = Counter(index.labels.tolist())
    print(f"{out}: {len(index):,} images, {int(index.sizes.sum()):,} bytes, in {root}")
    if index.classes:
        largest, smallest = max(sizes.values()), min(sizes[label] for label in range(len(index.classes)))
        print(f"classes: {len(index.classes):,}, of {smallest:,} to {largest:,} images")
    else:
        print("classes: none (no subfolders)")
    print(
        f"bad files: {index.num_bad:,}" + (f", listed with the reasons in {index.bad_files}" if index.num_bad else "")
    )
    print(f"use it with data.index={out}")
    return 0
