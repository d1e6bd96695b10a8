"""The loop of every training command: steps, metrics, checkpoints, and how it ends.

A command prepares a Run, takes its steps with `run_steps`, and finishes. What a step does and what lies beside a
training state are functions of the command; all else is here, once.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from cae_fast import __version__
from cae_fast.config import RunConfig, UserError
from cae_fast.data.sampling import SamplingPlan
from cae_fast.files import read_header
from cae_fast.training.checkpoint import Saver, save_state
from cae_fast.training.distributed import World
from cae_fast.training.ending import (
    GO_ON,
    STOP,
    STOP_DIVERGED,
    StopRequest,
    diverged,
    log,
    own_verdict,
    stopped,
    unsaved,
)
from cae_fast.training.monitor import Monitor
from cae_fast.training.optim import scheduled_lr

Config = TypeVar("Config", bound=RunConfig)
Inputs = TypeVar("Inputs")

TakeStep = Callable[[list[Inputs], int, float], dict[str, Tensor]]
"""(a step's micro-batches, its number from 0, the learning rate) -> metrics, which stay on the device."""
Publish = Callable[[dict[str, Tensor], dict[str, Any]], Callable[[], object]]
"""(training state on the host, facts) -> what writes the files for others beside it; called in the background."""


class Trained(Protocol):
    """What is trained: an engine, or the optimizer of a classifier."""

    def state_items(self) -> Iterable[tuple[str, Tensor]]:
        """The training state, the same on every process, one tensor at a time; all processes call it."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises KeyError or RuntimeError for a state of another model."""


@dataclass
class Run(Generic[Config]):
    """What every training job has."""

    config: Config
    world: World
    device: torch.device
    plan: SamplingPlan
    trained: Trained
    facts: dict[str, Any]
    """Fingerprints of what the run reads, for the header of its checkpoints."""
    flops_per_image: int
    """Forward and backward pass, 2 per multiply-add."""
    start_step: int
    published: tuple[str, ...] = ()
    """Files for others, written with every checkpoint."""
    stop: StopRequest = field(default_factory=StopRequest)
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.run_dir)

    @property
    def run_dir(self) -> Path:
        return Path(self.config.train.run_dir)

    @property
    def total_steps(self) -> int:
        return self.config.optim.epochs * self.plan.steps_per_epoch

    @property
    def last_step(self) -> int:
        """After so many steps the run ends; it may have been longer before."""
        limit = self.config.train.max_steps
        return max(self.start_step, self.total_steps if limit is None else min(limit, self.total_steps))

    @property
    def checkpoint_steps(self) -> int:
        """Steps from one checkpoint to the next."""
        return self.config.checkpoint.every_epochs * self.plan.steps_per_epoch

    def monitoring(self) -> AbstractContextManager[Monitor | None]:
        """Process 0 shows and records."""
        if not self.world.main:
            return nullcontext()
        return Monitor(
            self.run_dir,
            self.config.log,
            total_steps=self.total_steps,
            start_step=self.start_step,
            steps_per_epoch=self.plan.steps_per_epoch,
            images_per_step=self.config.train.global_batch_size,
            flops_per_image=self.flops_per_image,
            device=self.device,
        )


def run_steps(
    run: Run,
    inputs: Generator[tuple[list[Inputs], float], None, None],
    take_step: TakeStep[Inputs],
    publish: Publish | None = None,
) -> int | None:
    """Take every step that is left. Returns None when all are done, else the exit status of a run that ends here.

    inputs: for every step left its micro-batches and the seconds waited for them. All processes call this together.
    """
    world, step, saved, verdict = run.world, run.start_step, run.start_step, GO_ON
    with run.stop as stop, run.saver, run.monitoring() as monitor, closing(inputs):
        for micro_batches, waited in stop.until_requested(inputs, alone=world.size == 1):
            world.beat()
            lr = scheduled_lr(step, run.plan.steps_per_epoch, run.config.optim)

            # The step itself. Nothing in it waits for the device.
            if monitor is not None:
                monitor.before_step(step)
            metrics = take_step(micro_batches, step, lr)
            if monitor is not None:
                size = run.config.train.global_batch_size
                positions = range(step * size, (step + 1) * size)
                monitor.record(step, metrics, lr=lr, data_wait=waited, sample_ids=positions)
            step += 1

            # Processes decide together whether to go on. A diverged run keeps the checkpoints that it has.
            verdict = world.agreed(own_verdict(monitor, stop))
            if verdict == STOP_DIVERGED:
                break
            if step % run.checkpoint_steps == 0:
                save(run, monitor, saved := step, publish)
            if verdict == STOP:
                break

        if stop.requested and world.size == 1 and verdict == GO_ON:
            verdict = STOP  # asked while it waited for data
        # The files for others may be older than the state: something ended this program between them.
        if step and verdict != STOP_DIVERGED and (saved != step or not world.on_main(lambda: is_published(run, step))):
            save(run, monitor, step, publish)
        world.on_main(run.saver.wait)

    if stop.failure is not None:
        raise stop.failure
    if verdict == STOP_DIVERGED:
        return world.on_main(lambda: diverged(run.run_dir, step))
    if world.on_main(lambda: run.saver.failed):
        return unsaved(step)
    if verdict == STOP and step < run.last_step:
        return world.on_main(lambda: stopped(run.run_dir, step, run.stop.requested or "a signal to another process"))
    return None


def is_published(run: Run, step: int) -> bool:
    """Whether the files for others are those of this step. Called when they should be: waits for what is written."""
    run.saver.wait()
    for path in (run.run_dir / name for name in run.published):
        try:
            if read_header(path).get("step") != step:
                return False
        except UserError:
            return False
    return True


def save(run: Run, monitor: Monitor | None, step: int, publish: Publish | None) -> None:
    """Start writing a checkpoint: all processes gather it, process 0 writes it in the background."""
    if monitor is not None:
        monitor.flush()
    run.world.on_main(run.saver.wait)
    state = run.saver.snapshot(run.trained.state_items(), keep=run.world.main)
    if not run.world.main:
        return

    keep_every = run.config.checkpoint.keep_every_epochs * run.plan.steps_per_epoch
    keep = set(range(keep_every, step, keep_every)) if keep_every else set()
    facts = {"config": asdict(run.config), "version": __version__, "step": step, **run.facts}
    write_published = publish(state, facts) if publish is not None else None

    def write() -> None:
        if not run.run_dir.is_dir():
            log.error("%s is gone: the checkpoint of step %d makes it anew; what it held is lost", run.run_dir, step)
        save_state(run.run_dir, step, state, facts, keep=keep)
        if write_published is not None:
            write_published()

    run.saver.start(write, step)
