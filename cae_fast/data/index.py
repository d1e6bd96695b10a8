"""The index of a folder of images or of images in tar files: scanned once, then memory-mapped."""

import glob
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cae_fast.config import DataConfig, UserError
from cae_fast.data.bundled import bundled_path
from cae_fast.data.folder import Folder
from cae_fast.data.headers import EXTENSIONS
from cae_fast.data.index_files import FORMAT_VERSIONS, damaged, map_arrays, read_meta, verify, write_index
from cae_fast.data.locking import is_being_made, only_one
from cae_fast.data.shards import Shards, find_shards
from cae_fast.data.source import Source
from cae_fast.files import sync

logger = logging.getLogger(__name__)


class ImageIndex:
    """An opened index. Pickles as the name of its folder; a worker process maps the files anew.

    Attributes: folder, source (Folder or Shards), classes (names, by label), heights, widths, labels int32 (n,), sizes
    int64 (n,), shard_starts (the first image of each tar file, int64 (shards + 1,); None for a folder), fingerprint
    (sha256 of the content, wherever it lies), num_bad, max_pixels, left_out (lines on what is no image), states.
    Raises UserError where the folder is none or is damaged: with `whole` all bytes are looked at.
    """

    def __init__(self, folder: Path, whole: bool = False) -> None:
        self.folder = Path(folder)
        meta = read_meta(self.folder)
        if meta is None:
            raise UserError(f"{self.folder} is not an index folder: write one with `cae-fast index`")
        if meta.get("version") != FORMAT_VERSIONS["shards" if "shards" in meta else "root"]:
            raise UserError(
                f"index {self.folder} has format version {meta.get('version')}, unknown to this program: make it again"
            )
        try:
            self.states: list[str] = meta.get("states", [])  # older indexes have none
            self.source: Source = (
                Shards(list(meta["shards"]), self.states) if "shards" in meta else Folder(Path(meta["root"]))
            )
            self.classes: list[str] = list(meta["classes"])
            self.fingerprint: str = meta["fingerprint"]
            self.num_bad, self.max_pixels = int(meta["num_bad"]), int(meta["max_pixels"])
            self.left_out: list[str] = list(meta.get("left_out", []))
            self.created: str = meta["created"]
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.folder, f"meta.json: {error}") from error

        arrays = map_arrays(self.folder, meta)
        if whole:
            verify(self.folder, meta, arrays)
        self._paths, self._path_offsets = arrays["paths"], arrays["path_offsets"]
        self.heights, self.widths = arrays["heights"], arrays["widths"]
        self.sizes, self.labels = arrays["sizes"], arrays["labels"]
        self._offsets, self.shard_starts = arrays.get("offsets"), arrays.get("shard_starts")

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        bad = f"{self.num_bad:,} bad files (listed in {self.bad_files})" if self.num_bad else "no bad files"
        classes = f"{len(self.classes):,} classes" if self.classes else "no classes"
        scan = f"scanned {self.created} into {self.folder} (delete it to scan again)"
        return "; ".join([f"{self.source}: {len(self):,} images, {classes}, {bad}", *self.left_out, scan])

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


def open_index(path: str | Path) -> ImageIndex:
    """Open an index folder. Raises UserError when it is none, is damaged, or its images are gone or have changed."""
    index = ImageIndex(Path(path), whole=True)
    if gone := index.source.gone():
        raise UserError(f"index {path}: {gone}, does not exist")
    if not index.states:
        logger.warning("index %s is older than the check whether its images changed: make it again to have it", path)
    elif changed := _changed(index.source, index.states, index.source.states()):
        raise UserError(f"index {path}: {changed} changed since it was scanned: make it again with `cae-fast index`")
    return index


def _changed(source: Source, before: list[str], now: list[str]) -> str | None:
    if before == now:
        return None
    changed = [name for name, old, new in zip(source.names, before, now, strict=False) if old != new]
    return f"{changed[0]} ({len(changed)} of {len(now)} tar files)" if changed else f"files in {source}"


