"""What a command says on standard output, which may be a pipe whose reader has gone or a file on a full disk."""

import logging
import os
import sys

log = logging.getLogger(__name__)


def say(text: str) -> None:
    """Print a line. Where it cannot be written, that is reported once, and all that follows is dropped."""
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:  # ValueError: it is closed
        # The interpreter would fail again at its end, with what is still in the buffer.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open to the end
        log.warning("standard output cannot be written (%s): going on without", error)
