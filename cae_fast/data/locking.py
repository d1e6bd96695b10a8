"""One process at a time makes an index or unpacks a data set, so that what killed ones left may be deleted."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cae_fast.locks import lock, unlock

logger = logging.getLogger(__name__)


@contextmanager
def only_one(out: Path) -> Iterator[bool]:
    """Wait while another process makes `out`, in a folder that exists; the kernel ends that when it dies.

    False where the file system knows no locks: then others may be at work.
    """
    path, told = _lock_of(out), False
    while True:
        try:
            handle = lock(path)
            break
        except BlockingIOError:
            if not told:
                logger.info("another process has locked %s: waiting for it", path)
            told = True
            time.sleep(0.1)
    try:
        yield handle is not None
    finally:
        unlock(path, handle)


def is_being_made(out: Path) -> bool:
    """Whether a process makes `out` just now; also True where the file system knows no locks."""
    path = _lock_of(out)
    if not path.exists():
        return False
    try:
        handle = lock(path)
    except OSError:
        return True
    unlock(path, handle)
    return handle is None


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")
