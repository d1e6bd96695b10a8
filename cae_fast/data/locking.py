"""One process at a time makes an index or unpacks a data set, so that what killed ones left may be deleted."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def only_one(out: Path) -> Iterator[bool]:
    """Wait while another process makes `out`, in a folder that exists; the kernel ends that when it dies.

    False where the file system knows no locks: then others may be at work.
    """
    path = _lock_of(out)
    with _locked(path) as locked:
        try:
            yield locked
        finally:
            if locked:
                path.unlink(missing_ok=True)


def is_being_made(out: Path) -> bool:
    """Whether a process makes `out` just now; also True where the file system knows no locks."""
    try:
        with open(_lock_of(out)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lock_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.lock")


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """A file that this process alone has locked; False where the file system cannot."""
    told = False
    while True:
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    logger.info("another process has locked %s: waiting for it", path)
                told = True
            except OSError as error:
                logger.warning("%s cannot be locked (%s)", path, error.strerror)
                yield False
                return
            else:
                if _is(path, lock.fileno()):  # its last owner may have deleted it meanwhile
                    yield True
                    return
        time.sleep(0.1)


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
