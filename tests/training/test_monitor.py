import json
import math
import os
import pty
import sys
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from cae_fast.config import LogConfig, UserError
from cae_fast.cost.devices import device_peak_flops
from cae_fast.training import monitor as monitor_module
from cae_fast.training.monitor import Monitor, drop_steps_after

SIZES = {"total_steps": 100, "steps_per_epoch": 20, "images_per_step": 32, "flops_per_image": 10**9}


def make_monitor(run_dir, every_steps=5, start_step=0, tensorboard=False, device="cpu", **changes):
    log = {name: changes.pop(name) for name in ("wandb", "profile") if name in changes}
    config = LogConfig(every_steps=every_steps, tensorboard=tensorboard, **log)
    return Monitor(run_dir, config, start_step=start_step, device=torch.device(device), **{**SIZES, **changes})


def metrics(loss=1.0, skipped=False, **more):
    values = {"loss": loss, "loss_main": 0.75 * loss, "loss_align": 0.25 * loss, "grad_norm": 2.0, **more}
    return {name: torch.tensor(value) for name, value in {**values, "skipped": float(skipped)}.items()}


def record(monitor, step, values=None, ids=(1, 2), data_wait=0.0):
    """Record the step-th step, counted from 1 as in everything that the monitor shows."""
    monitor.record(step - 1, values or metrics(), lr=1e-3, data_wait=data_wait, sample_ids=ids)


def read_lines(run_dir):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """Replaces the monitor's clock by one that tests set."""
    now = types.SimpleNamespace(seconds=100.0)
    fake = types.SimpleNamespace(perf_counter=lambda: now.seconds, time=lambda: 1e9 + now.seconds)
    monkeypatch.setattr(monitor_module, "time", fake)
    return now


def test_interval_means_rates_and_time(tmp_path, clock):
    with make_monitor(tmp_path) as monitor:
        monitor.peak_flops = 1e12
        for step in range(1, 6):
            record(monitor, step, metrics(loss=float(step)), data_wait=0.1)
            assert (monitor.last is None) == (step < 5)
            clock.seconds += 0.5 if step < 4 else 0.25
        line = monitor.last
        for step in range(6, 11):
            record(monitor, step)
            clock.seconds += 1.0
    first, second = read_lines(tmp_path)
    assert first == line
    # From 101.75 s on the clock, where the first interval ended, to 106 s.
    assert second["images_per_second"] == pytest.approx(5 * 32 / 4.25)
    assert second["eta_seconds"] == pytest.approx(90 * (1.75 + 4.25) / 10)
    # The fifth step's flush came 1.75 s after the start.
    assert (line["step"], line["steps"], line["epoch"]) == (5, 5, 0.25)
    assert line["time"] == pytest.approx(1e9 + 101.75)
    assert (line["loss"], line["loss_main"], line["loss_align"]) == (3.0, 2.25, 0.75)
    assert line["lr"] == 1e-3
    assert line["images_per_second"] == pytest.approx(5 * 32 / 1.75)
    assert line["mfu"] == pytest.approx(5 * 32 * 1e9 / 1.75 / 1e12)
    assert line["data_wait"] == pytest.approx(0.5 / 1.75)
    assert line["eta_seconds"] == pytest.approx(95 * 1.75 / 5)
    assert line["skipped"] == line["skipped_total"] == 0
    assert 0.05 < line["memory_gib"] < 100


def test_last_step_and_exit_write_what_is_left(tmp_path):
    with make_monitor(tmp_path, every_steps=5, total_steps=7) as monitor:
        for step in range(1, 8):
            record(monitor, step)
        assert monitor.last["step"] == 7
    with make_monitor(tmp_path / "stopped") as monitor:
        record(monitor, 1)
        record(monitor, 2)
    assert [(line["step"], line["steps"]) for line in read_lines(tmp_path)] == [(5, 5), (7, 2)]
    assert [(line["step"], line["steps"]) for line in read_lines(tmp_path / "stopped")] == [(2, 2)]


