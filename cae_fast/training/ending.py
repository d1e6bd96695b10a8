"""How a run ends before its last step: asked to stop, diverged, or its last checkpoint not written."""

import json
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from cae_fast.config import UserError
from cae_fast.files import survive_disk, write_text
from cae_fast.training.checkpoint import state_files
from cae_fast.training.monitor import Monitor

log = logging.getLogger(__name__)
Item = TypeVar("Item")
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU") if hasattr(signal, name)]
GO_ON, STOP, STOP_DIVERGED = range(3)
MAX_CONSECUTIVE_SKIPS = 10
UNSAVED, DIVERGED = 1, 3
"""Exit statuses."""
STOPPED = "stopped.json"


class Stopped(BaseException):
    """Raised where the process waits for data when it is asked to stop; no handler of errors catches it."""


class StopRequest:
    """While active, a signal that ends a program sets `requested` to its name, to stop after the step.

    SIGTERM, SIGINT, and what schedulers and closed terminals send: SIGHUP, SIGXCPU. A second SIGINT interrupts at
    once. Outside the main thread (a notebook's, say) signals stay as they are.
    """

    def __init__(self) -> None:
        self.requested = ""
        self.previous: dict[int, Any] = {}
        self.waiting = False
        self.failure: UserError | None = None
        """Why a process that is alone got no more data."""

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def until_requested(self, items: Iterator[Item], alone: bool) -> Iterator[Item]:
        """The items, up to a request to stop that comes while one is waited for, for a read may never return, or up
        to a UserError, which becomes `failure`: what was trained so far can then be saved.

        Only a process that is `alone` may end like this; of several, the others would wait for it.
        """
        while True:
            try:
                self.waiting = alone
                try:
                    if alone and self.requested:
                        return
                    item = next(items)
                finally:  # a signal may come in here, too: hence the outer try
                    self.waiting = False
            except (StopIteration, Stopped):
                return
            except UserError as error:
                if not alone:
                    raise
                self.failure = error
                return
            yield item

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if self.waiting:
            self.waiting = False
            raise Stopped


def own_verdict(monitor: Monitor | None, stop: StopRequest) -> int:
    """What this process would have all processes do after this step. monitor: process 0 has one."""
    if monitor is not None and monitor.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
        return STOP_DIVERGED
    return STOP if stop.requested else GO_ON


def diverged(run_dir: Path, step: int) -> int:
    newest = state_files(run_dir)
    where = f"the last checkpoint is that of step {newest[-1][0]}" if newest else "there is no checkpoint yet"
    log.error(
        "%d steps in a row had a non-finite loss or gradient; stopped after step %d, %s. They did not touch the "
        "weights. Lower optim.lr, lengthen optim.warmup_epochs or try train.precision=float32, and continue with "
        "train.resume=force; the samples of those steps are in %s",
        MAX_CONSECUTIVE_SKIPS,
        step,
        where,
        run_dir / "metrics.jsonl",
    )
    return DIVERGED


def unsaved(step: int) -> int:
    log.error("stopped after step %d, which is not saved; the same command continues from the last checkpoint", step)
    return UNSAVED


def stopped(run_dir: Path, step: int, reason: str) -> int:
    """Say so, also to scripts: a launcher that was told to stop exits with 1, whatever its processes do."""
    survive_disk(STOPPED, write_text, run_dir / STOPPED, json.dumps({"step": step, "reason": reason}))
    log.info("stopped by %s after step %d; run the same command again to continue", reason, step)
    return 0
