"""What a pretraining run shows and records: progress, metrics.jsonl, TensorBoard, W&B and a profiler trace.

The training loop counts steps from 0, as the schedule does. All that is shown or written here, and `log.profile`,
counts them from 1: "step 10" is the state after ten steps.
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from torch import Tensor

from cae_fast.config import LogConfig, UserError
from cae_fast.cost.devices import device_peak_flops
from cae_fast.files import append, replacing, survive_disk, write_text
from cae_fast.output import say

IDS_IN_WARNING = 8


class _Step(NamedTuple):
    step: int  # from 1
    metrics: dict[str, Tensor]
    lr: float
    data_wait: float
    sample_ids: Any


class Monitor:
    """Collects the metrics of every step on the device and shows them once per `log.every_steps` steps.

    A context manager. After each interval these can be read:
    `last` (the interval's line of metrics.jsonl, None before the first one), `skipped_total` (skipped steps of the
    whole run, those before a resume included) and `consecutive_skips` (the longest run of skipped steps since the
    start or resume, also one that ended within an interval or spans several).

    Raises UserError for a bad `log.every_steps` or `log.profile`, for `log.wandb` without the wandb package and for
    a damaged metrics.jsonl.
    """

    def __init__(
        self,
        run_dir: Path,
        log: LogConfig,
        *,
        total_steps: int,
        start_step: int,
        steps_per_epoch: int,
        images_per_step: int,
        flops_per_image: int,
        device: torch.device,
    ) -> None:
        """`images_per_step` counts all processes; `flops_per_image` is forward and backward, 2 per multiply-add."""
        if log.every_steps < 1:
            raise UserError(f"log.every_steps={log.every_steps}: give a number of at least 1")
        self.run_dir, self.log, self.device = run_dir, log, device
        self.total_steps, self.start_step, self.steps_per_epoch = total_steps, start_step, steps_per_epoch
        self.images_per_step, self.flops_per_image = images_per_step, flops_per_image
        self.profile_range = _profile_range(log.profile, total_steps)
        self.peak_flops = device_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.metrics_path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = drop_steps_after(self.metrics_path, start_step)

        # What the run before this one left, and what this one counts.
        self.skipped_total = sum(line.get("event") == "skipped_step" for line in kept)
        self.consecutive_skips = 0
        self.last: dict[str, Any] | None = None
        self._current_run = 0
        self._steps_done = start_step
        self._pending: list[_Step] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._console = Console()
        self._display: _Display | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> "Monitor":
        with ExitStack() as stack:
            if self.log.tensorboard:
                # Not at the top of the file: it takes seconds to import.
                from torch.utils.tensorboard import SummaryWriter

                self._tensorboard = SummaryWriter(self.run_dir / "tensorboard", purge_step=self.start_step + 1)
                stack.callback(survive_disk, "tensorboard", self._tensorboard.close)
            if self.log.wandb is not None:
                self._wandb = _start_wandb(self.log.wandb, self.run_dir)
                stack.callback(self._wandb.finish)
            stack.callback(self._stop_profiler)
            if self._console.is_interactive:
                self._display = _Display(self._console, self.total_steps, self.start_step)
                stack.enter_context(self._display.live)
            self._stack = stack.pop_all()
        self._interval_start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            # After an error the device may be unusable, and reading from it would hide the error's cause.
            if kind is None:
                self.flush()

    def before_step(self, step: int) -> None:
        """Call before step `step` (from 0): starts the profiler when it is one of `log.profile`."""
        first, last = self.profile_range
        if first <= step + 1 <= last and self._profiler is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()

    def record(
        self, step: int, metrics: Mapping[str, Tensor | None], *, lr: float, data_wait: float, sample_ids: Any
    ) -> None:
        """Keep the metrics of optimizer step `step` (from 0); at the end of an interval, flush.

        `metrics` are 0-d tensors on the device (None: this run has no such metric) that nobody overwrites until the
        next flush; `skipped` is 1 where a non-finite loss or gradient made the device skip the step. `data_wait`:
        seconds the step waited for its batch. `sample_ids`: the step's sample positions, a list or array on the host.
        Raises ValueError when a step is left out or comes twice.
        """
        if step != self._steps_done:
            raise ValueError(f"step {step} was recorded after {self._steps_done} steps")
        self._steps_done += 1
        kept = {name: value.detach() for name, value in metrics.items() if value is not None}
        self._pending.append(_Step(self._steps_done, kept, lr, data_wait, sample_ids))
        if self._steps_done == self.profile_range[1]:
            self._stop_profiler()
        if self._display is not None:
            self._display.advance(self._steps_done)
        if self._steps_done % self.log.every_steps == 0 or self._steps_done == self.total_steps:
            self.flush()

    def flush(self) -> None:
        """Write what was recorded since the last flush; call it before saving a checkpoint.

        The metrics leave the device here, in one transfer. Without it before a checkpoint, a run that is killed and
        resumed from there would lack the interval's first steps in metrics.jsonl.
        """
        if not self._pending:
            return
        steps, self._pending = self._pending, []
        values = _to_host([step.metrics for step in steps], self.device)
        now = time.perf_counter()
        wall, self._interval_start = max(now - self._interval_start, 1e-9), now
        skipped = [step for step, row in zip(steps, values, strict=True) if row.get("skipped", 0.0) != 0.0]
        self._count_skips(skipped, steps)
        self.last = {**self._interval(steps, values, wall), "skipped": len(skipped)}
        self.last["skipped_total"] = self.skipped_total
        for step in skipped:
            self._warn_skipped(step)
        survive_disk("metrics.jsonl", append, self.metrics_path, _json_line(self.last))
        survive_disk("tensorboard", self._send, self.last)
        self._show(self.last)

    def _count_skips(self, skipped: list[_Step], steps: list[_Step]) -> None:
        numbers = {step.step for step in skipped}
        self.skipped_total += len(numbers)
        for step in steps:
            self._current_run = self._current_run + 1 if step.step in numbers else 0
            self.consecutive_skips = max(self.consecutive_skips, self._current_run)

    def _interval(self, steps: list[_Step], values: list[dict[str, float]], wall: float) -> dict[str, Any]:
        last = steps[-1]
        line: dict[str, Any] = {"step": last.step, "epoch": last.step / self.steps_per_epoch, "time": time.time()}
        line["steps"] = len(steps)
        for name in dict.fromkeys(name for row in values for name in row if name != "skipped"):
            line[name] = _finite_mean([row[name] for row in values if name in row])
        line["lr"] = last.lr
        line["images_per_second"] = len(steps) * self.images_per_step / wall
        if self.peak_flops is not None:
            world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            line["mfu"] = line["images_per_second"] * self.flops_per_image / (self.peak_flops * world_size)
        line["data_wait"] = min(sum(step.data_wait for step in steps) / wall, 1.0)
        line["memory_gib"] = _memory_gib(self.device)
        self._recent.append((len(steps), wall))
        seconds_per_step = sum(wall for _, wall in self._recent) / sum(count for count, _ in self._recent)
        line["eta_seconds"] = max(self.total_steps - last.step, 0) * seconds_per_step
        return line

    def _warn_skipped(self, step: _Step) -> None:
        ids = torch.as_tensor(step.sample_ids).flatten().tolist()
        event = {"event": "skipped_step", "step": step.step, "sample_ids": ids}
        survive_disk("metrics.jsonl", append, self.metrics_path, _json_line(event))
        shown = ", ".join(map(str, ids[:IDS_IN_WARNING])) + (" ..." if len(ids) > IDS_IN_WARNING else "")
        text = f"warning: skipped step {step.step}: its loss or gradient was not finite; samples {shown}"
        if self._display is not None:
            self._console.print(Text(text, style="yellow"))
        else:
            say(text)

    def _send(self, line: dict[str, Any]) -> None:
        numbers = {name: value for name, value in line.items() if name not in ("step", "time") and value is not None}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, line["step"])
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def _show(self, line: dict[str, Any]) -> None:
        eta = _duration(line["eta_seconds"])
        if self._display is not None:
            self._display.update(line["epoch"], eta, _metrics_text(line))
            return
        start = f"step {line['step']:>{len(str(self.total_steps))}}/{self.total_steps}  epoch {line['epoch']:.2f}"
        say(f"{start}  {_metrics_text(line)}  ETA {eta}")

    def _stop_profiler(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        first, last = self.profile_range
        folder = self.run_dir / "profile"
        with replacing(folder / f"steps_{first}-{last}.json") as temporary:
            profiler.export_chrome_trace(str(temporary))


class _Display:
    """The progress bar on a terminal, with the metrics of the last interval below it."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            expand=True,
        )
        self.task = self.bar.add_task("", total=total_steps, completed=start_step, epoch="-", eta="-")
        self.live = Live(Group(self.bar), console=console, refresh_per_second=4)

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def update(self, epoch: float, eta: str, text: str) -> None:
        self.bar.update(self.task, epoch=f"{epoch:.2f}", eta=eta)
        self.live.update(Group(self.bar, Text(text)))