@pytest.mark.parametrize("step", [5, 6, 8])
def test_steps_out_of_order_are_refused(tmp_path, step):
    with make_monitor(tmp_path, start_step=6) as monitor:
        monitor.record(6, metrics(), lr=1e-3, data_wait=0.0, sample_ids=[])
        with pytest.raises(ValueError, match=f"step {step} was recorded after 7 steps"):
            monitor.record(step, metrics(), lr=1e-3, data_wait=0.0, sample_ids=[])


def test_an_error_in_the_run_is_not_hidden_by_unreadable_metrics(tmp_path):
    def run():
        with make_monitor(tmp_path) as monitor:
            record(monitor, 1, {"loss": torch.empty((), device="meta")})
            raise KeyError("cause")

    with pytest.raises(KeyError, match="cause"):
        run()


def test_values_that_are_not_finite_leave_means_and_valid_json(tmp_path, capsys):
    with make_monitor(tmp_path, every_steps=3) as monitor:
        record(monitor, 1, metrics(loss=1.0))
        record(monitor, 2, metrics(loss=math.nan, skipped=True))
        record(monitor, 3, metrics(loss=3.0) | {"grad_norm": torch.tensor(math.inf)})
        for step in (4, 5, 6):
            values = metrics(loss=-math.inf, skipped=step == 4)
            monitor.record(step - 1, values, lr=math.nan, data_wait=0.0, sample_ids=[0])
    lines = [line for line in read_lines(tmp_path) if "event" not in line]
    assert (lines[0]["loss"], lines[0]["grad_norm"], lines[0]["skipped"]) == (2.0, 2.0, 1)
    assert (lines[1]["loss"], lines[1]["lr"], lines[1]["skipped_total"]) == (None, None, 2)
    assert "loss not finite" in capsys.readouterr().out


def test_skipped_steps_are_named_with_their_samples(tmp_path, capsys):
    with make_monitor(tmp_path) as monitor:
        record(monitor, 1)
        record(monitor, 2, metrics(skipped=True), ids=range(100, 120))
        monitor.record(2, metrics(skipped=True), lr=0.0, data_wait=0.0, sample_ids=np.array([7, 9]))
        record(monitor, 4)
        record(monitor, 5)
        assert (monitor.skipped_total, monitor.consecutive_skips) == (2, 2)
        assert monitor.last["skipped"] == 2
    events = [line for line in read_lines(tmp_path) if "event" in line]
    assert events == [
        {"event": "skipped_step", "step": 2, "sample_ids": list(range(100, 120))},
        {"event": "skipped_step", "step": 3, "sample_ids": [7, 9]},
    ]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert warnings[0].endswith("samples 100, 101, 102, 103, 104, 105, 106, 107 ...")
    assert "step 2:" in warnings[0]
    assert warnings[1].endswith("samples 7, 9")


