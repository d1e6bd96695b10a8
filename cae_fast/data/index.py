"""The index of a folder of images or of images in tar files: scanned once, then memory-mapped.

An index is a folder of its own, outside the images:

    meta.json         format, root (folder) or shards (tar files), classes, counts, fingerprint, ...
    bad_files.tsv     path and reason of every image file that cannot be used (tab, newline and backslash escaped)
    paths.npy         the good files' paths below the root or in their tar file, joined, uint8
    path_offsets.npy  int64 (n + 1,): where in paths.npy each begins
    heights.npy, widths.npy, labels.npy   int32 (n,): pixels, pixels, class (-1 without one)
    sizes.npy         int64 (n,): bytes
    offsets.npy       int64 (n,), tar files only: first byte of an image in its tar file
    shard_starts.npy  int64 (shards + 1,), tar files only: the first image of each tar file

Arrays are opened as read-only memory maps, so opening takes no time and processes share the memory.
"""

import errno
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from cae_fast import __version__
from cae_fast.config import DataConfig, UserError
from cae_fast.data.bundled import bundled_path
from cae_fast.data.folder import Folder
from cae_fast.data.headers import EXTENSIONS
from cae_fast.data.shards import Shards, find_shards
from cae_fast.data.source import Entry, Source

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


class ImageIndex:
    """An opened index. Pickles as the name of its folder; a worker process maps the files anew.

    Attributes: folder, source (Folder or Shards), classes (names, by label), heights, widths, labels int32 (n,), sizes
    int64 (n,), shard_starts (the first image of each tar file, int64 (shards + 1,); None for a folder), fingerprint
    (sha256 of the content, wherever it lies), num_bad, max_pixels.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        if meta is None:
            raise UserError(f"{self.folder} is not an index folder: write one with `cae-fast index`")
        if meta["version"] != FORMAT_VERSIONS["shards" if "shards" in meta else "root"]:
            raise UserError(
                f"index {self.folder} has format version {meta['version']}, unknown to this program: make it again"
            )
        self.source: Source = Shards(meta["shards"]) if "shards" in meta else Folder(meta["root"])
        self.classes: list[str] = meta["classes"]
        self.fingerprint: str = meta["fingerprint"]
        self.num_bad: int = meta["num_bad"]
        self.max_pixels: int = meta["max_pixels"]
        self.created: str = meta["created"]

        arrays = self._map_arrays(meta["num_images"])
        self._paths, self._path_offsets = arrays["paths"], arrays["path_offsets"]
        self.heights, self.widths = arrays["heights"], arrays["widths"]
        self.sizes, self.labels = arrays["sizes"], arrays["labels"]
        self._offsets, self.shard_starts = arrays.get("offsets"), arrays.get("shard_starts")

    def _map_arrays(self, num_images: int) -> dict[str, np.ndarray]:
        dtypes = ARRAYS | SHARD_ARRAYS if self.source.names else ARRAYS
        try:
            arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in dtypes}
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} is a damaged index ({error}); delete it to scan again") from error

        expected = dict.fromkeys(dtypes, num_images)
        expected |= {"paths": int(arrays["path_offsets"][-1]), "path_offsets": num_images + 1}
        expected["shard_starts"] = len(self.source.names) + 1
        if any(arrays[name].dtype != dtype or len(arrays[name]) != expected[name] for name, dtype in dtypes.items()):
            raise UserError(f"{self.folder} is a damaged index (arrays do not fit together); delete it to scan again")
        return arrays

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        bad = f"{self.num_bad:,} bad files (listed in {self.bad_files})" if self.num_bad else "no bad files"
        classes = f"{len(self.classes):,} classes" if self.classes else "no classes"
        scan = f"scanned {self.created} into {self.folder} (delete it to scan again)"
        return f"{self.source}: {len(self):,} images, {classes}, {bad}; {scan}"

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageIndex, (self.folder,)

    @property
    def bad_files(self) -> Path:
        """The list of unusable files: path and reason, tab-separated."""
        return self.folder / "bad_files.tsv"

    def path(self, i: int) -> Path | str:
        """The file of image i, or `tar file:member`."""
        return self.source.path(self._path(i), self._shard(i))

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError."""
        offset = 0 if self._offsets is None else int(self._offsets[i])
        return self.source.read(self._shard(i), offset, int(self.sizes[i]), self._path(i))

    def _path(self, i: int) -> str:
        return os.fsdecode(self._paths[self._path_offsets[i] : self._path_offsets[i + 1]].tobytes())

    def _shard(self, i: int) -> int:
        return 0 if self.shard_starts is None else int(np.searchsorted(self.shard_starts, i, side="right")) - 1


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """meta.json of an index folder; None where it is none."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


def open_index(path: str | Path) -> ImageIndex:
    """Open an index folder. Raises UserError when it is none, is damaged, or its images are gone."""
    index = ImageIndex(Path(path))
    if gone := index.source.gone():
        raise UserError(f"index {path}: {gone}, does not exist")
    return index


def index_for(data: DataConfig, run_dir: Path) -> ImageIndex:
    """The index that a run uses: data.index, or that of data.path, made on first use beside the run folder.

    It is made anew (beside the old one, which other runs may be using) when a tar file changed, or when files were
    added to or removed from the folder or a folder on its first level.
    """
    if data.index:
        return open_index(data.index)
    source = resolve_data_path(data.path)
    key = hashlib.sha256(os.fsencode("\0".join([*source.states(), str(data.max_pixels)]))).hexdigest()[:8]
    folder = Path(os.path.abspath(run_dir)).parent / "indexes" / f"{source.name or 'root'}-{key}.index"
    return open_index(folder) if folder.exists() else build_index(source, folder, data.max_pixels, replace=False)


def resolve_data_path(path: str) -> Folder | Shards:
    """The source of images that data.path names: a folder, bundled:NAME or tar files. Raises UserError without any."""
    if not path:
        raise UserError("data.path is empty: set it to a folder of images, to tar files or to bundled:NAME")
    if path.startswith("bundled:"):
        return Folder(bundled_path(path.removeprefix("bundled:")))
    source = find_source([path])
    if isinstance(source, Folder) and not source.is_dir():
        raise UserError(f"data.path={path}: is not a folder and no tar file")
    return source


def find_source(names: Sequence[str]) -> Folder | Shards:
    """The tar files that the names stand for, else the one folder."""
    return find_shards(names) or Folder(os.path.abspath(Path(names[0]).expanduser()))


def build_index(
    source: Path | Source, out: Path, max_pixels: int, num_threads: int = 16, replace: bool = True
) -> ImageIndex:
    """Scan a folder of images (a Path will do) or tar files and write the index to `out`.

    Files are taken in sorted order, so the same files give the same index on any file system. Linked folders are
    followed, each folder once. Only the beginning and the end of a file are read (all of a WebP or a gzipped file).
    A damaged tar file counts as one bad file; the members before the damage are used.
    An index that is at `out` by the end of the scan is replaced, or kept and returned with replace=False (several
    processes may then make the same one at once).
    Raises UserError when source is no folder, holds no usable image, contains `out`, or `out` is something else.
    """
    out = Path(os.path.abspath(out))
    source = Folder(os.path.abspath(source)) if isinstance(source, Path) else source
    source.check(out)
    if out.exists() and _read_meta(out) is None:
        raise UserError(f"{out} exists and is not an index: choose another place for the index")

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        num_images, num_bad = _write_index(source, temporary, max_pixels, num_threads)
        if not num_images:
            raise UserError(_no_images(source, out, temporary, num_bad))
        _put_in_place(temporary, out, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ImageIndex(out)


def _no_images(source: Source, out: Path, temporary: Path, num_bad: int) -> str:
    if not num_bad:
        return f"{source} holds no image files ({', '.join(EXTENSIONS)})"
    report = out.with_name(f"{out.stem}.bad_files.tsv")
    os.replace(temporary / "bad_files.tsv", report)
    return f"{source} holds no usable image: all {num_bad} image files are bad, see {report}"


def _put_in_place(temporary: Path, out: Path, replace: bool) -> None:
    try:
        os.rename(temporary, out)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if replace:
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            os.rename(out, old)
            os.rename(temporary, out)
            shutil.rmtree(old)


def _write_index(source: Source, folder: Path, max_pixels: int, num_threads: int) -> tuple[int, int]:
    """Scan and write all files of an index; returns the numbers of images and of bad files."""
    Image.init()  # loads Pillow's decoders before threads use them
    with (
        ThreadPoolExecutor(num_threads) as pool,
        open(folder / "bad_files.tsv", "w", encoding="utf-8", errors="surrogateescape", newline="\n") as bad_files,
    ):
        arrays, classes, num_bad = _collect(source.scan(max_pixels, pool), len(source.names), bad_files)
    write_arrays(folder, source, arrays, classes=classes, num_bad=num_bad, max_pixels=max_pixels)
    return len(arrays["labels"]), num_bad


def _collect(
    entries: Iterable[Entry], num_shards: int, bad_files: TextIO
) -> tuple[dict[str, np.ndarray], list[str], int]:
    """The arrays of the good images and the names of the classes; bad ones are written to bad_files and counted."""
    paths, path_offsets = bytearray(), array("q", [0])
    heights, widths, labels = (array("i") for _ in range(3))
    sizes, offsets = array("q"), array("q")
    shard_counts, num_bad = np.zeros(max(1, num_shards), np.int64), 0
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
    if highest < 0:
        arrays["labels"][named] = -2 - arrays["labels"][named]
        return arrays, [os.fsdecode(name) for name in names], num_bad
    arrays["labels"][named] = -1
    return arrays, [str(label) for label in range(highest + 1)], num_bad


def write_arrays(
    folder: Path, source: Source, arrays: dict[str, np.ndarray], classes: list[str], num_bad: int, max_pixels: int
) -> None:
    """Write all of an index but bad_files.tsv into a folder that exists; arrays by the names of their files.

    Of the arrays, a folder of images needs no offsets and shard_starts.
    """
    digest = hashlib.sha256(json.dumps(classes).encode())
    for name, dtype in (ARRAYS | SHARD_ARRAYS if source.names else ARRAYS).items():
        contents = np.ascontiguousarray(arrays[name], dtype)
        digest.update(contents.data)
        np.save(folder / f"{name}.npy", contents, allow_pickle=False)

    meta = {
        "format": FORMAT,
        "version": FORMAT_VERSIONS["shards" if source.names else "root"],
        "cae_fast": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"shards": source.names} if source.names else {"root": str(source)}),
        "max_pixels": max_pixels,
        "num_images": len(arrays["labels"]),
        "num_bad": num_bad,
        "fingerprint": digest.hexdigest(),
        "classes": classes,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _escape(text: str) -> str:
    return text.translate({0x5C: "\\\\", 0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r"})
