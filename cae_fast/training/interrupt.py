"""Stop between steps: when the process is asked to, or when training has diverged."""

import signal
from types import FrameType
from typing import Any

from cae_fast.training.monitor import Monitor
from cae_fast.training.run_setup import MAX_CONSECUTIVE_SKIPS

GO_ON, STOP, STOP_DIVERGED = range(3)


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
