"""The index of a folder of images: scanned once, then memory-mapped.

An index is a folder of its own, outside the images:

    meta.json         format, root, classes, counts, fingerprint, ...
    bad_files.tsv     path and reason of every image file that cannot be used (tab, newline and backslash escaped)
    paths.npy         the good files' paths below the root, joined, uint8; path_offsets.npy, int64 (n + 1,), cuts them
    heights.npy, widths.npy, labels.npy   int32 (n,): pixels, pixels, class (-1 without one)
    sizes.npy         int64 (n,): bytes

Arrays are opened as read-only memory maps, so opening takes no time and processes share the memory.
"""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import stat
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from cae_fast import __version__
from cae_fast.config import DataConfig, UserError
from cae_fast.data.decode import GZIP_MAGIC, PIL_FORMATS, DecodeError, gunzip

logger = logging.getLogger(__name__)

FORMAT = "cae_fast image index"
FORMAT_VERSION = 1
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ARRAYS = {
    "paths": np.uint8,
    "path_offsets": np.int64,
    "heights": np.int32,
    "widths": np.int32,
    "sizes": np.int64,
    "labels": np.int32,
}
BLOCK = 4096  # files in flight at once: bounds the memory of a scan
TAIL = 64 * 1024  # bytes at the end of a file in which its end mark is looked for
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"PK\x03\x04", "ZIP"),
)


