"""The program under srun's variables and under the deepspeed launcher; the tests of faults use torchrun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from running import ROOT, free_port, metrics, same_tensors

pytestmark = pytest.mark.slow

SMALL = (
    "model: {size: tiny, image_size: 28, embed_dim: 32, depth: 1, num_heads: 2, regressor_depth: 1, decoder_depth: 1}\n"
    "mask: {min_block: 4}\n"
    "data: {path: 'bundled:fashion-mnist/test', num_workers: 1}\n"
    "optim: {epochs: 3, warmup_epochs: 1}\n"
    "train: {global_batch_size: 40, seed: 3, device: cpu, max_steps: 4}\n"
    "log: {every_steps: 2, tensorboard: false}\n"
    "probe: {train: 'bundled:fashion-mnist/test', test: 'bundled:fashion-mnist/test'}\n"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "small.yaml").write_text(SMALL)
    return folder


def start(folder: Path, command: list[str], *settings: str, **environment: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, "pretrain", "small.yaml", *settings],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def srun(folder: Path, *settings: str) -> list[str]:
    """Outputs of two tasks, each with what srun tells it and the exported address."""
    program = [sys.executable, "-m", "cae_fast"]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_STEP_NUM_TASKS": "2"}
    tasks = [start(folder, program, *settings, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **common) for i in range(2)]
    outputs = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    return outputs


def test_srun(workplace):
    outputs = srun(workplace, "train.run_dir=runs/srun", "train.zero=0")
    assert "step " in outputs[0]
    assert outputs[1] == ""  # only process 0 talks
    run = workplace / "runs/srun"
    assert [line["steps"] for line in metrics(run)] == [2, 2]
    files = {"model.safetensors", "encoder.safetensors", "curves.png", "reconstructions.png", "probe.json"}
    assert files <= {file.name for file in run.iterdir()}


def test_stage_3_shows_and_probes_a_whole_model(workplace):
    """As the weights are shared out, process 0 looks at a copy of the whole: the probe is that of the same weights."""
    pytest.importorskip("deepspeed", reason="needs the deepspeed package: pip install 'cae-fast[distributed]'")
    (workplace / "all.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    settings = ("optim.lr=0", "train.precision=float32")
    srun(workplace, "train.run_dir=runs/whole", "train.zero=0", *settings)
    srun(workplace, "train.run_dir=runs/parts", "train.zero=3", "train.deepspeed=all.json", *settings)
    whole, parts = workplace / "runs/whole", workplace / "runs/parts"
    assert same_tensors(whole / "model.safetensors", parts / "model.safetensors")
    for name in ("probe.json", "reconstructions.png"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_the_deepspeed_launcher(workplace):
    pytest.importorskip("deepspeed", reason="needs the deepspeed package: pip install 'cae-fast[distributed]'")
    launcher = shutil.which("deepspeed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    command = [sys.executable, launcher, "--num_gpus=2", f"--master_port={free_port()}", "--no_local_rank", "--module"]
    process = start(workplace, [*command, "cae_fast"], "train.run_dir=runs/launched", DS_ACCELERATOR="cpu")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert metrics(workplace / "runs/launched")[-1]["step"] == 4
