"""Where images come from: what the index asks of a folder of images, of tar files, or of whatever is added."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from cae_fast.data.headers import EXTENSIONS, Found


class Entry(NamedTuple):
    """One image of a scan."""

    path: bytes  # its place in the source; for a bad one in a tar file with the tar file's name before it
    found: Found
    label: bytes | int | None  # what its class's name comes of (see Source.classes), its number, or none
    shard: int = 0
    offset: int = 0


@dataclass
class LeftOut:
    """What a scan passed by."""

    kinds: Counter[str] = field(default_factory=Counter)  # files that are no images, by extension
    hidden: Counter[str] = field(default_factory=Counter)  # hidden files and folders, by name

    def is_image(self, name: str) -> bool:
        """Whether a file's last name ends as an image's; counts it where it does not."""
        if name.lower().endswith(EXTENSIONS):
            return True
        self.kinds[os.path.splitext(name)[1].lower() or "no extension"] += 1
        return False

    def is_hidden(self, name: str) -> bool:
        """Whether systems and editors keep things of their own there (.ipynb_checkpoints, ._1.jpg); counts it."""
        hidden = (name.startswith(".") or name == "__MACOSX") and name not in (".", "..")
        if hidden:
            self.hidden["._*" if name.startswith("._") else name] += 1
        return hidden

    def __add__(self, other: "LeftOut") -> "LeftOut":
        return LeftOut(self.kinds + other.kinds, self.hidden + other.hidden)

    def lines(self) -> list[str]:
        counted = ((self.kinds, "files of other kinds ignored"), (self.hidden, "hidden files or folders left out"))
        return [f"{counts.total():,} {what} ({_most(counts)})" for counts, what in counted if counts]


def _most(counts: Counter[str]) -> str:
    names = [f"{ascii(name)[1:-1][:24]} {count:,}" for name, count in counts.most_common(12)]
    return ", ".join(names + ["..."] * (len(counts) > 12))


class Source(Protocol):
    """A place of images. `str()` names it in messages; meta.json of its index keeps its tar files, else that name."""

    @property
    def name(self) -> str: ...  # short, for the index

    @property
    def names(self) -> list[str]: ...  # of its tar files; empty where every image is a file of its own

    # What changes with the files: sizes and times. One for each tar file, or one of all files of a folder.
    # Raises UserError.
    def states(self) -> list[str]: ...

    # What does not exist any more, as far as a quick look tells, or None.
    def gone(self) -> str | None: ...

    # Raises UserError where there is nothing to scan, or where its index must not be written to `out`.
    def check(self, out: Path) -> None: ...

    # Every image, good or bad, in an order that the same files always have; the rest is counted in left_out.
    # Raises UserError where the machine is in trouble.
    def scan(self, max_pixels: int, pool: ThreadPoolExecutor, left_out: LeftOut) -> Iterator[Entry]: ...

    # The classes' names, None for no class, of all different labels that a scan found, in their order.
    def classes(self, labels: list[bytes]) -> list[bytes | None]: ...

    # The file of an image, also for messages.
    def path(self, path: str, shard: int) -> Path | str: ...

    # The bytes of an image. Raises OSError, and UserError where it is no longer what was scanned.
    def read(self, shard: int, offset: int, size: int, path: str) -> bytes: ...
