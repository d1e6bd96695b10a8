"""The files of an index: scanning the images into them, and whether they are still as they were written.

An index is a folder of its own, outside the images:

    meta.json         format, root (folder) or shards (tar files) and their states (sizes and times), classes, counts,
                      what was left out, fingerprint (SHA-256 of classes and arrays), checksum (of all before it) ...
    bad_files.tsv     path and reason of every image file that cannot be used (tab, newline and backslash escaped)
    paths.npy         the good files' paths below the root or in their tar file, joined, uint8
    path_offsets.npy  int64 (n + 1,): where in paths.npy each begins
    heights.npy, widths.npy, labels.npy   int32 (n,): pixels, pixels, class (-1 without one)
    sizes.npy         int64 (n,): bytes
    offsets.npy       int64 (n,), tar files only: first byte of an image in its tar file
    shard_starts.npy  int64 (shards + 1,), tar files only: the first image of each tar file

Arrays are opened as read-only memory maps, so processes share the memory.
"""

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from cae_fast import __version__
from cae_fast.config import UserError
from cae_fast.data.source import Entry, LeftOut, Source
from cae_fast.files import file_sha256, sync

logger = logging.getLogger(__name__)

FORMAT = "cae_fast image index"
FORMAT_VERSIONS = {"root": 1, "shards": 2}  # by where meta.json says what the source is
ARRAYS: dict[str, Any] = {
    "paths": np.uint8,
    "path_offsets": np.int64,
    "heights": np.int32,
    "widths": np.int32,
    "sizes": np.int64,
    "labels": np.int32,
}
SHARD_ARRAYS: dict[str, Any] = {"offsets": np.int64, "shard_starts": np.int64}


def read_meta(folder: Path) -> dict[str, Any] | None:
    """meta.json of an index folder; None where it is none."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


def map_arrays(folder: Path, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays as memory maps. Raises UserError where they do not fit together."""
    dtypes = ARRAYS | SHARD_ARRAYS if "shards" in meta else ARRAYS
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in dtypes}
        expected = dict.fromkeys(dtypes, meta["num_images"])
        expected |= {"paths": int(arrays["path_offsets"][-1]), "path_offsets": meta["num_images"] + 1}
        expected["shard_starts"] = len(meta.get("shards", ())) + 1
    except Exception as error:  # numpy parses headers as Python and raises whatever that does
        raise damaged(folder, " ".join(str(error).split())) from error
    if any(arrays[name].dtype != dtype or arrays[name].shape != (expected[name],) for name, dtype in dtypes.items()):
        raise damaged(folder, "arrays do not fit together")
    return arrays


