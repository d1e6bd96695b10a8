"""Where images come from: what the index asks of a folder of images, of tar files, or of whatever is added."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from cae_fast.data.headers import Found


class Entry(NamedTuple):
    """One image of a scan."""

    path: bytes  # its place in the source; for a bad one in a tar file with the tar file's name before it
    found: Found
    label: bytes | int | None  # a class's name, its number, or none
    shard: int = 0
    offset: int = 0


class Source(Protocol):
    """A place of images. `str()` names it in messages; meta.json of its index keeps its tar files, else that name."""

    @property
    def name(self) -> str: ...  # short, for the index

    @property
    def names(self) -> list[str]: ...  # of its tar files; empty where every image is a file of its own

    # What changes with the files, as far as a quick look tells. Raises UserError and OSError.
    def states(self) -> Iterator[str]: ...

    # What does not exist any more, as far as a quick look tells, or None.
    def gone(self) -> str | None: ...

    # Raises UserError where there is nothing to scan, or where its index must not be written to `out`.
    def check(self, out: Path) -> None: ...

    # Every image, good or bad, in an order that the same files always have.
    def scan(self, max_pixels: int, pool: ThreadPoolExecutor) -> Iterator[Entry]: ...

    # The file of an image, also for messages.
    def path(self, path: str, shard: int) -> Path | str: ...

    # The bytes of an image. Raises OSError.
    def read(self, shard: int, offset: int, size: int, path: str) -> bytes: ...