@pytest.mark.parametrize(
    ("bad", "every_steps", "expected"),
    [
        (range(3, 13), 20, [10]),  # inside one interval that ends with good steps
        (range(3, 13), 5, [3, 8, 10, 10]),  # counted across intervals
        (range(11, 21), 20, [10]),  # up to the interval's end
        ([1, 2, 4, 5, 6, 8, 20], 20, [3]),
        ([8, 9, 11, 12, 13], 10, [2, 3]),  # a run that ended before the next interval is not carried on
        ([], 20, [0]),
    ],
)
def test_longest_run_of_skipped_steps(tmp_path, bad, every_steps, expected):
    seen = []
    with make_monitor(tmp_path, every_steps=every_steps) as monitor:
        for step in range(1, 21):
            record(monitor, step, metrics(skipped=step in bad))
            if step % every_steps == 0:
                seen.append(monitor.consecutive_skips)
        assert monitor.skipped_total == len(bad)
    assert seen == expected


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    with make_monitor(tmp_path, every_steps=5) as monitor:
        for step in range(1, 21):
            record(monitor, step, metrics(loss=1.0, skipped=step in (4, 12)))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "epo')
    with make_monitor(tmp_path, every_steps=5, start_step=10) as monitor:
        assert monitor.skipped_total == 1
        assert monitor.consecutive_skips == 0
        for step in range(11, 21):
            record(monitor, step, metrics(loss=2.0))
    lines = read_lines(tmp_path)
    assert [(line["step"], line.get("loss")) for line in lines] == [(4, None), (5, 1), (10, 1), (15, 2), (20, 2)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_flush_before_a_checkpoint_makes_a_resumed_record_complete(tmp_path):
    with make_monitor(tmp_path, every_steps=10) as monitor:
        for step in range(1, 14):
            record(monitor, step)
            if step == 7:
                monitor.flush()
    with make_monitor(tmp_path, every_steps=10, start_step=7) as monitor:
        for step in range(8, 21):
            record(monitor, step)
    lines = read_lines(tmp_path)
    assert [(line["step"], line["steps"]) for line in lines] == [(7, 7), (10, 3), (20, 10)]


@pytest.mark.parametrize("damaged", ["not json", "7", '{"loss": 1.0}'])
def test_damaged_metrics_file_is_refused_and_left_alone(tmp_path, damaged):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n'
    path.write_text(text)
    with pytest.raises(UserError, match="line 2"):
        drop_steps_after(path, 5)
    assert path.read_text() == text


def test_plain_lines_when_not_a_terminal(tmp_path, capsys):
    with make_monitor(tmp_path, total_steps=1000) as monitor:
        monitor.peak_flops = 1e15
        for step in range(1, 11):
            record(monitor, step, metrics(accuracy=0.125))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) == 2
    assert "\x1b" not in out
    assert lines[0].startswith("step    5/1000  epoch 0.25  loss 1.0000 (main 0.7500, align 0.2500)  accuracy 12.5%")
    for part in ("lr 1.00e-03", "grad 2", " images/s", "MFU ", "data wait 0.0%", "mem ", " GiB", "ETA 0:"):
        assert part in lines[1]
    assert "skipped" not in out


def test_missing_metrics_are_left_out(tmp_path, capsys):
    with make_monitor(tmp_path, every_steps=1) as monitor:
        values = {"loss": torch.tensor(1.0), "accuracy": None, "skipped": torch.tensor(False)}
        record(monitor, 1, values)
        assert "accuracy" not in monitor.last
        assert "mfu" not in monitor.last
    assert "accuracy" not in capsys.readouterr().out


def read_to_the_end(terminal: int) -> bytes:
    """All that is written to a pseudo-terminal until its other side is closed."""
    parts = []
    try:
        while part := os.read(terminal, 4096):
            parts.append(part)
    except OSError:  # how Linux says that the other side is closed
        return b"".join(parts)
    return b"".join(parts)


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    master, slave = pty.openpty()
    with ThreadPoolExecutor(1) as reader:
        # A terminal holds a few kilobytes: it has to be read while the monitor writes, which refreshes as it likes.
        output = reader.submit(read_to_the_end, master)
        with os.fdopen(slave, "w") as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            with make_monitor(tmp_path) as monitor:
                for step in range(1, 11):
                    record(monitor, step, metrics(skipped=step == 7))
        shown = output.result().decode()
    os.close(master)
    assert "10/100" in shown
    assert "loss 1.0000 (main 0.7500, align 0.2500)" in shown
    assert "warning: skipped step 7" in shown
    assert "\x1b[" in shown, "updated in place"
    assert "step  5/100" not in shown, "no plain lines beside the bar"
    assert [line["step"] for line in read_lines(tmp_path)] == [5, 7, 10]


