"""One run at a time in a run folder."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cae_fast.config import UserError
from cae_fast.locks import lock, unlock

NAME = "run.lock"


@contextmanager
def locked(run_dir: Path, main: bool = True) -> Iterator[None]:
    """Keep other runs out of the folder, until the block or the process ends.

    Process 0 (`main`) holds the lock; a folder made for it goes again where the run wrote nothing. Raises UserError
    where another run holds it, or where the folder cannot be made.
    """
    if not main:
        yield
        return
    path = run_dir / NAME
    try:
        made = not run_dir.is_dir()
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = lock(path)
        if handle is not None:
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    except BlockingIOError as error:
        owner = path.read_text(encoding="utf-8", errors="replace")[:200] if path.exists() else ""
        raise UserError(
            f"train.run_dir is {run_dir}: another run is writing there ({owner or 'just started'}): stop that one, or "
            "choose another folder"
        ) from error
    except OSError as error:
        raise UserError(f"train.run_dir is {run_dir}: cannot be written: {error.strerror}") from error

    try:
        yield
    finally:
        with suppress(OSError):  # the folder may be gone, or not empty
            unlock(path, handle)
            if made:
                run_dir.rmdir()
