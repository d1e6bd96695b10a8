"""Troubles of the machine are no bad images: what fails for them is tried again, and at last ends the run."""

import errno
import os
import stat
import time
from collections.abc import Callable
from typing import TypeVar

from cae_fast.config import UserError

WAITS = tuple(0.1 * 2**i for i in range(7))  # seconds between two tries, 12.7 in all
# Whatever else a system call reports (EIO, EMFILE, ESTALE, ENOMEM, ETIMEDOUT ...) is not the file's fault.
OF_THE_FILE = frozenset(
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    }
)

Result = TypeVar("Result")


def is_trouble(error: BaseException) -> bool:
    """Whether the machine, a disk or the network is at fault. Errors that Python code makes up carry no number."""
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in OF_THE_FILE
    return isinstance(error, MemoryError)


def patiently(name: str, function: Callable[[], Result]) -> Result:
    """function(), again after growing waits while the machine is in trouble. Raises UserError when it stays so."""
    for wait in WAITS:
        try:
            return function()
        except (OSError, MemoryError) as error:
            if not is_trouble(error):
                raise
        time.sleep(wait)
    try:
        return function()
    except (OSError, MemoryError) as error:
        if not is_trouble(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else "out of memory"
        raise UserError(f"{name}: cannot be read: {reason}; tried again for {sum(WAITS):.0f} s") from error


def open_file(path: str | bytes, was_there: bool = False) -> int:
    """A descriptor of a regular file, to be read. Raises OSError, with errno None where it is something else.

    Never waits, as opening a pipe would. A file whose folder is gone or empty too is not gone but its disk is away,
    which is trouble. was_there: so it is where a link leads to such a folder.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        place = os.path.realpath(path) if was_there else path
        if not os.path.lexists(place) and _is_empty(os.path.dirname(place)):
            raise OSError(errno.ENODEV, "its folder is gone or empty") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "Is a directory") if stat.S_ISDIR(mode) else OSError("not a file")
    return descriptor


def _is_empty(folder: str | bytes) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True