class CountOps(TorchDispatchMode):
    """Counts operators; reading a number from a tensor (`.item()`, `float()`, `if`) is an error."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a metric was read on its own")
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_metrics_leave_the_device_once_per_interval(tmp_path, monkeypatch):
    transfers = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self.shape) or to_list(self))
    with make_monitor(tmp_path, every_steps=10) as monitor, CountOps() as ops:
        values = [metrics(loss=float(step)) for step in range(1, 11)]
        ops.count.clear()
        for step in range(1, 10):
            record(monitor, step, values[step - 1])
        assert set(ops.count) <= {"detach"}
        assert transfers == []
        record(monitor, 10, values[9])
    assert transfers == [(50,)]
    assert monitor.last["loss"] == 5.5


def test_recording_touches_no_value_and_keeps_no_graph(tmp_path):
    weight = torch.ones((), requires_grad=True)
    with make_monitor(tmp_path, every_steps=10) as monitor:
        for step in range(1, 4):
            record(monitor, step, {"loss": torch.empty((), device="meta"), "grad_norm": weight * 2})
        assert not any(tensor.requires_grad for kept in monitor._pending for tensor in kept.metrics.values())
        with pytest.raises(NotImplementedError, match="meta"):
            monitor.flush()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_recording_on_cuda_does_not_synchronize(tmp_path):
    with make_monitor(tmp_path, every_steps=10, device="cuda") as monitor:
        values = {name: value.cuda() for name, value in metrics().items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(1, 10):
                record(monitor, step, values)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        record(monitor, 10, values)
        assert monitor.last["loss"] == 1.0


def test_tensorboard_has_every_interval_once_after_a_resume(tmp_path):
    for start in (0, 10):
        with make_monitor(tmp_path, start_step=start, tensorboard=True) as monitor:
            for step in range(start + 1, 21):
                record(monitor, step, metrics(loss=float(start + step)))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(5, 3.0), (10, 8.0), (15, 23.0), (20, 28.0)]
    assert {"loss_main", "loss_align", "grad_norm", "lr", "images_per_second"} <= set(events.Tags()["scalars"])


def test_wandb_missing_tells_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb=cae.*pip install 'cae-fast\[wandb\]'"):
        make_monitor(tmp_path, wandb="cae").__enter__()


def test_wandb_run_goes_on_after_a_resume(tmp_path, monkeypatch):
    started, logged, finished = [], [], []

    def init(**settings):
        started.append(settings)
        run = types.SimpleNamespace(finish=lambda: finished.append(1))
        run.log = lambda values, step: logged.append((step, values["loss"]))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 5):
        with make_monitor(tmp_path, start_step=start, wandb="cae") as monitor:
            for step in range(start + 1, start + 6):
                record(monitor, step)
    assert logged == [(5, 1.0), (10, 1.0)]
    assert len(finished) == 2
    assert (started[0]["project"], started[0]["resume"]) == ("cae", "allow")
    assert started[0]["id"] == started[1]["id"]


def traced_annotations(run_dir, profile, steps, start_step=0, stop_after=None):
    with make_monitor(run_dir, start_step=start_step, profile=profile) as monitor:
        for step in steps:
            monitor.before_step(step - 1)
            with torch.profiler.record_function(f"training_step_{step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            record(monitor, step)
    (trace,) = (run_dir / "profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert "aten::mm" in names
    return trace.name, sorted(name for name in names if str(name).startswith("training_step_"))


def test_profile_traces_exactly_its_steps(tmp_path):
    name, steps = traced_annotations(tmp_path, [2, 3], range(1, 6))
    assert name == "steps_2-3.json"
    assert steps == ["training_step_2", "training_step_3"]


def test_profile_of_an_interrupted_run_holds_the_steps_it_made(tmp_path):
    _, steps = traced_annotations(tmp_path, [2, 50], range(1, 4))
    assert steps == ["training_step_2", "training_step_3"]


def test_profile_starts_in_the_middle_after_a_resume(tmp_path):
    _, steps = traced_annotations(tmp_path, [2, 7], range(6, 10), start_step=5)
    assert steps == ["training_step_6", "training_step_7"]


@pytest.mark.parametrize("profile", [[1], [1, 2, 3], [0, 5], [5, 4], [90, 101]])
def test_bad_profile_range_is_refused(tmp_path, profile):
    with pytest.raises(UserError, match=r"log\.profile=.*1 <= first <= last <= 100"):
        make_monitor(tmp_path, profile=profile)


def test_bad_interval_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"log\.every_steps=0"):
        make_monitor(tmp_path, every_steps=0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peak_of_known_devices(name, peak):
    assert device_peak_flops(name) == peak
