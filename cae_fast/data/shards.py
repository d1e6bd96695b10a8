"""Tar files of images: which files a pattern names, and reading from them at an offset.

They are plain, not compressed, on a disk or at a URL that fsspec knows (s3://, gs://, https:// ...).
"""

import errno
import functools
import glob
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

from cae_fast.config import UserError

MAX_OPEN_FILES = 128  # of each process; some systems allow 256 in all


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

    def is_gone(self) -> bool:
        """Whether the first file is missing (a look at all would cost thousands of requests); URLs are not asked."""
        return not _is_url(self.names[0]) and not os.path.isfile(self.names[0])

    def states(self) -> Iterator[str]:
        """What changes with the files: size and time of those on a disk."""
        for name in self.names:
            status = None if _is_url(name) else os.stat(name)
            yield f"{name} {status.st_size} {status.st_mtime_ns}" if status else name

    def read(self, shard: int, offset: int, size: int) -> bytes:
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


def open_shard(name: str) -> IO[bytes]:
    """A tar file to scan, seekable."""
    if not _is_url(name):
        return open(name, "rb")
    files, path = _filesystem(name)
    return files.open(path, "rb")