def drop_steps_after(metrics_path: Path, step: int) -> list[dict[str, Any]]:
    """Remove from metrics.jsonl, atomically, the lines of later steps and a torn last line; return what was kept.

    A killed run can have logged steps after its last checkpoint, which the resumed run takes (and logs) again.
    Raises UserError when a line other than the last is not a JSON object with a step.
    """
    if not metrics_path.exists():
        return []
    lines = metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            keep = entry["step"] <= step
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{metrics_path}: line {number} is not a log line; repair or remove the file") from error
        if keep:
            kept.append((line, entry))
    write_text(metrics_path, "".join(f"{line}\n" for line, _ in kept))
    return [entry for _, entry in kept]


def _profile_range(profile: list[int], total_steps: int) -> tuple[int, int]:
    if not profile:
        return 0, -1
    if len(profile) != 2 or not 1 <= profile[0] <= profile[1] <= total_steps:
        raise UserError(f"log.profile={profile}: give [first, last] with 1 <= first <= last <= {total_steps} (steps)")
    return profile[0], profile[1]


def _start_wandb(project: str, run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"log.wandb={project}: needs the wandb package: pip install 'cae-fast[wandb]'") from error
    # The id in the run folder lets a resumed run go on in the same W&B run.
    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        write_text(id_file, os.urandom(8).hex())
    run_id = id_file.read_text(encoding="utf-8").strip()
    return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow")


