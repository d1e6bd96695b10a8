"""A folder of images, nested or flat: every image is a file of its own, and its first folder is its class."""

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cae_fast.config import UserError
from cae_fast.data.headers import Found, inspect
from cae_fast.data.patience import is_trouble, open_file, patiently
from cae_fast.data.source import Entry, LeftOut

logger = logging.getLogger(__name__)

BLOCK = 4096  # files in flight at once: bounds the memory of a scan
CHUNK = 256  # files whose states one thread asks for at a time
THREADS = 16  # hide a network's latency


@dataclass(frozen=True)
class Folder:
    """A folder of images by its absolute path."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def names(self) -> list[str]:
        return []

    def states(self) -> list[str]:
        """One digest of the names, sizes and times of all image files."""
        root, digest = os.fsencode(self.root), hashlib.sha256()
        files = walk(root, LeftOut())
        with ThreadPoolExecutor(THREADS) as pool:
            while block := list(islice(files, CHUNK * THREADS)):
                chunks = [block[start : start + CHUNK] for start in range(0, len(block), CHUNK)]
                for states in pool.map(lambda chunk: _states(root, chunk), chunks):
                    digest.update(states)
        return [digest.hexdigest()]

    def gone(self) -> str | None:
        return None if self.root.is_dir() else f"the folder of its images, {self}"

    def check(self, out: Path) -> None:
        if not self.root.is_dir():
            raise UserError(f"{self} is not a folder of images and no tar file")
        if out.resolve().is_relative_to(self.root.resolve()):
            raise UserError(f"{out} lies inside the data folder {self}: choose a place outside it for the index")

    def scan(self, max_pixels: int, pool: ThreadPoolExecutor, left_out: LeftOut) -> Iterator[Entry]:
        """Every image file in sorted order; linked folders are followed, each folder once."""
        root = os.fsencode(self.root)

        def entry(item: tuple[bytes, str | None]) -> Entry:
            path, reason = item
            first, nested, _ = path.partition(b"/")
            found = reason or inspect_file(os.path.join(root, path), max_pixels)
            return Entry(path, found, first if nested else None)

        files, done = walk(root, left_out), 0
        while block := list(islice(files, BLOCK)):
            yield from pool.map(entry, block)
            done += len(block)
            if done % (64 * BLOCK) == 0:
                logger.info("index: %d files scanned", done)

    def classes(self, labels: list[bytes]) -> list[bytes | None]:
        return list(labels)

    def path(self, path: str, shard: int = 0) -> Path:
        return self.root / path

    def read(self, shard: int, offset: int, size: int, path: str) -> bytes:
        with open(open_file(os.path.join(self.root, path), was_there=True), "rb", buffering=0) as file:
            return file.read()


def walk(root: bytes, left_out: LeftOut) -> Iterator[tuple[bytes, str | None]]:
    """(path below root, None or why it is bad) of image files and of entries that cannot be looked at, sorted."""
    visited: set[tuple[int, int]] = set()  # stops loops of linked folders
    levels = [iter([(b"", True, "")])]  # no recursion: folders may be nested deeper than Python's stack
    while levels:
        for path, is_folder, reason in levels[-1]:
            if is_folder:
                levels.append(iter(_listing(root, path, visited, left_out)))
                break
            yield path, reason or None
        else:
            levels.pop()


def _listing(
    root: bytes, relative: bytes, visited: set[tuple[int, int]], left_out: LeftOut
) -> list[tuple[bytes, bool, str]]:
    """(path below root, whether it is a folder, why it is bad or "") of a folder's entries."""
    folder = os.path.join(root, relative)

    def entries() -> list[tuple[bytes, bool, str]]:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            return []
        with os.scandir(folder) as scan:
            found = sorted((entry.name, *_kind(entry)) for entry in scan)
        visited.add((status.st_dev, status.st_ino))
        return found

    try:
        found = patiently(os.fsdecode(folder), entries)
    except OSError as error:
        return [(relative or b".", False, f"folder cannot be read: {error.strerror}")]
    return [
        (os.path.join(relative, name), is_folder, reason)
        for name, is_folder, reason in found
        if not left_out.is_hidden(text := os.fsdecode(name)) and (is_folder or reason or left_out.is_image(text))
    ]


def _kind(entry: os.DirEntry[bytes]) -> tuple[bool, str]:
    """Whether an entry is a folder, and why that cannot be told: a loop of links, a place that may not be entered."""
    try:
        return entry.is_dir(), ""
    except OSError as error:
        if is_trouble(error):
            raise
        return False, f"cannot be read: {error.strerror}"


def _states(root: bytes, files: list[tuple[bytes, str | None]]) -> bytes:
    return b"".join(b"%b\0%b\0" % (path, _state(os.path.join(root, path), reason)) for path, reason in files)


def _state(path: bytes, reason: str | None) -> bytes:
    try:
        status = patiently(os.fsdecode(path), lambda: os.stat(path))
    except OSError as error:
        return os.fsencode(reason or str(error.strerror))
    return b"%d %d" % (status.st_size, status.st_mtime_ns)


def inspect_file(path: bytes, max_pixels: int) -> Found:
    """(height, width, bytes) of a usable image file, else the reason why it is not usable."""

    def look() -> Found:
        with open(open_file(path), "rb") as stream:
            return inspect(stream, os.fstat(stream.fileno()).st_size, max_pixels)

    try:
        return patiently(os.fsdecode(path), look)
    except OSError as error:
        return f"cannot be read: {error.strerror}" if error.errno else str(error)
