"""One run at a time in a run folder."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cae_fast.config import UserError

log = logging.getLogger(__name__)
NAME = "run.lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked(run_dir: Path, main: bool = True) -> Iterator[None]:
    """Keep other runs out of the folder, until the block or the process ends: the kernel lets go of the lock.

    Process 0 (`main`) holds it; a folder made for it goes again where the run wrote nothing. Raises UserError where
    another run holds it, or where the folder cannot be made. A file system without locks is reported.
    """
    if not main:
        yield
        return
    try:
        made = not run_dir.is_dir()
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = _acquire(run_dir / NAME)
    except OSError as error:
        raise UserError(f"train.run_dir is {run_dir}: cannot be written: {error.strerror}") from error

    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone
            (run_dir / NAME).unlink(missing_ok=True)
            if made:
                run_dir.rmdir()  # only where it is empty
        os.close(handle)


def _acquire(path: Path) -> int:
    """The locked file. UserError where another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            log.warning("%s: this system has no file locks: two runs here would overwrite each other", path.parent)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            raise UserError(
                f"train.run_dir is {path.parent}: another run is writing there ({owner or 'just started'}): "
                "stop that one, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(handle)
                raise
            log.warning(
                "%s: cannot be locked (%s): two runs here would overwrite each other", path.parent, error.strerror
            )

        # The run before may have deleted the file between opening and locking it.
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
        os.close(handle)
