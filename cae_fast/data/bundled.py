"""Real images that ship with the package: a part of Fashion-MNIST (labelled) and a few photographs.

Fashion-MNIST is kept in its original idx format (Xiao, Rasul and Vollgraf, arXiv 1708.07747) and unpacked once into
PNG files, so that it goes through the same loader as any other folder of images.
"""

import gzip
import hashlib
import os
import shutil
import struct
import tempfile
from pathlib import Path

from cae_fast.config import UserError
from cae_fast.data.locking import only_one

BUNDLED_NAMES = ("fashion-mnist/train", "fashion-mnist/test", "photographs")
CLASS_NAMES = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")

_HERE = Path(__file__).parent / "bundled"
_ARCHIVES = {"train": "train", "test": "t10k"}
_PARTS = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")


def bundled_path(name: str) -> Path:
    """Return the folder of images called `name`, one of BUNDLED_NAMES.

    The first call for Fashion-MNIST unpacks both of its splits into
    `<cache>/fashion-mnist-<hash>/<split>/<label>_<class>/<number>.png` (28x28, 8-bit gray; the number is the position
    in the archive). The cache is $CAE_FAST_CACHE, else $XDG_CACHE_HOME/cae_fast, else ~/.cache/cae_fast.
    Several processes may do this at once. Raises UserError for an unknown name and for a cache that cannot be written.
    """
    if name not in BUNDLED_NAMES:
        raise UserError(f"data.path: there are no bundled images called {name!r}; valid: {', '.join(BUNDLED_NAMES)}")
    dataset, _, split = name.partition("/")
    if dataset == "photographs":
        return _HERE / "photographs"
    return _unpacked_fashion_mnist() / split


def _unpacked_fashion_mnist() -> Path:
    digest = hashlib.sha256()
    for archive in _ARCHIVES.values():
        for part in _PARTS:
            digest.update((_HERE / "fashion_mnist" / f"{archive}-{part}").read_bytes())

    cache = _cache_folder()
    folder = cache / f"fashion-mnist-{digest.hexdigest()[:8]}"
    if folder.is_dir():
        return folder

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with only_one(folder) as alone:
            if not folder.is_dir():
                _unpack(cache, folder, alone)
    except OSError as error:
        raise UserError(
            f"cannot unpack the bundled images into {cache} ({error.strerror or error}); "
            "set CAE_FAST_CACHE to a folder that can be written"
        ) from error
    return folder


def _unpack(cache: Path, folder: Path, alone: bool) -> None:
    from cae_fast.files import sync  # here, because most runs import this module and never unpack

    for leftover in cache.glob(".unpacking-*") if alone else ():
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=cache) as temporary:
        complete = Path(temporary) / folder.name
        for split, archive in _ARCHIVES.items():
            _write_pngs(archive, complete / split)
        os.sync()  # once for all: 70,000 times fsync would take minutes
        _rename_unless_present(complete, folder)
    sync(cache)


def _cache_folder() -> Path:
    if chosen := os.environ.get("CAE_FAST_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "cae_fast"
    try:
        return Path.home() / ".cache" / "cae_fast"
    except RuntimeError as error:
        raise UserError("this user has no home folder; set CAE_FAST_CACHE to a folder that can be written") from error


def _write_pngs(archive: str, folder: Path) -> None:
    from PIL import Image  # here, because most runs import this module and never unpack

    images, labels = (gzip.decompress((_HERE / "fashion_mnist" / f"{archive}-{part}").read_bytes()) for part in _PARTS)
    count, height, width = struct.unpack(">3I", images[4:16])
    for label, name in enumerate(CLASS_NAMES):
        (folder / f"{label}_{name}").mkdir(parents=True)
    for number in range(count):
        start = 16 + number * height * width
        label = labels[8 + number]
        image = Image.frombytes("L", (width, height), images[start : start + height * width])
        image.save(folder / f"{label}_{CLASS_NAMES[label]}" / f"{number:05d}.png")


def _rename_unless_present(source: Path, target: Path) -> None:
    """Rename a folder; when another process was first, its copy holds the same files and stays."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
