"""Stop between steps when the process is asked to."""

import signal
from types import FrameType
from typing import Any


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
