"""Worker processes: opened where their queues fit into shared memory, ended with their reader, missed when they die."""

import ctypes
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import threading
from collections.abc import Generator, Iterable
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from cae_fast.config import UserError

SHARED_MEMORY = "/dev/shm"  # Docker gives a container 64 MB
PREFETCH = 2  # batches that each worker makes ahead
DEAD = ("exited unexpectedly", "killed by signal", "received 0 items of ancdata", "Too many open files")


def data_loader(
    dataset: Dataset, places: Iterable, num_workers: int, *, batch_bytes: float, pin_memory: bool = False
) -> DataLoader:
    """dataset[place] for each place in order, made by worker processes that leave signals to the main process.

    batch_bytes: of the tensors of one place. Raises UserError where the workers' queues do not fit into /dev/shm.
    """
    _check_shared_memory(num_workers, batch_bytes)
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=places,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the default one would take a number from the global generator
    )


def worker_items(loader: DataLoader) -> Generator[Any, None, None]:
    """What the loader yields, and a UserError at the end where a worker died or could not hand on its batch.

    Its workers end with this generator, whatever ends it.
    """
    on_child_end = signal.getsignal(signal.SIGCHLD)
    iterator: Any = iter(loader)
    if threading.current_thread() is threading.main_thread() and on_child_end is not None:
        # torch's handler would raise wherever the main process is, in the middle of a step; it looks here, too.
        signal.signal(signal.SIGCHLD, on_child_end)
    try:
        yield from iterator
    except (RuntimeError, OSError, EOFError) as error:
        if not loader.num_workers or not _is_death(iterator._workers, error):
            raise
        yield UserError(_death(iterator._workers, str(error)))
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()  # garbage collection comes too late when someone keeps an error's traceback


def _check_shared_memory(num_workers: int, batch_bytes: float) -> None:
    if not num_workers or not os.path.isdir(SHARED_MEMORY):
        return
    needed = batch_bytes * (PREFETCH * num_workers + 1)  # and the batch that is in use
    free, total = _shared_memory()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, all with as many workers
    if needed > free or needed * processes > total:
        raise UserError(
            f"data.num_workers={num_workers}: the workers' queues need {needed * processes / 1e6:,.0f} MB of shared "
            f"memory, {_of_shared_memory()}: give the container more (docker run --shm-size=8g), or set "
            "data.num_workers=0"
        )


def _is_death(workers: list[Any], error: Exception) -> bool:
    """Whether a worker died or memory ran out; what a worker itself raises is neither."""
    if isinstance(error, EOFError | ConnectionError):  # a worker hands its batches on until the last moment
        return bool(wait([worker.sentinel for worker in workers], timeout=1))
    return any(text in str(error) for text in DEAD)


def _death(workers: list[Any], error: str) -> str:
    for worker in workers:
        if wait([worker.sentinel], timeout=0):
            worker.join(1)  # it has ended, but its status may come a moment later
    ended = [f"{code}{f', {os.strerror(code)}' * (code > 1)}" for worker in workers if (code := worker.exitcode)]
    how = f"ended (status {'; '.join(ended)})" if ended else f"lost a batch ({' '.join(error.split())[:200]})"
    return (
        f"data: a worker process {how}: memory, open files (ulimit -n) or shared memory ran out, "
        f"{_of_shared_memory()}: allow more (docker run --shm-size=8g), or set data.num_workers=0"
    )


def _of_shared_memory() -> str:
    if not os.path.isdir(SHARED_MEMORY):
        return f"{SHARED_MEMORY} does not exist"
    free, total = _shared_memory()
    return f"{SHARED_MEMORY} has {free / 1e6:,.0f} MB free of {total / 1e6:,.0f}"


def _shared_memory() -> tuple[int, int]:
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize


def _start_worker(worker_id: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process of a run; only the main process decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main_process = multiprocessing.parent_process()
    if main_process is not None and hasattr(signal, "sigwaitinfo"):  # macOS has none: there SIGTERM ends the workers
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(main_process.pid,), daemon=True).start()
    # A batch that does not fit into shared memory would be dropped with a traceback, and waited for without an end.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    _keep_freed_memory()


def _end(error: Exception, batch: Any) -> None:
    number = re.search(r"\((\d+)\)\s*$", str(error))  # torch's errors end with the system's
    os._exit(int(number[1]) if number else getattr(error, "errno", None) or 1)


def _end_when_told_by(main_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)


def _keep_freed_memory() -> None:
    """Let malloc use an image's memory for the next one; glibc gives it back, and its page faults cost a fifth."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that glibc allows
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD
