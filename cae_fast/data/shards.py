"""Tar files of images: which files a pattern names, their classes, and reading from them at an offset.

They are plain, not compressed, on a disk or at a URL, in one of three layouts: WebDataset's (members whose names are
equal up to the first dot belong together; the label is in the one that ends in .cls, or under "cls" or "label" in the
.json), ImageNet's (a tar for each class) and class folders packed as they are.
"""

import errno
import functools
import glob
import io
import logging
import os
import re
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path

from cae_fast.config import UserError
from cae_fast.data.folder import walk
from cae_fast.data.patience import is_trouble, open_file, patiently
from cae_fast.data.remote import is_url, list_tars, read_url, url_states
from cae_fast.data.source import Entry, LeftOut
from cae_fast.data.tar import scan_tar

logger = logging.getLogger(__name__)

# Of each process: some systems allow 256 open files in all, some of a run's are others.
MAX_OPEN_FILES = max(1, min(128, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
BLOCK = 64  # tar files in flight at once: bounds the memory of a scan
THREADS = 16  # hide a network's latency


@dataclass(frozen=True)
class Shards:
    """Tar files by absolute path or URL, and their states when they were scanned, where they are known."""

    names: list[str]
    scanned_states: list[str] = field(default_factory=list, repr=False)

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
        return None if is_url(first) or os.path.isfile(first) else f"the first of its tar files, {first}"

    def check(self, out: Path) -> None:
        """Nothing: a tar file that is missing is listed as a bad one, and an index may lie beside the others."""

    def states(self) -> list[str]:
        """Size and time of each file; of URLs, size and what their server says of the version."""
        with ThreadPoolExecutor(THREADS) as pool:
            remote = dict(zip(urls := list(filter(is_url, self.names)), url_states(urls, pool), strict=True))
            return [remote[name] if name in remote else _state_of(name) for name in self.names]

    def scan(self, max_pixels: int, pool: ThreadPoolExecutor, left_out: LeftOut) -> Iterator[Entry]:
        """Every image of the files in order; also every tar file that cannot be read to its end, as a bad file."""
        numbers = iter(range(len(self.names)))
        while block := list(islice(numbers, BLOCK)):
            for entries, others in pool.map(lambda number: scan_tar(number, self.names[number], max_pixels), block):
                left_out.kinds += others.kinds
                left_out.hidden += others.hidden
                yield from entries
            logger.info("index: %d of %d tar files scanned", block[-1] + 1, len(self.names))

    def classes(self, labels: list[bytes]) -> list[bytes | None]:
        """A class is the first folder inside the tar files, below those that all images share; else the tar's own name.

        labels: as scan_tar makes them. Names in label files alone count where there are some. The tar files' names
        tell classes apart only where there are two of them: a lone train.tar without folders has no classes.
        """
        if any(label.startswith(b"\0\0") for label in labels):
            return [label[2:] if label.startswith(b"\0\0") else None for label in labels]

        pairs = [label.partition(b"\0")[::2] for label in labels]
        folders = [inside.split(b"/") if inside else [] for _, inside in pairs]
        shared = len(os.path.commonprefix(folders))  # noqa: RUF071 - of lists, not of strings
        shared -= shared > 0 and min(map(len, folders)) == shared  # images lie there: it is a class
        names = [inside[shared] if len(inside) > shared else None for inside in folders]

        with_folders = {stem for (stem, _), name in zip(pairs, names, strict=True) if name}
        stems = {stem for stem, _ in pairs if stem}
        if len(stems) > 1 and len(set(names) - {None}) == 1 and None not in names:
            return [stem or None for stem, _ in pairs]  # all have one folder of one name
        if len(stems) < 2 and not any(names):
            return [None] * len(labels)
        return [
            name or (None if stem in with_folders else stem or None)
            for (stem, _), name in zip(pairs, names, strict=True)
        ]

    def path(self, path: str, shard: int) -> str:
        """`tar file:member`."""
        return f"{self.names[shard]}:{path}"

    def read(self, shard: int, offset: int, size: int, path: str = "") -> bytes:
        """`size` bytes of a shard from `offset` on. Raises OSError, and UserError where the tar file has changed."""
        name = self.names[shard]
        if is_url(name):
            data = read_url(name, offset, size)
            if len(data) != size:
                raise OSError(errno.EIO, f"has {len(data)} of the image's {size} bytes at {offset}")
            return data

        try:
            # Held by its name until it has been read: another thread may push it from the cache.
            file = _opened(name, self.scanned_states[shard] if self.scanned_states else None)
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            _opened.cache_clear()  # too many are open, or the descriptor is stale
            if is_trouble(error):
                raise
            raise OSError(errno.EIO, error.strerror or str(error)) from error  # never the fault of a single image
        if len(data) != size:
            raise UserError(_changed(name, f"it has {len(data)} of an image's {size} bytes at {offset}"))
        return data


@functools.lru_cache(MAX_OPEN_FILES)
def _opened(name: str, state: str | None) -> io.FileIO:
    # Read with pread only, which moves no file position: threads and forked processes may share the descriptor. One
    # that leaves the cache is closed when the last reader lets go of it.
    file = open(open_file(name), "rb", buffering=0)  # noqa: SIM115
    if state is not None and (now := _state(os.fstat(file.fileno()))) != state:
        raise UserError(_changed(name, f"size and time were {state}, are {now}"))
    return file


def _changed(name: str, how: str) -> str:
    return f"{name}: the tar file changed since it was scanned ({how}): make the index again"


def _state_of(name: str) -> str:
    try:
        return _state(patiently(name, lambda: os.stat(name)))
    except OSError as error:
        return str(error.strerror)


def _state(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


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
    if is_url(piece):
        return list_tars(piece)
    path = os.path.abspath(os.path.expanduser(piece))
    if os.path.isdir(path):
        return _tars_of_folder(path)
    if not path.endswith(".tar"):
        return []
    names = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path)))
    if not names:
        raise UserError(f"{piece}: there is no such tar file")
    return names


def _tars_of_folder(path: str) -> list[str]:
    """The tar files of a folder that holds no images; other files (lists, statistics) may lie beside them."""
    with os.scandir(path) as entries:
        names = [entry.path for entry in entries if entry.name.endswith(".tar") and not entry.name.startswith(".")]
    names = sorted(filter(os.path.isfile, names))
    return names if names and next(walk(os.fsencode(path), LeftOut()), None) is None else []
