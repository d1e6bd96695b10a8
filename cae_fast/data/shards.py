"""Tar files of images: which files a pattern names, scanning them, and reading from them at an offset.

They are plain, not compressed, on a disk or at a URL that fsspec knows (s3://, gs://, https:// ...), in one of two
layouts: WebDataset's (members whose names are equal up to the first dot belong together; the label is in the one that
ends in .cls, or under "cls" or "label" in the .json) and ImageNet's (a tar for each class).
"""

import errno
import functools
import glob
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import IO, Any

from cae_fast.config import UserError
from cae_fast.data.headers import EXTENSIONS, Found, inspect
from cae_fast.data.source import Entry

logger = logging.getLogger(__name__)

MAX_OPEN_FILES = 128  # of each process; some systems allow 256 in all
BLOCK = 64  # tar files in flight at once: bounds the memory of a scan
MAX_LABEL = 999_999
MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True)
class Shards:
    """Tar files by absolute path or URL."""

    names: list[str]

    def __str__(self) -> str:
        first, last = self.names[0], self.names[-1]
        return first if len(self.names) == 1 else f"{first} ... {last} ({len(self.names):,} tar files)"

    @property
    def name(self) -> str:
        """The name of the first file's folder."""
        return Path(self.names[0]).parent.name

    def gone(self) -> str | None:
        """The first file, if it is missing (a look at all would cost thousands of requests); URLs are not asked."""
        first = self.names[0]
        return None if _is_url(first) or os.path.isfile(first) else f"the first of its tar files, {first}"

    def check(self, out: Path) -> None:
        """Nothing: a tar file that is missing is listed as a bad one, and an index may lie beside the others."""

    def states(self) -> Iterator[str]:
        """What changes with the files: size and time of those on a disk."""
        for name in self.names:
            status = None if _is_url(name) else os.stat(name)
            yield f"{name} {status.st_size} {status.st_mtime_ns}" if status else name

    def scan(self, max_pixels: int, pool: ThreadPoolExecutor) -> Iterator[Entry]:
        """Every image of the files in order; also every tar file that cannot be read to its end, as a bad file."""
        numbers = iter(range(len(self.names)))
        while block := list(islice(numbers, BLOCK)):
            for entries in pool.map(lambda number: _scan_shard(number, self.names[number], max_pixels), block):
                yield from entries
            logger.info("index: %d of %d tar files scanned", block[-1] + 1, len(self.names))

    def path(self, path: str, shard: int) -> str:
        """`tar file:member`."""
        return f"{self.names[shard]}:{path}"

    def read(self, shard: int, offset: int, size: int, path: str = "") -> bytes:
        """`size` bytes of a shard from `offset` on. Raises OSError, also when there are fewer."""
        name = self.names[shard]
        if _is_url(name):
            data = _read_url(name, offset, size)
        else:
            file = _opened(name)  # held by its name until it has been read: another thread may push it from the cache
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise OSError(errno.EIO, f"has {len(data)} of the image's {size} bytes at {offset}: the tar file changed")
        return data


@functools.lru_cache(MAX_OPEN_FILES)
def _opened(name: str) -> io.FileIO:
    # Read with pread only, which moves no file position: threads and forked processes may share the descriptor. One
    # that leaves the cache is closed when the last reader lets go of it.
    return open(name, "rb", buffering=0)


def _is_url(name: str) -> bool:
    return "://" in name


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path on it; fsspec keeps one for each process."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except (ImportError, ValueError) as error:  # fsspec or the package for this protocol is missing; or unknown
        raise UserError(f"{url}: URLs are read with fsspec and its package for this protocol: {error}") from error


