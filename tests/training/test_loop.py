"""How runs end: asked to stop while they wait, without a standard output, beside another run, after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from cae_fast.config import UserError
from cae_fast.files import read_header, read_weights, write_safetensors
from cae_fast.training.checkpoint import newest_whole, save_state, state_files
from cae_fast.training.ending import StopRequest
from cae_fast.training.lock import NAME, locked
from running import ROOT, Program

SMALL = (
    "model: {size: tiny, image_size: 28, embed_dim: 32, depth: 1, num_heads: 2, regressor_depth: 1, decoder_depth: 1}\n"
    "mask: {min_block: 4}\n"
    "data: {path: 'bundled:fashion-mnist/test', num_workers: 0}\n"
    "optim: {epochs: 2, warmup_epochs: 1}\n"
    "train: {global_batch_size: 500, precision: float32, seed: 3, device: cpu, run_dir: run}\n"
    "log: {every_steps: 1, tensorboard: false}\n"
)
program = Program("pretrain")


@pytest.fixture
def workplace(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def environment(**more):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


def test_a_request_ends_the_wait_for_an_item_that_never_comes():
    def items():
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        yield 2

    began = time.monotonic()
    with StopRequest() as stop:
        assert list(stop.until_requested(items(), alone=True)) == [1]
    assert stop.requested == "SIGTERM"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU])
def test_a_request_during_a_step_lets_it_finish(number):
    taken = []
    with StopRequest() as stop:
        for item in stop.until_requested(iter(range(5)), alone=True):
            os.kill(os.getpid(), number)
            taken.append(item)
            break
    assert taken == [0]
    assert stop.requested == signal.Signals(number).name


def test_of_several_processes_none_leaves_alone():
    def items():
        os.kill(os.getpid(), signal.SIGTERM)
        yield 1
        yield 2

    with StopRequest() as stop:
        assert list(stop.until_requested(items(), alone=False)) == [1, 2]
    assert stop.requested == "SIGTERM"


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    run = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from cae_fast.training.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"another run is writing there \\(process {other.pid} on "), locked(run):
        pass
    other.kill()
    other.wait()
    with locked(run):  # the kernel let go of it
        (run / "x").touch()
    assert [path.name for path in run.iterdir()] == ["x"]


def test_a_folder_made_for_nothing_goes_again(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / NAME).exists()
    assert not (tmp_path / "a" / "b").exists()


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run", "x" * 300])
def test_an_impossible_folder_is_one_line(workplace, place):
    (workplace / "file").touch()
    output = program.finish(workplace, f"train.run_dir={place}", status=2)
    assert "Traceback" not in output
    assert "cannot be written" in output.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("out", ["full", "closed"])
def test_a_run_goes_on_without_standard_output(workplace, out):
    arguments = [sys.executable, "-m", "cae_fast", "pretrain", "small.yaml"]
    if out == "full":
        with open("/dev/full", "w") as full:
            process = subprocess.Popen(
                arguments, cwd=workplace, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True
            )
    else:
        process = subprocess.Popen(
            arguments, cwd=workplace, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(240) == 0, errors
    assert "Traceback" not in errors
    assert errors.count("standard output cannot be written") == 1
    assert read_header(workplace / "run/model.safetensors")["step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["missing", "older", "damaged"])
def test_files_for_others_are_made_good_at_the_end(workplace, lost):
    program.finish(workplace)
    # Copies: the tensors are views of the file, which is about to be cut.
    expected = {name: tensor.clone() for name, tensor in read_weights(workplace / "run/model.safetensors")[1].items()}
    for name in ("model", "encoder"):
        path = workplace / f"run/{name}.safetensors"
        if lost == "missing":
            path.unlink()
        elif lost == "damaged":
            path.write_bytes(path.read_bytes()[:100])
        else:
            facts, tensors = read_weights(path)
            write_safetensors(
                path, {key: torch.zeros_like(value) for key, value in tensors.items()}, facts | {"step": 4}
            )
    program.finish(workplace)
    again = read_weights(workplace / "run/model.safetensors")[1]
    assert all(again[name].equal(tensor) for name, tensor in expected.items())
    assert read_header(workplace / "run/encoder.safetensors")["step"] == 8


@pytest.mark.slow
def test_a_finished_run_whose_images_cannot_be_read_is_done(workplace):
    from PIL import Image

    for number in range(6):
        (workplace / "d").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (40 * number, 90, 9)).save(workplace / "d" / f"{number}.png")
    settings = ["data.path=d", "train.global_batch_size=6"]
    program.finish(workplace, *settings)
    for path in (workplace / "d").iterdir():  # of the same size and time, so that the index stands
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    output = program.finish(workplace, *settings)
    assert "no reconstructions.png: none of eight images" in output
    assert "Traceback" not in output


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path, damage, caplog):
    for step in (1, 2):
        save_state(tmp_path, step, {"param/a": torch.randn(50)}, {"step": step, "config": {}}, keep={1})
    newest = state_files(tmp_path)[-1][1]
    if damage == "bit":
        flip(newest, -3)
    else:
        newest.write_bytes(newest.read_bytes()[: 120 if damage == "cut" else 0])
    assert newest_whole(tmp_path) == state_files(tmp_path)[0][1]
    assert "the state of step 2 cannot be used" in caplog.text
    state_files(tmp_path)[0][1].write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 training states"):
        newest_whole(tmp_path)


def test_a_file_of_a_newer_version_is_refused_by_name(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(2)}, {"version": "99.1.0"})
    with pytest.raises(UserError, match=r"written by cae_fast 99\.1\.0, newer than this"):
        read_weights(tmp_path / "a.safetensors")


def test_every_file_of_ours_is_held_against_its_digest(tmp_path):
    tensors = {
        "w": torch.randn(3, 4),
        "b": torch.zeros((), dtype=torch.int64),
        "e": torch.empty(0),
        "h": torch.ones(2).bfloat16(),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors, {"kind": "x"})
    facts, read = read_weights(tmp_path / "a.safetensors")
    assert facts == {"kind": "x"}
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())
    flip(tmp_path / "a.safetensors", -1)
    with pytest.raises(UserError, match="damaged"):
        read_weights(tmp_path / "a.safetensors")
    assert json.dumps(read_header(tmp_path / "a.safetensors")) == '{"kind": "x"}'


def test_a_run_whose_data_fails_saves_what_it_has(workplace):
    """The images go away in the middle of a run: the state after the last step is there, and one line says why."""
    from PIL import Image

    (workplace / "d").mkdir()
    for number in range(6):
        Image.new("RGB", (40, 40), (40 * number, 90, 9)).save(workplace / "d" / f"{number}.png")
    settings = ["data.path=d", "train.global_batch_size=6", "optim.epochs=100000", "checkpoint.every_epochs=100000"]
    process = program.start(workplace, *settings)
    metrics = workplace / "run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.05)
    for path in (workplace / "d").iterdir():
        path.write_bytes(b"")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "files in a row cannot be used" in output.splitlines()[-1]
    (step, _), *_ = state_files(workplace / "run")
    assert step > 0
    assert read_header(workplace / "run/model.safetensors")["step"] == step


@pytest.mark.slow
def test_a_process_alone_that_hangs_is_ended(workplace):
    """By the watchdog, with every thread's stack; the same command continues from the last checkpoint."""
    faulty = ROOT / "tests/distributed/faulty_program.py"
    arguments = [sys.executable, str(faulty), "pretrain", "small.yaml", "train.timeout_seconds=8"]
    done = subprocess.run(
        arguments, cwd=workplace, env=environment(FAULT="hang:0:6"), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 75, done.stderr
    assert "made no step for train.timeout_seconds=8" in done.stderr
    assert "in happen" in done.stderr  # where it stood
    assert [step for step, _ in state_files(workplace / "run")] == [4]
    assert "resumed from" in program.finish(workplace)
