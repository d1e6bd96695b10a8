"""Tokenizer training as a user runs it: real processes on the bundled photographs, killed, stopped and resumed."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from cae_fast.cli import main
from cae_fast.commands import train_tokenizer
from cae_fast.commands.train_tokenizer import CodeUse, noise_seed, prepare, psnr, take_step
from cae_fast.config import TrainTokenizerConfig
from cae_fast.models.dvae import load_dvae
from cae_fast.settings import field_docs, load_config
from cae_fast.training.distributed import World
from running import Program, metrics, same_tensors

SMALL = (
    "tokenizer: {image_size: 16, width: 16, num_blocks: 1, num_codes: 64, code_dim: 16, loss: squared_error,\n"
    "  temperature_steps: 40, kl_weight: 0.5, kl_warmup_steps: 30}\n"
    "data: {path: 'bundled:photographs', crop_scale: [0.1, 1.0]}\n"
    "optim: {lr: 3.0e-3, epochs: 60, warmup_epochs: 2}\n"
    "train: {global_batch_size: 12, micro_batch_size: 6, precision: float32, seed: 3}\n"
    "checkpoint: {every_epochs: 8}\n"
    "log: {every_steps: 10, tensorboard: false}\n"
)
STEPS = 60
VQ = ("tokenizer.quantizer=vq", "tokenizer.code_dim=8")


program = Program("train-tokenizer")
start, finish = program.start, program.finish


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_tokenizer")
    (folder / "small.yaml").write_text(SMALL)
    return folder


def same_weights(a: Path, b: Path) -> bool:
    return same_tensors(a / "tokenizer.safetensors", b / "tokenizer.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(workplace):
    output = finish(workplace, "train.run_dir=runs/whole")
    return workplace / "runs/whole", output


def test_a_run_learns_and_leaves_its_files(uninterrupted):
    run, output = uninterrupted
    lines = metrics(run)
    assert sum(line["steps"] for line in lines) == lines[-1]["step"] == STEPS
    assert lines[-1]["squared_error"] < 0.85 * lines[0]["squared_error"]
    for line in lines:
        assert line["used_codes"] + line["dead_codes"] == 64
        assert 1 <= line["perplexity"] <= line["used_codes"]
    assert lines[0]["temperature"] > lines[-1]["temperature"] == 1 / 16
    assert 0 < lines[0]["kl_weight"] < lines[-1]["kl_weight"] == 0.5
    names = {p.name for p in run.iterdir()}
    assert names >= {"tokenizer.safetensors", "config.yaml", "environment.json", "evaluation.json", "metrics.jsonl"}
    assert names >= {"curves.png", "reconstructions.png"}
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{STEPS:08d}.safetensors"]
    result = json.loads((run / "evaluation.json").read_text())
    assert f"perplexity {result['perplexity']:.0f}, {result['used_codes']} of 64 used" in output
    assert f"PSNR {result['psnr']:.2f} dB" in output
    with Image.open(run / "reconstructions.png") as picture:
        assert picture.height > 3 * 128  # a micro-batch of 6, two pairs to a row, enlarged


def test_the_tokenizer_of_a_run_loads(uninterrupted):
    path = uninterrupted[0] / "tokenizer.safetensors"
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["cae_fast"])
    assert (facts["kind"], facts["num_codes"], facts["width"], facts["step"]) == ("dvae", 64, 16, STEPS)
    tokenizer = load_dvae(str(path))
    images = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    codes = tokenizer.encode(images, torch.tensor([[0, 4, 8], [1, 2, 3]]))
    assert codes.shape == (2, 3)
    assert tokenizer.decode_codes(tokenizer.code_grid(images)).shape == (2, 3, 24, 24)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(workplace, uninterrupted):
    run, randomly = workplace / "runs/killed", random.Random()
    seed = randomly.randrange(2**32)
    randomly.seed(seed)
    for _ in range(2):
        process = start(workplace, "train.run_dir=runs/killed", "checkpoint.every_epochs=3")
        try:
            process.communicate(timeout=randomly.uniform(3.0, 7.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    finish(workplace, "train.run_dir=runs/killed")
    assert same_weights(run, uninterrupted[0]), f"delays drawn with seed {seed}"
    assert sum(line["steps"] for line in metrics(run)) == STEPS
    assert not list(run.rglob("*.tmp"))


def test_asked_to_stop_it_saves_and_continues(workplace, uninterrupted):
    run = workplace / "runs/stopped"
    process = start(
        workplace, f"train.run_dir={run}", "data.num_workers=1", "log.every_steps=2", start_new_session=True
    )
    while not (run / "metrics.jsonl").exists() or not metrics(run):
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "run the same command again to continue" in output
    stopped_at = metrics(run)[-1]["step"]
    assert stopped_at < STEPS
    assert f"resumed from {run}/checkpoints/step_{stopped_at:08d}" in finish(workplace, f"train.run_dir={run}")
    assert same_weights(run, uninterrupted[0])


def test_a_vq_codebook_resumes_with_its_running_means(workplace, monkeypatch):
    """In one process, because the library takes seconds to import."""
    pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch: 'cae-fast[tokenizer]'")
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(train_tokenizer, "EVALUATION_CROPS", 24)
    for name, steps in (("vq", 12), ("vq_parts", 5), ("vq_parts", 12)):
        overrides = [f"train.run_dir=runs/{name}", f"train.max_steps={steps}", "data.num_workers=0", *VQ]
        assert main(["train-tokenizer", "small.yaml", *overrides]) == 0
    assert same_weights(workplace / "runs/vq", workplace / "runs/vq_parts")


def test_settings_that_matter_cannot_change_unnoticed(workplace, uninterrupted):
    output = finish(workplace, "train.run_dir=runs/whole", "tokenizer.kl_weight=1", status=2)
    assert "tokenizer.kl_weight was 0.5, is 1.0" in output


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tokenizer.size=giant"], "tokenizer.size is 'giant': set one of small, large"),
        (["tokenizer.image_size=20"], "multiple of 8"),
        (["tokenizer.width=0"], "tokenizer.width is 0"),
        (["tokenizer.num_codes=1"], "tokenizer.num_codes is 1"),
        (["tokenizer.code_dim=0"], "tokenizer.code_dim is 0"),
        (["tokenizer.quantizer=lfq"], "set gumbel, fsq or vq"),
        (["tokenizer.quantizer=fsq"], "the product of the levels"),
        (["tokenizer.quantizer=fsq", "tokenizer.fsq_levels=[8,8]"], "tokenizer.code_dim is 16: with fsq"),
        (["tokenizer.loss=l1"], "tokenizer.loss is 'l1'"),
        (["tokenizer.temperature=[1]"], "tokenizer.temperature is [1.0]"),
        (["tokenizer.temperature=[1,0]"], "above 0"),
        (["tokenizer.kl_weight=-1"], "tokenizer.kl_weight is -1.0"),
        (["data.mean=[0.4,0.5,0.5]"], "data.mean is [0.4, 0.5, 0.5]"),
        (["data.path="], "data.path is empty"),
        (["train.global_batch_size=13"], "multiple"),
        (["train.global_batch_size=24"], "train.global_batch_size=24"),
        (["mask.ratio=0.4"], "unknown setting mask"),
        (["train.init_from=none.safetensors"], "none.safetensors"),
    ],
)
def test_mistakes_are_one_line(workplace, monkeypatch, overrides, said, capsys):
    monkeypatch.chdir(workplace)
    assert main(["train-tokenizer", "small.yaml", "train.run_dir=runs/mistake", *overrides]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cae-fast train-tokenizer: ")]
    assert len(errors) == 1
    assert said in errors[0]


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train-tokenizer", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in field_docs(TrainTokenizerConfig))
    assert "data.mean = [0.5, 0.5, 0.5]" in text


def small_job(folder, *overrides):
    """A prepared run, and a step's two micro-batches of random images."""
    config = load_config(TrainTokenizerConfig, str(folder / "small.yaml"), [f"train.run_dir={folder}/api", *overrides])
    images = torch.randint(256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return prepare(config, World(), torch.device("cpu")), [(images,)] * 2


def step_twice(job, inputs):
    """Metrics and weights after two steps, the second of them repeated after loading the state between."""
    take_step(job, inputs, 0, 1e-3)
    between = {name: tensor.clone() for name, tensor in job.engine.state().items()}
    results = []
    for _ in range(2):
        torch.randn(5)  # what others drew in between must not matter
        metrics = take_step(job, inputs, 1, 1e-3)
        results.append((metrics, {name: tensor.clone() for name, tensor in job.engine.model_state().items()}))
        job.engine.load_state(between)
    return results


@pytest.mark.parametrize("overrides", [(), ("train.precision=bfloat16",), VQ, (*VQ, "train.precision=bfloat16")])
def test_a_step_depends_on_its_state_and_number_only(workplace, monkeypatch, overrides):
    if VQ[0] in overrides:
        pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch: 'cae-fast[tokenizer]'")
    monkeypatch.chdir(workplace)
    job, inputs = small_job(workplace, *overrides)
    (metrics_a, a), (metrics_b, b) = step_twice(job, inputs)
    assert all(a[name].equal(b[name]) for name in a)
    assert all(metrics_a[name].equal(metrics_b[name]) for name in metrics_a)
    if VQ[0] in overrides:
        assert all(
            tensor.dtype == torch.float32 for tensor in job.engine.buffers.values() if tensor.is_floating_point()
        )


class NoHostReads(TorchDispatchMode):
    """Fails where a value would leave the device, or a shape depend on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "bincount"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantizer", ["gumbel", "fsq"])
def test_a_step_never_waits_for_the_device(workplace, monkeypatch, quantizer):
    monkeypatch.chdir(workplace)
    overrides = ["tokenizer.quantizer=gumbel"]
    if quantizer == "fsq":
        pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch: 'cae-fast[tokenizer]'")
        overrides = ["tokenizer.quantizer=fsq", "tokenizer.code_dim=null", "tokenizer.fsq_levels=[8,8]"]
    job, inputs = small_job(workplace, *overrides)
    take_step(job, inputs, 0, 1e-3)
    with NoHostReads():
        take_step(job, inputs, 1, 1e-3)
        job.use.report()


def test_noise_seeds_differ():
    seeds = {noise_seed(seed, step, part) for seed in range(4) for step in range(50) for part in range(4)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_code_use_over_an_interval():
    use = CodeUse(5, torch.device("cpu"))
    use.add(torch.tensor([[0, 1], [1, 0]]))
    use.add(torch.tensor([[4, 4]]))
    report = {name: value.item() for name, value in use.report().items()}
    assert report == {"perplexity": pytest.approx(3.0), "used_codes": 3, "dead_codes": 2}
    use.add(torch.tensor([2]))
    assert use.report()["used_codes"] == 1


def test_psnr():
    assert psnr(torch.tensor(0.01)).item() == pytest.approx(20.0)


@pytest.mark.slow
def test_the_quickstart_uses_its_codebook(tmp_path, pytestconfig):
    """The promise of configs/tokenizer/quickstart_fsq.yaml, at its own settings."""
    pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch: 'cae-fast[tokenizer]'")
    (tmp_path / "small.yaml").write_text((pytestconfig.rootpath / "configs/tokenizer/quickstart_fsq.yaml").read_text())
    process = start(tmp_path, "train.run_dir=run")
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["perplexity"] > 200