class ImageIndex:
    """An opened index. Pickles as the name of its folder; a worker process maps the files anew.

    Attributes: folder, root (Path), classes (names, by label), heights, widths, labels int32 (n,), sizes int64 (n,),
    fingerprint (sha256 of the content, whatever the root), num_bad, max_pixels.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        self.root = Path(meta["root"])
        self.classes: list[str] = meta["classes"]
        self.fingerprint: str = meta["fingerprint"]
        self.num_bad: int = meta["num_bad"]
        self.max_pixels: int = meta["max_pixels"]
        self.created: str = meta["created"]
        try:
            arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder} is a damaged index ({error}); delete it to scan again") from error
        lengths = {name: len(arrays[name]) for name in ARRAYS}
        expected = dict.fromkeys(ARRAYS, meta["num_images"])
        expected |= {"paths": int(arrays["path_offsets"][-1]), "path_offsets": meta["num_images"] + 1}
        if lengths != expected or any(arrays[name].dtype != dtype for name, dtype in ARRAYS.items()):
            raise UserError(f"{self.folder} is a damaged index (arrays do not fit together); delete it to scan again")
        self._paths, self._offsets = arrays["paths"], arrays["path_offsets"]
        self.heights, self.widths = arrays["heights"], arrays["widths"]
        self.sizes, self.labels = arrays["sizes"], arrays["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        bad = f"{self.num_bad:,} bad files (listed in {self.bad_files})" if self.num_bad else "no bad files"
        classes = f"{len(self.classes):,} classes" if self.classes else "no classes"
        scan = f"scanned {self.created} into {self.folder} (delete it to scan again)"
        return f"{self.root}: {len(self):,} images, {classes}, {bad}; {scan}"

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageIndex, (self.folder,)

    @property
    def bad_files(self) -> Path:
        """The list of unusable files: path and reason, tab-separated."""
        return self.folder / "bad_files.tsv"

    def path(self, i: int) -> Path:
        """The file of image i."""
        relative = self._paths[self._offsets[i] : self._offsets[i + 1]].tobytes()
        return self.root / os.fsdecode(relative)

    def read(self, i: int) -> bytes:
        """The bytes of image i. Raises OSError."""
        return self.path(i).read_bytes()


def open_index(path: str | Path) -> ImageIndex:
    """Open an index folder. Raises UserError when it is none, is damaged, or its images are gone."""
    index = ImageIndex(Path(path))
    if not index.root.is_dir():
        raise UserError(f"index {path}: the folder of its images, {index.root}, does not exist")
    return index


def _read_meta(folder: Path) -> dict[str, Any]:
    if not _is_index(folder):
        raise UserError(f"{folder} is not an index folder: write one with `cae-fast index DIR`")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["version"] != FORMAT_VERSION:
        raise UserError(
            f"index {folder} has format version {meta['version']}, this program reads {FORMAT_VERSION}: make it again"
        )
    return meta


def _is_index(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and meta.get("format") == FORMAT


def index_for(data: DataConfig, run_dir: Path) -> ImageIndex:
    """The index that a run uses: data.index, or that of data.path, made on first use beside the run folder."""
    if data.index:
        index = open_index(data.index)
    else:
        root = resolve_data_path(data.path)
        key = hashlib.sha256(os.fsencode(root) + b"\0" + str(data.max_pixels).encode()).hexdigest()[:8]
        folder = Path(os.path.abspath(run_dir)).parent / "indexes" / f"{root.name or 'root'}-{key}.index"
        index = open_index(folder) if folder.exists() else build_index(root, folder, data.max_pixels, replace=False)
    return index


def resolve_data_path(path: str) -> Path:
    """The absolute folder of data.path (a folder or bundled:NAME). Raises UserError when there is none."""
    if not path:
        raise UserError("data.path is empty: set it to a folder of images or to bundled:NAME")
    if path.startswith("bundled:"):
        from cae_fast.data.bundled import bundled_path

        return bundled_path(path.removeprefix("bundled:"))
    root = Path(os.path.abspath(Path(path).expanduser()))
    if not root.is_dir():
        raise UserError(f"data.path={path}: is not a folder")
    return root


def build_index(root: Path, out: Path, max_pixels: int, num_threads: int = 16, replace: bool = True) -> ImageIndex:
    """Scan a folder of images and write its index to `out`.

    Files are taken in sorted order, so the same files give the same index on any file system. Linked folders are
    followed, each folder once. Only the beginning and the end of a file are read (all of a WebP or a gzipped file).
    An index that is at `out` by the end of the scan is replaced, or kept and returned with replace=False (several
    processes may then make the same one at once).
    Raises UserError when root is no folder, holds no usable image, contains `out`, or `out` is something else.
    """
    root, out = Path(os.path.abspath(root)), Path(os.path.abspath(out))
    if not root.is_dir():
        raise UserError(f"{root} is not a folder of images")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out} lies inside the data folder {root}: choose a place outside it for the index")
    if out.exists() and not _is_index(out):
        raise UserError(f"{out} exists and is not an index: choose another place for the index")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        meta = _write_index(root, temporary, max_pixels, num_threads)
        if not meta["num_images"]:
            raise UserError(_no_images(root, out, temporary, meta["num_bad"]))
        _put_in_place(temporary, out, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ImageIndex(out)


def _no_images(root: Path, out: Path, temporary: Path, num_bad: int) -> str:
    if not num_bad:
        return f"{root} holds no image files ({', '.join(EXTENSIONS)})"
    report = out.with_name(f"{out.stem}.bad_files.tsv")
    os.replace(temporary / "bad_files.tsv", report)
    return f"{root} holds no usable image: all {num_bad} image files are bad, see {report}"


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


def _write_index(root: Path, folder: Path, max_pixels: int, num_threads: int) -> dict[str, Any]:
    """Scan and write all files of an index; returns its meta data."""
    paths, offsets = bytearray(), array("q", [0])
    heights, widths, sizes, labels = (array("q") for _ in range(4))
    classes: dict[bytes, int] = {}
    num_bad = 0
    Image.init()  # loads Pillow's decoders before threads use them
    with (
        ThreadPoolExecutor(num_threads) as pool,
        open(folder / "bad_files.tsv", "w", encoding="utf-8", errors="surrogateescape", newline="\n") as bad_files,
    ):
        for relative, found in _scan(os.fsencode(root), max_pixels, pool):
            first, nested, _ = relative.partition(b"/")
            label = classes.setdefault(first, len(classes)) if nested else -1
            if isinstance(found, str):
                bad_files.write(f"{_escape(os.fsdecode(relative))}\t{_escape(found)}\n")
                num_bad += 1
                continue
            paths += relative
            offsets.append(len(paths))
            labels.append(label)
            for values, value in zip((heights, widths, sizes), found, strict=True):
                values.append(value)
    columns = (np.frombuffer(paths, np.uint8), offsets, heights, widths, sizes, labels)
    names = [os.fsdecode(name) for name in classes]
    digest = hashlib.sha256(json.dumps(names).encode())
    for (name, dtype), column in zip(ARRAYS.items(), columns, strict=True):
        contents = np.ascontiguousarray(column, dtype)
        digest.update(contents.data)
        np.save(folder / f"{name}.npy", contents, allow_pickle=False)
    meta = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "cae_fast": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "root": str(root),
        "max_pixels": max_pixels,
        "num_images": len(labels),
        "num_bad": num_bad,
        "fingerprint": digest.hexdigest(),
        "classes": names,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return meta


def _escape(text: str) -> str:
    return text.translate({0x5C: "\\\\", 0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r"})


def _scan(root: bytes, max_pixels: int, pool: ThreadPoolExecutor) -> Iterator[tuple[bytes, tuple[int, int, int] | str]]:
    """Every image file below root in sorted order: (relative path, (height, width, bytes) or why it is bad)."""

    def inspect(item: tuple[bytes, str | None]) -> tuple[int, int, int] | str:
        relative, reason = item
        return reason or inspect_file(os.path.join(root, relative), max_pixels)

    files, done = _walk(root, b"", set()), 0
    while block := list(islice(files, BLOCK)):
        yield from zip((relative for relative, _ in block), pool.map(inspect, block), strict=True)
        done += len(block)
        if done % (64 * BLOCK) == 0:
            logger.info("index: %d files scanned", done)


def _walk(root: bytes, relative: bytes, visited: set[tuple[int, int]]) -> Iterator[tuple[bytes, str | None]]:
    """(path below root, None or why it is bad) of image files; `visited` stops loops of linked folders."""
    folder = os.path.join(root, relative)
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as scan:
            entries = sorted((entry.name, entry.is_dir()) for entry in scan)
    except OSError as error:
        yield relative or b".", f"folder cannot be read: {error.strerror}"
        return
    for name, is_folder in entries:
        path = os.path.join(relative, name)
        if is_folder:
            yield from _walk(root, path, visited)
        elif name.lower().endswith(tuple(extension.encode() for extension in EXTENSIONS)):
            yield path, None


def inspect_file(path: bytes, max_pixels: int) -> tuple[int, int, int] | str:
    """(height, width, bytes) of a usable image file, else the reason why it is not usable."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "not a file"
        with open(path, "rb") as stream:
            height, width = _inspect_stream(stream, status.st_size)
    except DecodeError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if height * width > max_pixels:
        return f"{width} x {height} pixels are more than data.max_pixels={max_pixels}"
    return height, width, status.st_size


