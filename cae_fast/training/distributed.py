"""One process among many: who it is, how it meets the others, what they decide together, and what ends a hang.

Two process groups: torch's default one (NCCL or gloo, by device) gives up after train.timeout_seconds; `patient`
(gloo) is for waiting while process 0 alone works, and for decisions on the host.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from cae_fast.config import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
HUNG = 75
PATIENCE = timedelta(days=7)
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
BUCKET = 2**27
"""Elements that one reduction takes together: 256 MiB of bfloat16."""


class Watchdog:
    """Ends the process with status 75 and every thread's stack when `beat` was not called for `seconds`.

    A collective whose partner is gone, or a read from a dead disk, can block for ever, and nothing in the blocked
    thread can notice.
    """

    def __init__(self, seconds: float, rank: int):
        self.seconds, self.rank = seconds, rank
        self.last: float | None = None  # the first beat starts it
        self.closed = False
        threading.Thread(target=self._watch, daemon=True).start()

    def beat(self) -> None:
        self.last = time.monotonic()

    def close(self) -> None:
        """Nothing is watched any more."""
        self.closed = True

    @contextmanager
    def paused(self) -> Generator[None, None, None]:
        before, self.last = self.last, None
        try:
            yield
        finally:
            self.last = None if before is None else time.monotonic()

    def _watch(self) -> None:
        while not self.closed:
            time.sleep(min(1.0, self.seconds / 4))
            last = self.last
            if last is not None and time.monotonic() - last > self.seconds and not self.closed:
                log.error(
                    "process %d made no step for train.timeout_seconds=%g: it or another process hangs; stopped. "
                    "The same command continues from the last checkpoint. Where it stood:",
                    self.rank,
                    self.seconds,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(HUNG)


@dataclass
class World:
    """The processes of a run, seen from one of them. Without arguments: a process alone, where nothing waits."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    core_share: int = 1
    """Processes that share the cores this one may use."""
    patient: dist.ProcessGroup | None = None
    watchdog: Watchdog | None = None
    _vote: tuple[Any, Tensor] | None = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def beat(self) -> None:
        """Call before every step."""
        if self.watchdog is not None:
            self.watchdog.beat()

    def on_main(self, function: Callable[[], T]) -> T:
        """What process 0's `function()` returns, on every process; they wait for it as long as it takes.

        Where it fails, process 0 raises its error and the others a UserError.
        """
        if self.size == 1:
            with self.watchdog.paused() if self.watchdog is not None else nullcontext():
                return function()
        assert self.watchdog is not None
        outcome: list[Any] = [False, None]
        with self.watchdog.paused():
            try:
                if self.main:
                    outcome = [True, function()]
            finally:
                dist.broadcast_object_list(outcome, src=0, group=self.patient)
        if not outcome[0]:
            raise UserError("process 0 failed; its own message says why")
        return outcome[1]

    def main_first(self, function: Callable[[], T]) -> T:
        """`function()` on process 0 and only then on the others, which find there the files it made."""
        made: list[T] = []
        self.on_main(lambda: made.append(function()))
        return made[0] if made else function()

    def agreed(self, verdict: int) -> int:
        """The highest verdict of all processes as of their calls before this one: none of them waits for a slow one.

        Alone, a process decides at once.
        """
        if self.size == 1:
            return verdict
        before, own = self._vote, torch.tensor(verdict)
        work = dist.all_reduce(own, dist.ReduceOp.MAX, group=self.patient, async_op=True)
        self._vote = work, own
        if before is None:
            return 0
        before[0].wait()
        return int(before[1])

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes, on the device, without waiting for it."""
        if self.size == 1:
            return values
        values = values / self.size
        dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes one after the other along the first dimension, without waiting for them."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients of one type by their mean over processes, rounded as DeepSpeed does: divided, then summed.

        In buckets: one collective a tensor would cost more than its bytes.
        """
        if self.size == 1:
            return
        for bucket in _buckets(gradients):
            flat = _flatten_dense_tensors(bucket).div_(self.size)
            dist.all_reduce(flat)
            torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))


def _buckets(tensors: Sequence[Tensor]) -> Generator[list[Tensor], None, None]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