def _to_host(rows: list[dict[str, Tensor]], device: torch.device) -> list[dict[str, float]]:
    flat = [value for row in rows for value in row.values()]
    if not flat:
        return [{} for _ in rows]
    numbers = iter(torch.stack([value.to(device, torch.float32) for value in flat]).tolist())
    return [{name: next(numbers) for name in row} for row in rows]


def _finite_mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def _json_line(entry: dict[str, Any]) -> str:
    # JSON has no NaN or infinity.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(clean, allow_nan=False) + "\n"


def _memory_gib(device: torch.device) -> float | None:
    """Peak memory in GiB: the allocator's on CUDA, the process's resident set elsewhere (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _metrics_text(line: dict[str, Any]) -> str:
    def number(name: str, style: str) -> str:
        return "not finite" if line[name] is None else format(line[name], style)

    parts = []
    if "loss" in line:
        inner = [f"{name[5:]} {number(name, '.4f')}" for name in ("loss_main", "loss_align") if name in line]
        parts.append(f"loss {number('loss', '.4f')}" + (f" ({', '.join(inner)})" if inner else ""))
    if "accuracy" in line:
        parts.append(f"accuracy {number('accuracy', '.1%')}")
    if "psnr" in line:
        parts.append(f"PSNR {number('psnr', '.2f')} dB")
    if "perplexity" in line:
        parts.append(f"perplexity {line['perplexity']:.0f} ({line['used_codes']:.0f} codes used)")
    parts.append(f"lr {line['lr']:.2e}")
    if "grad_norm" in line:
        parts.append(f"grad {number('grad_norm', '.3g')}")
    parts.append(f"{line['images_per_second']:,.0f} images/s")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts.append(f"data wait {line['data_wait']:.1%}")
    if line["memory_gib"] is not None:
        parts.append(f"mem {line['memory_gib']:.1f} GiB")
    if line["skipped_total"]:
        parts.append(f"skipped {line['skipped_total']}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
