"""Pretraining as a user runs it: real processes on real images, killed, stopped and resumed."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from running import Program, metrics, same_tensors

SMALL = (
    "model: {size: tiny, image_size: 28, embed_dim: 32, depth: 2, num_heads: 2, regressor_depth: 1, decoder_depth: 1}\n"
    "mask: {min_block: 4}\n"
    "data: {path: 'bundled:fashion-mnist/test', crop_scale: [0.5, 1.0]}\n"
    "optim: {epochs: 4, warmup_epochs: 1}\n"
    "train: {global_batch_size: 40, micro_batch_size: 20, precision: bfloat16, seed: 3}\n"
    "log: {every_steps: 3, tensorboard: false}\n"
)
STEPS = 200


program = Program("pretrain")
start, finish = program.start, program.finish


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "small.yaml").write_text(SMALL)
    return folder


def same_weights(a: Path, b: Path) -> bool:
    return same_tensors(a / "model.safetensors", b / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(workplace):
    output = finish(workplace, "train.run_dir=runs/whole")
    return workplace / "runs/whole", output


def test_a_run_learns_and_leaves_its_files(uninterrupted):
    run, output = uninterrupted
    lines = metrics(run)
    assert lines[-1]["step"] == STEPS
    assert sum(line["steps"] for line in lines) == STEPS
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    names = {p.name for p in run.iterdir()}
    assert names >= {"model.safetensors", "encoder.safetensors", "config.yaml", "environment.json", "checkpoints"}
    assert names >= {"curves.png", "reconstructions.png", "metrics.jsonl"}
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{STEPS:08d}.safetensors"]
    assert f"step {STEPS}/{STEPS}" in output.replace("step  ", "step ")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(workplace, uninterrupted):
    run, randomly = workplace / "runs/killed", random.Random()
    seed = randomly.randrange(2**32)
    randomly.seed(seed)
    kills = 0
    while kills < 4:
        process = start(workplace, "train.run_dir=runs/killed", "checkpoint.every_epochs=1")
        # From before the first step to the pictures at the end: a run takes about this long.
        try:
            process.communicate(timeout=randomly.uniform(2.0, 9.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        else:
            assert process.returncode == 0
            break
        kills += 1
    finish(workplace, "train.run_dir=runs/killed")
    assert same_weights(run, uninterrupted[0]), f"delays drawn with seed {seed}"
    steps = [line["step"] for line in metrics(run)]
    assert steps == sorted(set(steps))
    assert sum(line["steps"] for line in metrics(run)) == STEPS
    assert not list(run.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_continues(workplace, uninterrupted, number):
    run = workplace / f"runs/stopped{number}"
    # A process group of its own, signalled as a whole as a terminal and a scheduler do: decoding workers too.
    process = start(workplace, f"train.run_dir={run}", "data.num_workers=1", start_new_session=True)
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "run the same command again to continue" in output
    assert "Traceback" not in output
    stopped_at = metrics(run)[-1]["step"]
    assert stopped_at < STEPS
    assert f"resumed from {run}/checkpoints/step_{stopped_at:08d}" in finish(workplace, f"train.run_dir={run}")
    assert same_weights(run, uninterrupted[0])


def test_settings_that_matter_cannot_change_unnoticed(workplace, uninterrupted):
    run = "train.run_dir=runs/whole"
    output = finish(workplace, run, "optim.lr=0.1", "mask.ratio=0.4", status=2)
    assert "optim.lr was 0.0015, is 0.1" in output
    assert "mask.ratio was 0.5, is 0.4" in output
    assert "train.resume is never" in finish(workplace, run, "train.resume=never", status=2)
    other = finish(workplace, run, "data.path=bundled:fashion-mnist/train", status=2)
    assert "data (the images or their order changed)" in other


def test_a_finished_run_finishes_again(workplace, uninterrupted):
    before = (uninterrupted[0] / "model.safetensors").read_bytes()
    finish(workplace, "train.run_dir=runs/whole", "data.num_workers=0")
    assert (uninterrupted[0] / "model.safetensors").read_bytes() == before


def test_starting_from_other_weights(workplace, uninterrupted):
    weights = uninterrupted[0] / "model.safetensors"
    finish(workplace, "train.run_dir=runs/from", f"train.init_from={weights}", "train.max_steps=3", "optim.lr=0")
    assert same_weights(uninterrupted[0], workplace / "runs/from") is False  # lr=0: bfloat16 rounding only
    first = metrics(workplace / "runs/from")[0]["loss"]
    assert first < 1.1 * metrics(uninterrupted[0])[-1]["loss"]


def test_divergence_stops_the_run_with_advice(workplace):
    """A deviation of 1e-38 makes every input infinite."""
    output = finish(workplace, "train.run_dir=runs/nan", "data.std=[1e-38,1e-38,1e-38]", status=3)
    assert "10 steps in a row" in output
    assert "optim.lr" in output
    skipped = [line for line in metrics(workplace / "runs/nan") if line.get("event") == "skipped_step"]
    assert len(skipped) >= 10
    assert skipped[1]["sample_ids"] == list(range(40, 80))
    assert "Traceback" not in output


def test_ablations_run(workplace):
    for name, overrides in {
        "pixels": ["target.kind=pixels"],
        "random": ["mask.kind=random", "mask.ratio=0.75"],
        "no_alignment": ["target.alignment_weight=0"],
        "no_decoder": ["model.decoder_depth=0", "model.decoder_embed_dim=48"],
    }.items():
        finish(workplace, f"train.run_dir=runs/{name}", "train.max_steps=6", *overrides)
        assert metrics(workplace / "runs" / name)[-1]["loss"] > 0
