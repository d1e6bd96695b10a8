"""Find the images in a folder or in tar files, with their sizes and labels, reading as little of them as is enough.

Tar files come in two layouts: WebDataset's (members whose names are equal up to the first dot belong together; the
label is in the one that ends in .cls, or under "cls" or "label" in the .json) and ImageNet's (a tar for each class).
"""

import io
import json
import logging
import os
import stat
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import IO, NamedTuple

from PIL import Image

from cae_fast.data.decode import GZIP_MAGIC, PIL_FORMATS, DecodeError, gunzip
from cae_fast.data.shards import Shards, open_shard

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
BLOCK = 4096  # files in flight at once: bounds the memory of a scan
SHARD_BLOCK = 64  # and tar files
MAX_LABEL = 999_999
MAX_LABEL_BYTES = 1 << 20
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

Found = tuple[int, int, int] | str  # height, width and bytes of an image, or why it cannot be used


class Entry(NamedTuple):
    """One image of a scan; `path` is its place in the source, for a bad one in a tar with the tar's name before it."""

    path: bytes
    found: Found
    label: bytes | int | None
    """A class's name, its number, or none."""
    shard: int = 0
    offset: int = 0


def scan_folder(root: bytes, max_pixels: int, pool: ThreadPoolExecutor) -> Iterator[Entry]:
    """Every image file below root in sorted order; the first folder of its path is its class."""

    def inspect(item: tuple[bytes, str | None]) -> Entry:
        path, reason = item
        first, nested, _ = path.partition(b"/")
        found = reason or inspect_file(os.path.join(root, path), max_pixels)
        return Entry(path, found, first if nested else None)

    files, done = _walk(root, b"", set()), 0
    while block := list(islice(files, BLOCK)):
        yield from pool.map(inspect, block)
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


def inspect_file(path: bytes, max_pixels: int) -> Found:
    """(height, width, bytes) of a usable image file, else the reason why it is not usable."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "not a file"
        with open(path, "rb") as stream:
            return _inspect_stream(stream, status.st_size, max_pixels)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _inspect_stream(stream: IO[bytes], size: int, max_pixels: int) -> Found:
    try:
        height, width = _image_size(stream, size)
    except DecodeError as error:
        return str(error)
    if height * width > max_pixels:
        return f"{width} x {height} pixels are more than data.max_pixels={max_pixels}"
    return height, width, size


def _image_size(stream: IO[bytes], size: int) -> tuple[int, int]:
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


def scan_shards(shards: Shards, max_pixels: int, pool: ThreadPoolExecutor) -> Iterator[Entry]:
    """Every image of the tar files in order; also every tar file that cannot be read to its end, as a bad file."""

    def scan(number: int) -> list[Entry]:
        return _scan_shard(number, shards.names[number], max_pixels)

    numbers = iter(range(len(shards.names)))
    while block := list(islice(numbers, SHARD_BLOCK)):
        for entries in pool.map(scan, block):
            yield from entries
        logger.info("index: %d of %d tar files scanned", block[-1] + 1, len(shards.names))


def _scan_shard(number: int, name: str, max_pixels: int) -> list[Entry]:
    images: list[tuple[str, Found, int]] = []
    notes: dict[str, bytes | int | str | None] = {}  # by label file
    bad: list[Entry] = []
    try:
        with open_shard(name) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            for tar, member in _members(stream):
                path = member.name
                if path.lower().endswith(EXTENSIONS) and not member.isdir():
                    images.append((path, _inspect_member(tar, member, size, max_pixels), member.offset_data))
                elif path.endswith((".cls", ".json")) and member.isreg():
                    notes[path] = _label(path, tar.extractfile(member).read(MAX_LABEL_BYTES))  # type: ignore[union-attr]
    except Exception as error:  # damaged extended headers and remote file systems raise any type
        reason = " ".join(str(error).split()) or type(error).__name__
        bad.append(Entry(os.fsencode(name), f"tar file cannot be read to its end: {reason}", None, number))
    bad += [_bad(name, path, note, number) for path, note in notes.items() if isinstance(note, str)]
    labels: dict[str, bytes | int] = {}
    for path, note in sorted(notes.items(), reverse=True):  # .cls after .json: it takes precedence
        if isinstance(note, bytes | int):
            labels[_key(path)] = note
    entries = []
    for path, found, offset in images:
        key = _key(path)
        label = labels[key] if key in labels else _class_of(name, path)
        if isinstance(found, str):
            entries.append(_bad(name, path, found, number, label))
        else:
            entries.append(Entry(os.fsencode(path), found, label, number, offset))
    return entries + bad


def _members(stream: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Raises tarfile.ReadError (and others, from damaged headers) where a tar file ends before its end mark."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # the list of all, which tarfile would keep
            if member.size < 0:
                raise tarfile.ReadError(f"{member.name} has a negative size")
            yield tar, member
        stream.seek(tar.offset)
        end = stream.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end mark, so it may be truncated")
        if any(end):  # tarfile takes any header that it cannot read for the end
            raise tarfile.ReadError(f"damaged header at byte {tar.offset}")


def _bad(name: str, path: str, reason: str, number: int, label: bytes | int | None = None) -> Entry:
    return Entry(os.fsencode(f"{name}:{path}"), reason, label, number)


def _inspect_member(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int, max_pixels: int) -> Found:
    if not member.isreg() or member.issparse():
        return "not a file"
    if member.offset_data + member.size > size:
        return "the tar file ends before it does"
    with tar.extractfile(member) as stream:  # type: ignore[union-attr]
        return _inspect_stream(stream, member.size, max_pixels)


def _label(path: str, content: bytes) -> bytes | int | str | None:
    """The class's name (bytes) or number in a .cls or .json file, None without one, or what is wrong (str)."""
    try:
        label = int(content) if path.endswith(".cls") else json.loads(content)
    except ValueError:
        return "is not a whole number" if path.endswith(".cls") else "is not valid JSON"
    if path.endswith(".json"):
        label = label.get("cls", label.get("label")) if isinstance(label, dict) else None
    if label is None or (type(label) is int and 0 <= label <= MAX_LABEL):
        return label
    if isinstance(label, str):
        return label.encode("utf-8", "surrogatepass")
    return f"holds no label: neither a name nor a whole number from 0 to {MAX_LABEL}"


def _key(path: str) -> str:
    """WebDataset's name of a sample: the path up to the first dot of its last part."""
    folder, slash, base = path.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _class_of(name: str, path: str) -> bytes | None:
    """The tar's name where it is a class: a word without digits, or what its members' names begin with, as in
    n01440764.tar with n01440764_18.JPEG. Numbered shards are no classes."""
    stem = name.rpartition("/")[2].removesuffix(".tar")
    if path.startswith((f"{stem}_", f"{stem}/", f"./{stem}_", f"./{stem}/")) or not any(map(str.isdigit, stem)):
        return os.fsencode(stem)
    return None
