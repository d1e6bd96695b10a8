"""What happens to a run of two processes when one is killed, fails, hangs or is told to stop, or the disk is full."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from running import ROOT, Program, metrics, same_tensors, start_processes

pytestmark = pytest.mark.slow

SMALL = (
    "model: {size: tiny, image_size: 28, embed_dim: 32, depth: 1, num_heads: 2, regressor_depth: 1, decoder_depth: 1}\n"
    "mask: {min_block: 4}\n"
    "data: {path: 'bundled:fashion-mnist/test', num_workers: 0}\n"
    "optim: {epochs: 3, warmup_epochs: 1}\n"
    "train: {global_batch_size: 200, precision: bfloat16, seed: 3, device: cpu}\n"
    "log: {every_steps: 1, tensorboard: false}\n"
)
STEPS, EPOCH, FAULT_AT = 30, 10, 14
FAULTY = str(ROOT / "tests/distributed/faulty_program.py")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    (folder / "small.yaml").write_text(SMALL)
    return folder


def torchrun(folder: Path, run: str, *settings: str, fault: str = "none:0:0", restarts: int = 0) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--monitor-interval=0.5"]
    program = [FAULTY, "pretrain", "small.yaml", f"train.run_dir={run}", *settings]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, f"--max-restarts={restarts}", *program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FAULT": fault},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcomes(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def bare(folder: Path, run: str, fault: str, *settings: str) -> list[tuple[int, str]]:
    """(status, output) of two processes that no launcher looks after."""
    command = ["pretrain", "small.yaml", f"train.run_dir={run}", "train.zero=0", *settings]
    return outcomes(start_processes([FAULTY, *command], 2, folder, FAULT=fault))


@pytest.fixture(scope="module")
def uninterrupted(workplace) -> Path:
    pytest.importorskip("deepspeed", reason="needs the deepspeed package: pip install 'cae-fast[distributed]'")
    ((status, output),) = outcomes([torchrun(workplace, "runs/whole")])
    assert status == 0, output
    run = workplace / "runs/whole"
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    return run


def assert_same_end(run: Path, whole: Path) -> None:
    assert same_tensors(run / "model.safetensors", whole / "model.safetensors")
    name = f"checkpoints/step_{STEPS:08d}.safetensors"
    assert same_tensors(run / name, whole / name)
    assert [line["loss"] for line in metrics(run)] == [line["loss"] for line in metrics(whole)]


@pytest.mark.parametrize(
    ("kind", "rank", "message"),
    [
        ("kill", 1, "another process is gone"),
        ("raise", 0, "process 0 of 2 stopped: RuntimeError: a fault for the test"),
        ("hang", 1, "made no step for train.timeout_seconds=8"),
    ],
)
def test_a_launcher_that_restarts_ends_with_the_same_weights(workplace, uninterrupted, kind, rank, message):
    run = f"runs/{kind}"
    fault = f"{kind}:{rank}:{FAULT_AT}"
    ((status, output),) = outcomes([torchrun(workplace, run, "train.timeout_seconds=8", fault=fault, restarts=1)])
    assert status == 0, output
    assert message in output
    assert f"resumed from {run}/checkpoints/step_{EPOCH:08d}.safetensors" in output
    assert_same_end(workplace / run, uninterrupted)


@pytest.mark.parametrize(("kind", "status"), [("kill", -signal.SIGKILL), ("raise", 1), ("hang", 75)])
def test_the_others_stop_without_a_launcher(workplace, kind, status):
    started = time.monotonic()
    ends = bare(workplace, f"runs/bare_{kind}", f"{kind}:1:{FAULT_AT}", "train.timeout_seconds=6")
    assert ends[1][0] == status, ends
    if kind != "hang":
        assert ends[0][0] == 1
        assert "process 0: another process is gone" in ends[0][1]
        return
    # Whose watchdog is first: the other may see the end of its connection before its own time is up.
    assert ends[0][0] in (1, 75)
    assert "another process is gone" in ends[0][1] or "Timed out" in ends[0][1] or "made no step" in ends[0][1]
    assert "process 1 made no step for train.timeout_seconds=6" in ends[1][1]
    assert re.search(r"faulty_program.py.* in happen", ends[1][1])  # where it hung
    assert time.monotonic() - started < 120


def test_one_process_told_to_stop_stops_all(workplace, uninterrupted):
    run = workplace / "runs/term"
    ends = bare(workplace, str(run), f"term:1:{FAULT_AT}", "train.zero=1")
    assert [status for status, _ in ends] == [0, 0], ends
    assert "run the same command again to continue" in ends[0][1]
    stopped_at = json.loads((run / "stopped.json").read_text())["step"]
    assert FAULT_AT < stopped_at <= FAULT_AT + 2
    ((status, output),) = outcomes([torchrun(workplace, str(run))])
    assert status == 0, output
    assert f"resumed from {run}/checkpoints/step_{stopped_at:08d}.safetensors" in output
    assert not (run / "stopped.json").exists()
    assert_same_end(run, uninterrupted)


def test_a_launcher_told_to_stop_leaves_a_run_to_continue(workplace, uninterrupted):
    run = workplace / "runs/preempted"
    process = torchrun(workplace, str(run), "optim.epochs=300")
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    stopped_at = json.loads((run / "stopped.json").read_text())["step"]
    assert f"after step {stopped_at}; run the same command again to continue" in output
    assert "of 2 stopped: " not in output  # what a process that fails says
    assert (run / f"checkpoints/step_{stopped_at:08d}.safetensors").exists()
    assert metrics(run)[-1]["step"] == stopped_at


@pytest.fixture(scope="module")
def alone(workplace) -> Path:
    Program("pretrain").finish(workplace, "train.run_dir=runs/alone")
    return workplace / "runs/alone"


def faulty_alone(workplace: Path, run: Path, fault: str) -> tuple[int, str]:
    command = [FAULTY, "pretrain", "small.yaml", f"train.run_dir={run}", "log.tensorboard=true"]
    return outcomes(start_processes(command, 1, workplace, FAULT=fault))[0]


def test_a_full_disk_keeps_the_last_checkpoint(workplace, alone):
    run = workplace / "runs/full"
    status, output = faulty_alone(workplace, run, f"full:0:{FAULT_AT}")
    assert status == 1, output
    assert f"the checkpoint of step {2 * EPOCH} could not be written to {run}" in output
    assert "File too large" in output
    assert f"The last whole one is that of step {EPOCH}; going on" in output
    assert "metrics.jsonl: could not be written" in output
    assert "tensorboard: could not be written" in output
    assert [line["step"] for line in metrics(run)] == list(range(1, FAULT_AT + 1))
    assert [file.name for file in (run / "checkpoints").iterdir()] == [f"step_{EPOCH:08d}.safetensors"]
    output = Program("pretrain").finish(workplace, f"train.run_dir={run}")
    assert f"resumed from {run}/checkpoints/step_{EPOCH:08d}.safetensors" in output
    assert_same_end(run, alone)


def test_a_removed_folder_is_made_anew(workplace, alone):
    run = workplace / "runs/removed"
    status, output = faulty_alone(workplace, run, f"remove:0:{FAULT_AT}")
    assert status == 0, output
    assert f"{run} is gone: the checkpoint of step {2 * EPOCH} makes it anew" in output
    assert same_tensors(run / "model.safetensors", alone / "model.safetensors")


def test_a_folder_that_cannot_be_made_is_named(workplace):
    run = workplace / "runs/replaced"
    status, output = faulty_alone(workplace, run, f"replace:0:{FAULT_AT}")
    assert status == 1, output
    assert f"the checkpoint of step {2 * EPOCH} could not be written to {run}" in output
    assert "The last whole one is none" in output
    assert f"stopped after step {STEPS}, which is not saved" in output
