"""How a run ends before its last step: asked to stop, diverged, or its last checkpoint not written."""

import json
import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from cae_fast.files import survive_disk, write_text
from cae_fast.training.checkpoint import state_files
from cae_fast.training.monitor import Monitor

log = logging.getLogger(__name__)
GO_ON, STOP, STOP_DIVERGED = range(3)
MAX_CONSECUTIVE_SKIPS = 10
UNSAVED, DIVERGED = 1, 3
"""Exit statuses."""
STOPPED = "stopped.json"


class StopRequest:
    """While active, SIGINT and SIGTERM set `requested` to the signal's name; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = ""
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


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
