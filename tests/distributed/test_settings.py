"""Who a process is, as each launcher tells it, and DeepSpeed's settings as they follow from ours."""

import json
import threading
import time

import pytest
import torch

from cae_fast.config import TrainConfig, UserError
from cae_fast.training.checkpoint import Saver, save_state, state_files
from cae_fast.training.distributed import World, read_world
from cae_fast.training.zero_engine import deepspeed_settings, derived_settings, zero_stage
from running import ROOT

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_CPUS_PER_TASK", "SLURM_STEP_TASKS_PER_NODE")
ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}


def world_of(monkeypatch, environment: dict[str, str]) -> World:
    for name in LAUNCHERS + SLURM:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return read_world()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, World()),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, World()),  # in a batch script, without srun
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **ADDRESS}, World(3, 8, 1, 2)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **ADDRESS}, World(3, 8, 1, 2)),
        ({**SRUN, **ADDRESS}, World(9, 16, 1, 8)),
        ({**SRUN, **ADDRESS, "SLURM_CPUS_PER_TASK": "12"}, World(9, 16, 1, 1)),
        # torchrun started by srun, one a node
        ({**SRUN, **ADDRESS, "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, World(3, 8, 3, 1)),
    ],
)
def test_every_launcher_is_understood(monkeypatch, environment, expected):
    assert world_of(monkeypatch, environment) == expected


def test_a_missing_address_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS is 16, but MASTER_ADDR .*scontrol"):
        world_of(monkeypatch, SRUN)
    with pytest.raises(UserError, match="must be numbers"):
        world_of(monkeypatch, {**SRUN, **ADDRESS, "SLURM_LOCALID": "x"})


def test_the_stage_follows_from_the_processes():
    pytest.importorskip("deepspeed", reason="needs the deepspeed package: pip install 'cae-fast[distributed]'")
    assert zero_stage(TrainConfig(), World()) == 0
    assert zero_stage(TrainConfig(), World(0, 2)) == 1
    assert zero_stage(TrainConfig(zero=0), World(0, 2)) == 0
    assert zero_stage(TrainConfig(zero=3), World()) == 3
    for train in (TrainConfig(zero=4), TrainConfig(deepspeed="a.json"), TrainConfig(zero=0, offload_optimizer=True)):
        with pytest.raises(UserError, match=r"train\.zero"):
            zero_stage(train, World())


def derived(train: TrainConfig | None = None, stage: int = 1):
    return derived_settings(train or TrainConfig(global_batch_size=96), stage, 8, 3, cuda=False)


def test_no_number_is_written_twice(tmp_path):
    """DeepSpeed's own check of the product, and the type of everything it moves or sums."""
    settings = deepspeed_settings(derived(), None)
    assert settings["train_batch_size"] == 96 == settings["train_micro_batch_size_per_gpu"] * 3 * 8
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert settings["communication_data_type"] == settings["data_types"]["grad_accum_dtype"] == "bf16"
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["zero_optimization"]["reduce_bucket_size"] == 100_000_000
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7}, "dump_state": True}))
    settings = deepspeed_settings(derived(TrainConfig(precision="float32")), str(overlay))
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7
    assert settings["zero_optimization"]["parameter_alignment"] is True
    assert settings["dump_state"] is True
    assert settings["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, r"sets zero_optimization\.stage to 2, but it follows from train\.zero"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping to 1\.0, but it follows from optim\.clip_grad_norm"),
        ({"train_batch_size": 1}, r"train\.global_batch_size"),
        ({"optimizer": {"type": "Adam"}}, r"follows from optim"),
        ({"bf16": {"enabled": False}}, r"train\.precision"),
        ([1], "must hold an object"),
        ("{", "cannot be read as JSON"),
        (None, "cannot be read as JSON"),
    ],
)
def test_a_conflict_names_both_places(tmp_path, overlay, said):
    file = tmp_path / "overlay.json"
    if overlay is not None:
        file.write_text(overlay if isinstance(overlay, str) else json.dumps(overlay))
    with pytest.raises(UserError, match=said) as error:
        deepspeed_settings(derived(), str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize("file", sorted((ROOT / "configs/deepspeed").glob("*.json")), ids=lambda file: file.stem)
def test_shipped_overlays_are_accepted_by_deepspeed(file):
    zero = pytest.importorskip("deepspeed.runtime.zero.config", reason="needs the deepspeed package")
    settings = deepspeed_settings(derived(stage=int(file.stem[4])), str(file))
    assert zero.DeepSpeedZeroConfig(**settings["zero_optimization"]).stage == int(file.stem[4])


def test_a_lone_process_waits_for_nobody():
    world = World()
    assert world.agreed(2) == 2
    assert world.on_main(lambda: 5) == world.main_first(lambda: 5) == 5
    values = torch.arange(3.0)
    world.average([values])
    assert torch.equal(world.mean(values), torch.arange(3.0))


def test_saving_goes_on_behind_training_and_one_at_a_time(tmp_path):
    saver, release, order = Saver(tmp_path), threading.Event(), []
    weights = torch.ones(3)

    def write(state):
        release.wait(10)
        order.append("written")
        save_state(tmp_path, 1, state, {"step": 1}, keep=set())

    state = saver.snapshot([("param/a", weights)], keep=True)
    saver.start(lambda: write(state), 1)
    weights.zero_()  # the next step
    order.append("trained")
    threading.Timer(0.2, release.set).start()
    saver.wait()
    assert order == ["trained", "written"]
    assert torch.equal(state["param/a"], torch.ones(3))
    assert [step for step, _ in state_files(tmp_path)] == [1]
    assert saver.snapshot([("param/a", weights)], keep=False) == {}


def test_an_error_that_is_not_the_disks_is_raised(tmp_path):
    with Saver(tmp_path) as saver:
        saver.start(lambda: 1 / 0, 1)
        with pytest.raises(ZeroDivisionError):
            saver.wait()
        saver.wait()


def test_the_end_waits_for_the_last_checkpoint(tmp_path):
    done = []
    with Saver(tmp_path) as saver:
        saver.start(lambda: (time.sleep(0.2), done.append(1)), 1)
    assert done == [1]
