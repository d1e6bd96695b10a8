"""Checkpoints written in a thread while training goes on, and writing that a full disk does not end."""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from torch import Tensor

from cae_fast.training.checkpoint import state_files

log = logging.getLogger(__name__)


def survive_disk(what: str, function: Callable[..., object], *args: object) -> None:
    """function(*args); where the disk refuses, what it would have written is lost, with a warning."""
    try:
        function(*args)
    except OSError as error:
        log.warning("%s: could not be written: %s", what, error)


def append(path: Path, text: str) -> None:
    """Add all of the text to a file, or nothing."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


class Saver:
    """Writes one checkpoint at a time. A context manager: its end waits for the last one.

    A disk that is full or a folder that is gone leaves the checkpoints that are there: it is logged, `failed` is set
    until a later checkpoint is written, and training goes on. Any other error is raised by the next `wait`.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.failed = run_dir, False
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def snapshot(self, tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
        """Copies on the host, valid until the next call, in memory that is used again; empty where not `keep`.

        Call `wait` before. Goes through all tensors in any case, which processes gather together.
        """
        names = []
        for name, tensor in tensors:
            if not keep:
                continue
            names.append(name)
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return {name: self._copies[name] for name in names}

    def start(self, write: Callable[[], object], step: int) -> None:
        """Run `write()`, which makes the checkpoint of `step`, in the background."""
        self._thread = threading.Thread(target=self._run, args=(write, step), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong, other than with the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], object], step: int) -> None:
        try:
            write()
            self.failed = False
        except (OSError, SafetensorError) as error:
            self.failed = True
            states = state_files(self.run_dir)
            last = f"that of step {states[-1][0]}" if states else "none"
            log.error(
                "the checkpoint of step %d could not be written to %s: %s. The last whole one is %s; going on",
                step,
                self.run_dir,
                " ".join(str(error).split()),
                last,
            )
        except Exception as error:
            self._error = error