def verify(folder: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Raises UserError where the files are not as they were written; older indexes keep no checksum of meta.json."""
    if _fingerprint(meta["classes"], arrays) != meta["fingerprint"]:
        raise damaged(folder, "its arrays have another fingerprint")
    if "checksum" not in meta:
        return
    if _checksum(meta) != meta["checksum"]:
        raise damaged(folder, "meta.json has another checksum")
    bad_files = folder / "bad_files.tsv"
    if not bad_files.is_file() or file_sha256(bad_files) != meta["bad_files_sha256"]:
        raise damaged(folder, "bad_files.tsv is missing or has another checksum")


def damaged(folder: Path, how: str) -> UserError:
    return UserError(f"{folder} is a damaged index ({how}); delete it to scan again")


def write_index(source: Source, folder: Path, max_pixels: int, num_threads: int) -> tuple[int, int]:
    """Scan and write all files of an index, flushed to the disk; returns the numbers of images and of bad files."""
    Image.init()  # loads Pillow's decoders before threads use them
    states = source.states()  # before the scan: what changes during it differs at the next look
    left_out = LeftOut()
    with (
        ThreadPoolExecutor(num_threads) as pool,
        open(folder / "bad_files.tsv", "w", encoding="utf-8", errors="surrogateescape", newline="\n") as bad_files,
    ):
        arrays, classes, num_bad = _collect(source, source.scan(max_pixels, pool, left_out), bad_files)
    for line in left_out.lines():
        logger.warning("index: %s: %s", source, line)
    write_arrays(
        folder,
        source,
        arrays,
        states=states,
        classes=classes,
        num_bad=num_bad,
        max_pixels=max_pixels,
        left_out=left_out.lines(),
    )
    for path in (*folder.iterdir(), folder):
        sync(path)
    return len(arrays["labels"]), num_bad


def _collect(
    source: Source, entries: Iterable[Entry], bad_files: TextIO
) -> tuple[dict[str, np.ndarray], list[str], int]:
    """The arrays of the good images and the names of the classes; bad ones are written to bad_files and counted."""
    paths, path_offsets = bytearray(), array("q", [0])
    heights, widths, labels = (array("i") for _ in range(3))
    sizes, offsets = array("q"), array("q")
    shard_counts, num_bad = np.zeros(max(1, len(source.names)), np.int64), 0
    names: dict[bytes, int] = {}

    for path, found, label, shard, offset in entries:
        if isinstance(label, bytes):  # also of a bad image, so that no class's number depends on what is bad
            label = -2 - names.setdefault(label, len(names))  # below -1: told from the numbers in label files
        if isinstance(found, str):
            bad_files.write(f"{_escape(os.fsdecode(path))}\t{_escape(found)}\n")
            num_bad += 1
            continue
        paths += path
        path_offsets.append(len(paths))
        labels.append(-1 if label is None else label)
        for values, value in zip((heights, widths, sizes), found, strict=True):
            values.append(value)
        offsets.append(offset)
        shard_counts[shard] += 1

    bytes_of_paths, shard_starts = np.frombuffer(paths, np.uint8), np.append(0, shard_counts.cumsum())
    columns = (bytes_of_paths, path_offsets, heights, widths, sizes, labels, offsets, shard_starts)
    arrays = {name: np.asarray(column) for name, column in zip(ARRAYS | SHARD_ARRAYS, columns, strict=True)}

    # Where there are label files, only they count.
    highest = int(arrays["labels"].max(initial=-1))
    named = arrays["labels"] < -1
    if highest >= 0:
        arrays["labels"][named] = -1
        return arrays, [str(label) for label in range(highest + 1)], num_bad

    # Classes are numbered as they come.
    numbers: dict[bytes, int] = {}
    table = [-1 if name is None else numbers.setdefault(name, len(numbers)) for name in source.classes(list(names))]
    arrays["labels"][named] = np.array(table, np.int32)[-2 - arrays["labels"][named]]
    return arrays, [os.fsdecode(name) for name in numbers], num_bad


def write_arrays(
    folder: Path,
    source: Source,
    arrays: dict[str, np.ndarray],
    *,
    states: list[str],
    classes: list[str],
    num_bad: int,
    max_pixels: int,
    left_out: list[str],
) -> None:
    """Write all of an index but bad_files.tsv, which lies there; arrays by the names of their files.

    Of the arrays, a folder of images needs no offsets and shard_starts.
    """
    dtypes = ARRAYS | SHARD_ARRAYS if source.names else ARRAYS
    contents = {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in dtypes.items()}
    for name, values in contents.items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)

    meta = {
        "format": FORMAT,
        "version": FORMAT_VERSIONS["shards" if source.names else "root"],
        "cae_fast": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"shards": source.names} if source.names else {"root": str(source)}),
        "states": states,
        "max_pixels": max_pixels,
        "num_images": len(arrays["labels"]),
        "num_bad": num_bad,
        "left_out": left_out,
        "fingerprint": _fingerprint(classes, contents),
        "bad_files_sha256": file_sha256(folder / "bad_files.tsv"),
        "classes": classes,
    }
    meta["checksum"] = _checksum(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _fingerprint(classes: list[str], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    for name in ARRAYS | SHARD_ARRAYS:
        if name in arrays:
            digest.update(arrays[name].data)
    return digest.hexdigest()


def _checksum(meta: dict[str, Any]) -> str:
    facts = {name: value for name, value in meta.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _escape(text: str) -> str:
    return text.translate({0x5C: "\\\\", 0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r"})