def read_world() -> World:
    """Which process this is, as torchrun, the deepspeed launcher or srun tell in the environment.

    Raises UserError when one of them started several processes without an address to meet at.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        local_size = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
    elif "SLURM_STEP_NUM_TASKS" in env:  # not SLURM_NTASKS: that is there in a batch script without srun too
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        # With --cpus-per-task a task sees its own cores only.
        shared = "SLURM_CPUS_PER_TASK" not in env
        local_size = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0] if shared else "1"
    elif count := next((name for name in MPI_SIZES if env.get(name, "1") != "1"), None):
        raise UserError(
            f"{count} is {env[count]}: mpirun started several processes, which do not know of each other here; start "
            "them with torchrun or srun, or have mpirun set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    else:
        return World()

    try:
        rank, size, local_rank = (int(env.get(name, "0")) for name in names)
        world = World(rank=rank, size=size, local_rank=local_rank, core_share=int(local_size))
    except ValueError as error:
        raise UserError(f"{', '.join(names)} in the environment must be numbers: {error}") from error

    # Under torchrun the launcher sets them; srun leaves them to the user.
    if size > 1 and not ("MASTER_ADDR" in env and "MASTER_PORT" in env):
        raise UserError(
            f"{names[1]} is {size}, but MASTER_ADDR and MASTER_PORT are not set. Under srun, export them before: "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29500; for one '
            "process in an interactive shell of several tasks, set WORLD_SIZE=1 RANK=0"
        )
    return world


@contextmanager
def joined(world: World, device: torch.device, timeout_seconds: float, alone: bool) -> Generator[World, None, None]:
    """The world with its process groups, until the end of the block.

    alone: make no group for a process alone. Of several, process 0 alone logs more than warnings, and one that fails
    ends at once, with its message and status 1 (2 for a UserError), so that the others and the launcher notice.
    """
    if not world.main:
        logging.getLogger("cae_fast").setLevel(logging.WARNING)
    if world.size > 1 or not alone:
        _connect(world, device, timedelta(seconds=timeout_seconds))
        everyone = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(everyone, dist.ProcessGroup)
        world.patient = everyone

    world.watchdog = Watchdog(timeout_seconds, world.rank)
    try:
        yield world
    except BaseException as error:
        if world.size == 1:
            raise
        _end(error, world)
    finally:
        world.watchdog.close()
    if world.patient is not None:
        dist.destroy_process_group()


def _connect(world: World, device: torch.device, timeout: timedelta) -> None:
    store: dist.Store
    if world.size == 1:
        store = dist.HashStore()
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # DeepSpeed asks for them
    else:
        address, port = os.environ["MASTER_ADDR"], meeting_port()
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = dist.TCPStore(address, port, world.size, is_master=world.main and not served, timeout=timeout)
        except (RuntimeError, ValueError) as error:  # torch's errors of networks are RuntimeErrors
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the {world.size} processes cannot meet at MASTER_ADDR={address} MASTER_PORT={port}: {reason}"
            ) from error
    # After a restart, torchrun's store still holds what the processes before wrote.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(device.index or 0)}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)


def meeting_port() -> int:
    text = os.environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise UserError(f"MASTER_PORT is {text!r} in the environment: it must be a number from 1 to 65535")
    return int(text)


def set_group_timeouts(timeout_seconds: float, world: World) -> None:
    """Give groups that others made the run's timeout: a new group has torch's own, whatever the default group has."""
    groups = dist.distributed_c10d
    # The public name is younger than torch 2.11; newer versions warn of the private one.
    set_timeout = getattr(dist, "set_timeout", None) or groups._set_pg_timeout
    for group in list(groups._world.pg_map):
        if group is not world.patient:
            set_timeout(timedelta(seconds=timeout_seconds), group)


def _end(error: BaseException, world: World) -> None:
    # Leaving as usual could block: a process group's destructor waits for collectives that never end.
    status = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    trace = error if status == 1 else None
    log.error("process %d of %d stopped: %s: %s", world.rank, world.size, type(error).__name__, error, exc_info=trace)
    if isinstance(error, RuntimeError) and ("closed by peer" in str(error) or "Connection reset" in str(error)):
        log.error("process %d: another process is gone; its message or the launcher's says why", world.rank)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
