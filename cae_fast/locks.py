"""Files that one process at a time has locked: the kernel lets go of them when it dies."""

import logging
import os
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


def lock(path: Path) -> int | None:
    """The descriptor of a lock file, made and locked here; None, with a line, where the system knows no locks.

    Raises BlockingIOError while another process has it, and OSError where it cannot be made. Whoever is done deletes
    the file, then closes the descriptor.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            import fcntl  # not on Windows

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except (ImportError, OSError) as error:
            os.close(handle)
            log.warning("%s cannot be locked (%s): two processes there would not notice each other", path, error)
            return None

        # Its last owner may have deleted it between opening and locking.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                return handle
        os.close(handle)


def unlock(path: Path, handle: int | None) -> None:
    if handle is not None:
        path.unlink(missing_ok=True)
        os.close(handle)