def index_for(data: DataConfig, run_dir: Path) -> ImageIndex:
    """The index that a run uses: data.index, or that of data.path, made on first use beside the run folder.

    It is made anew (beside the old one, which other runs may be using) when the name, size or time of any image or tar
    file changed; and in place where it is damaged.
    """
    if data.index:
        return open_index(data.index)
    source = resolve_data_path(data.path)
    source.check(folder := Path(os.path.abspath(run_dir)).parent / "indexes")
    key = hashlib.sha256(os.fsencode("\0".join([str(source), *source.states(), str(data.max_pixels)]))).hexdigest()[:8]
    folder /= f"{source.name or 'root'}-{key}.index"
    return _whole_index(folder) or build_index(source, folder, data.max_pixels, replace=False)


def _whole_index(folder: Path) -> ImageIndex | None:
    """The index that a run made, None where there is none or a damaged one."""
    if not folder.exists():
        return None
    try:
        return ImageIndex(folder, whole=True)
    except UserError as error:
        logger.warning("index: %s: made again", error)
        return None


def resolve_data_path(path: str) -> Folder | Shards:
    """The source of images that data.path names: a folder, bundled:NAME or tar files. Raises UserError without any."""
    if not path:
        raise UserError("data.path is empty: set it to a folder of images, to tar files or to bundled:NAME")
    if path.startswith("bundled:"):
        return Folder(Path(os.path.abspath(bundled_path(path.removeprefix("bundled:")))))
    source = find_source([path])
    if isinstance(source, Folder) and not source.root.is_dir():
        raise UserError(f"data.path={path}: is not a folder and no tar file")
    return source


def find_source(names: Sequence[str]) -> Folder | Shards:
    """The tar files that the names stand for, else the one folder."""
    return find_shards(names) or Folder(Path(os.path.abspath(Path(names[0]).expanduser())))


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
    source = Folder(Path(os.path.abspath(source))) if isinstance(source, Path) else source
    source.check(out)
    if replace and out.exists() and read_meta(out) is None:
        raise UserError(f"{out} exists and is not an index: choose another place for the index")

    try:
        return _build(source, out, max_pixels, num_threads, replace)
    except OSError as error:  # of writing: those of reading are known by now
        raise UserError(f"index {out}: cannot be written: {error.strerror or error}") from error


def _build(source: Source, out: Path, max_pixels: int, num_threads: int, replace: bool) -> ImageIndex:
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_one(out) as alone:
        if not replace and (index := _whole_index(out)) is not None:
            return index
        if alone:
            _remove_leftovers(out, every=not replace)
        temporary = _new_folder(out)
        try:
            num_images, num_bad = write_index(source, temporary, max_pixels, num_threads)
            if not num_images:
                raise UserError(_no_images(source, out, temporary, num_bad))
            _put_in_place(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ImageIndex(out)


def _no_images(source: Source, out: Path, temporary: Path, num_bad: int) -> str:
    if not num_bad:
        return f"{source} holds no image files ({', '.join(EXTENSIONS)})"
    report = out.with_name(f"{out.stem}.bad_files.tsv")
    os.replace(temporary / "bad_files.tsv", report)
    return f"{source} holds no usable image: all {num_bad} image files are bad, see {report}"


def _remove_leftovers(out: Path, every: bool) -> None:
    """What scans that were killed left, or `every` index in its folder that no process makes."""
    for leftover in out.parent.glob(".*.index.*.*" if every else f".{glob.escape(out.name)}.*.*"):
        name = leftover.name[1:].rpartition(".")[0].rpartition(".")[0]
        if leftover.suffix in (".tmp", ".old") and (name == out.name or not is_being_made(out.with_name(name))):
            shutil.rmtree(leftover, ignore_errors=True)


def _new_folder(out: Path) -> Path:
    # Random, not the process id: in containers that is often the same.
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    os.umask(mask := os.umask(0))
    folder.chmod(0o777 & ~mask)  # mkdtemp's is private, but others may want to use an index
    return folder


def _put_in_place(temporary: Path, out: Path) -> None:
    if out.exists():
        os.rename(out, old := _new_folder(out))
        os.rename(temporary, out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, out)
        sync(out.parent)