def _read_url(url: str, offset: int, size: int) -> bytes:
    files, path = _filesystem(url)
    try:
        return files.cat_file(path, start=offset, end=offset + size)
    except Exception as error:  # every file system has its own errors
        raise OSError(errno.EIO, f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def find_shards(sources: Sequence[str]) -> Shards | None:
    """The tar files that paths, URLs, globs, brace ranges or folders of nothing else name; None: the one source is
    something else. A range keeps its order, globs and folders are sorted.

    Raises UserError when one of several is no tar file, or when nothing is there.
    """
    pieces = [piece for source in sources for piece in expand_braces(source)]
    found = {piece: _tars(piece) for piece in pieces}
    missing = [piece for piece, names in found.items() if not names]
    if len(pieces) == 1 and missing:
        return None
    if missing:
        raise UserError(f"{missing[0]} is neither a tar file nor a folder of tar files")
    return Shards(list(dict.fromkeys(name for names in found.values() for name in names)))


def expand_braces(pattern: str) -> list[str]:
    """{000..013} (zero-padded as its first number) and {train,val} as a shell expands them, not nested."""
    if os.path.exists(pattern):
        return [pattern]
    parts = re.split(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", pattern)
    return ["".join(choice) for choice in product(*map(_alternatives, parts, range(len(parts))))]


def _alternatives(part: str, place: int) -> list[str]:
    if place % 2 == 0:
        return [part]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", part):
        first, last = numbers.groups()
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return part.split(",")


def _tars(piece: str) -> list[str]:
    if _is_url(piece):
        return _remote_tars(piece)
    path = os.path.abspath(os.path.expanduser(piece))
    if os.path.isdir(path):
        return _tars_of_folder(path)
    if not path.endswith(".tar"):
        return []
    names = [path] if os.path.isfile(path) else sorted(glob.glob(path))
    if not names:
        raise UserError(f"{piece}: there is no such tar file")
    return names


def _tars_of_folder(path: str) -> list[str]:
    names = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.endswith(".tar") and entry.is_file():
                names.append(entry.path)
            elif not entry.name.startswith("."):
                return []  # images lie beside them
    return sorted(names)


def _remote_tars(url: str) -> list[str]:
    files, path = _filesystem(url)
    if url.endswith(".tar") and not glob.has_magic(url):
        return [url]
    try:
        names = files.glob(path if glob.has_magic(path) else f"{path.rstrip('/')}/*.tar")
    except Exception as error:  # every file system has its own errors
        raise UserError(f"{url}: cannot be listed: {' '.join(str(error).split())}") from error
    if not names:
        raise UserError(f"{url}: there is no such tar file")
    return [files.unstrip_protocol(name) for name in sorted(names)]


def _open_shard(name: str) -> IO[bytes]:
    """A tar file to scan, seekable."""
    if not _is_url(name):
        return open(name, "rb")
    files, path = _filesystem(name)
    return files.open(path, "rb")


def _scan_shard(number: int, name: str, max_pixels: int) -> list[Entry]:
    images: list[tuple[str, Found, int]] = []
    notes: dict[str, bytes | int | str | None] = {}  # by label file
    bad: list[Entry] = []

    try:
        with _open_shard(name) as stream:
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
        bad.append(Entry(os.fsencode(name), f"tar file cannot be read to its end: {reason}", None))

    # Only now are all labels known: one may lie behind its image.
    bad += [Entry(os.fsencode(f"{name}:{path}"), note, None) for path, note in notes.items() if isinstance(note, str)]
    ordered = sorted(notes.items(), reverse=True)  # .cls after .json: it takes precedence
    labels = {_key(path): note for path, note in ordered if isinstance(note, bytes | int)}
    entries = []
    for path, found, offset in images:
        label = labels.get(_key(path), _class_of(name, path))
        place = f"{name}:{path}" if isinstance(found, str) else path
        entries.append(Entry(os.fsencode(place), found, label, shard=number, offset=offset))
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


def _inspect_member(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int, max_pixels: int) -> Found:
    if not member.isreg() or member.issparse():
        return "not a file"
    if member.offset_data + member.size > size:
        return "the tar file ends before it does"
    with tar.extractfile(member) as stream:  # type: ignore[union-attr]
        return inspect(stream, member.size, max_pixels)


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