def _inspect_stream(stream: BinaryIO, size: int) -> tuple[int, int]:
    """(height, width) from the header of an image; raises DecodeError, also for a truncated file."""
    head = stream.read(32)
    if head.startswith(GZIP_MAGIC):
        content = gunzip(head + stream.read())
        stream, size, head = io.BytesIO(content), len(content), content[:32]
    kind = _sniff(head)
    if kind not in PIL_FORMATS:
        raise DecodeError(f"is {kind}, not JPEG, PNG, WebP or BMP")
    if size < _declared_size(kind, head):
        raise DecodeError(f"truncated {kind}")
    stream.seek(0)
    try:
        with Image.open(stream, formats=[kind]) as image:
            width, height = image.size
            # A JPEG's thumbnail has an end mark too: only what follows the header counts.
            header = stream.tell() if image.format == "JPEG" else 0
            stream.seek(max(header, size - TAIL))
            tail = stream.read()
    except Exception as error:  # Pillow's readers raise any type: OSError, SyntaxError, struct.error ...
        raise DecodeError(f"broken {kind} header ({type(error).__name__})") from error
    if height < 1 or width < 1:
        raise DecodeError(f"broken {kind} header ({width} x {height} pixels)")
    if END_MARKS.get(kind, b"") not in tail:
        raise DecodeError(f"truncated {kind}")
    return height, width


def _declared_size(kind: str, head: bytes) -> int:
    """The file size in bytes that a WebP or BMP header states; 0 for other formats."""
    if kind == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8
    return int.from_bytes(head[2:6], "little") if kind == "BMP" else 0


def _sniff(head: bytes) -> str:
    if not head:
        return "empty"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.lstrip()[:1] == b"<":
        return "HTML or XML"
    if head[4:8] == b"ftyp":
        return "HEIF, AVIF or video"
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), "an unknown format")
