"""A folder of images, nested or flat: every image is a file of its own, and its first folder is its class."""

import logging
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PosixPath
from typing import ClassVar

from cae_fast.config import UserError
from cae_fast.data.headers import EXTENSIONS, Found, inspect
from cae_fast.data.source import Entry

logger = logging.getLogger(__name__)

BLOCK = 4096  # files in flight at once: bounds the memory of a scan


class Folder(PosixPath):
    """The absolute path of a folder, as a source of images."""

    names: ClassVar[list[str]] = []

    def states(self) -> Iterator[str]:
        """The times of the folder and of the folders on its first level: they change with the names inside."""
        yield f"{self} {self.stat().st_mtime_ns}"
        try:
            with os.scandir(self) as entries:
                yield from sorted(f"{entry.name} {entry.stat().st_mtime_ns}" for entry in entries if entry.is_dir())
        except OSError as error:
            raise UserError(f"data.path={self}: cannot be read: {error.strerror}") from error

    def gone(self) -> str | None:
        return None if self.is_dir() else f"the folder of its images, {self}"

    def check(self, out: Path) -> None:
        if not self.is_dir():
            raise UserError(f"{self} is not a folder of images and no tar file")
        if out.resolve().is_relative_to(self.resolve()):
            raise UserError(f"{out} lies inside the data folder {self}: choose a place outside it for the index")

    def scan(self, max_pixels: int, pool: ThreadPoolExecutor) -> Iterator[Entry]:
        """Every image file in sorted order; linked folders are followed, each folder once."""
        root = os.fsencode(self)

        def entry(item: tuple[bytes, str | None]) -> Entry:
            path, reason = item
            first, nested, _ = path.partition(b"/")
            found = reason or inspect_file(os.path.join(root, path), max_pixels)
            return Entry(path, found, first if nested else None)

        files, done = _walk(root, b"", set()), 0
        while block := list(islice(files, BLOCK)):
            yield from pool.map(entry, block)
            done += len(block)
            if done % (64 * BLOCK) == 0:
                logger.info("index: %d files scanned", done)

    def path(self, path: str, shard: int = 0) -> Path:
        return Path(self, path)

    def read(self, shard: int, offset: int, size: int, path: str) -> bytes:
        return self.path(path).read_bytes()


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
            return inspect(stream, status.st_size, max_pixels)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
