"""Which backend decodes a run's images: as configured, as the run began, or the fastest that works here."""

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from cae_fast.config import UserError
from cae_fast.data.batches import Batch
from cae_fast.data.dali import why_not

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "dali", "cpu", "pil")
SECONDS = 4.0  # of warming up, and again of measuring
TIMEOUT = 180.0  # seconds for the whole trial
MAX_DIFFERENCE = 1.0  # gray levels on average between DALI's first batch and the CPU path's; 0.3 where all is well

OpenLoader = Callable[..., Generator[Batch, None, None]]


def choose_backend(wanted: str, began_with: str | None, device: torch.device, open_loader: OpenLoader) -> str:
    """dali, cpu or pil: the backend of a run, with the reason in the log.

    wanted: data.backend. began_with: that of the run to continue, None for a new one; auto keeps it, as another one
    would change the pixels a little. open_loader: `pretrain_loader` with all settings but decoder, device, pin_memory,
    start_step and stop_step; it must pickle. Only auto on a GPU tries the backends out.
    Raises UserError for an unknown backend, and for DALI where it cannot be imported.
    """
    if wanted not in BACKENDS:
        raise UserError(f"data.backend is {wanted!r}: set one of {', '.join(BACKENDS)}")

    if wanted == "auto" and began_with is None:
        chosen, reason = _fastest(device, open_loader)
    elif wanted == "auto":
        chosen, reason = str(began_with), "the run began with it"
    else:
        chosen, reason = wanted, "as data.backend says"

    if chosen == "dali" and (missing := why_not()):
        raise UserError(f"data.backend is dali ({reason}): {missing}")
    logger.info("data: backend %s: %s", chosen, reason)
    return chosen


def _fastest(device: torch.device, open_loader: OpenLoader) -> tuple[str, str]:
    if device.type != "cuda":
        return "cpu", "without a GPU, DALI is slower"
    if missing := why_not():
        return "cpu", missing
    rates = try_out(partial(_measure, open_loader, device, SECONDS), TIMEOUT)
    if isinstance(rates, str):
        return "cpu", f"DALI failed its trial: {rates}"
    figures = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return max(rates, key=lambda name: rates[name]), f"the faster one on these images, in images/s: {figures}"


def try_out(trial: Callable[[], Any], timeout: float) -> Any:
    """The result of a function in a process of its own, or how it failed, as text: it may crash or hang."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, trial))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else f"no result after {timeout:.0f} s"
    except EOFError:
        process.join()
        return f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send_result(sender: Connection, trial: Callable[[], Any]) -> None:
    for interruption in (signal.SIGINT, signal.SIGTERM):  # the main process decides what they mean
        signal.signal(interruption, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)  # bad files are reported when the run itself meets them
    try:
        result = trial()
    except Exception as error:
        result = f"{type(error).__name__}: {' '.join(str(error).split())}"
    sender.send(result)


def _measure(open_loader: OpenLoader, device: torch.device, seconds: float) -> dict[str, float] | str:
    """Images/s of both backends, or what is wrong with DALI's pixels."""
    first: dict[str, torch.Tensor] = {}
    rates: dict[str, float] = {}
    for decoder in ("dali", "cpu"):
        pin = device.type == "cuda"
        with closing(
            open_loader(decoder=decoder, device=device, pin_memory=pin, start_step=0, stop_step=10**9)
        ) as loader:
            first[decoder] = next(loader).images.cpu().float()
            rates[decoder] = images_per_second(loader, device, seconds)
    difference = float((first["dali"] - first["cpu"]).abs().mean())
    if difference > MAX_DIFFERENCE:
        return f"its pixels differ from the CPU path's by {difference:.1f} gray levels on average"
    return rates


def images_per_second(batches: Generator[Batch, None, None], device: torch.device, seconds: float) -> float:
    """Steady rate on the device; as long before the measurement, the workers' queues settle."""
    counted, began = 0, time.perf_counter()
    for batch in batches:
        batch.to(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if now - began >= 2 * seconds:
            break
        counted += len(batch.images) if now - began >= seconds else 0
    return counted / seconds
