"""What every training command does around its loop: check settings, choose device and kernels, describe the run."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cae_fast import __version__
from cae_fast.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, RunConfig, TrainConfig, UserError
from cae_fast.data.index import ImageIndex, index_for
from cae_fast.files import read_header, remove_leftovers, write_text
from cae_fast.training.checkpoint import FOLDER
from cae_fast.training.distributed import World
from cae_fast.training.ending import STOPPED
from cae_fast.training.engine import PRECISIONS
from cae_fast.training.optim import check_optim
from cae_kernels.dispatch import BACKENDS, backend

log = logging.getLogger(__name__)


def check_training(config: RunConfig) -> None:
    check_optim(config.optim)
    if config.train.timeout_seconds <= 0:
        raise UserError(f"train.timeout_seconds is {config.train.timeout_seconds}: it must be above 0")
    if config.train.precision not in PRECISIONS:
        raise UserError(f"train.precision is {config.train.precision!r}: set one of {', '.join(PRECISIONS)}")
    if config.train.seed < 0:
        raise UserError(f"train.seed is {config.train.seed}: it must be at least 0")
    if config.train.max_steps is not None and config.train.max_steps < 1:
        raise UserError(f"train.max_steps is {config.train.max_steps}: it must be at least 1")
    if config.data.path and config.data.index:
        raise UserError(f"data.path is {config.data.path} and data.index {config.data.index}: set one of them")
    if config.checkpoint.every_epochs < 1 or config.checkpoint.keep_every_epochs < 0:
        raise UserError(
            f"checkpoint.every_epochs is {config.checkpoint.every_epochs}, checkpoint.keep_every_epochs "
            f"{config.checkpoint.keep_every_epochs}: the first must be at least 1, the second at least 0"
        )


def choose_device(train: TrainConfig, local_rank: int = 0) -> torch.device:
    """The device of this machine's process `local_rank`; a launcher may show every process a device of its own."""
    if train.device not in ("auto", "cuda", "cpu"):
        raise UserError(f"train.device is {train.device!r}: set auto, cuda or cpu")
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch finds no CUDA device: set train.device=cpu or auto")
    if train.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count > 1 or (local_rank and count == 1 and "SLURM_PROCID" not in os.environ):
        raise UserError(f"this machine has {count} CUDA devices, but more processes: start one for each device")
    device = torch.device("cuda", local_rank if local_rank < count else 0)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # shapes never change: the fastest convolution is searched once
    return device


def micro_batch_size(train: TrainConfig, processes: int = 1) -> int:
    """Images per forward pass of each of these processes."""
    total, micro = train.global_batch_size, train.micro_batch_size
    micro = total // processes if micro is None else min(micro, total // processes)
    if total < 1 or micro < 1 or total % (micro * processes):
        raise UserError(
            f"train.global_batch_size is {total} and train.micro_batch_size {micro}: the first must be a multiple of "
            f"the second" + (f" times the {processes} processes" if processes > 1 else "") + ", both at least 1"
        )
    return micro


def summary(kernels: dict[str, str]) -> str:
    """Backends with their ops: `triton: attention, ...; reference: ...`; the ops are left out where all share one."""
    by_backend = {name: [op for op in kernels if kernels[op] == name] for name in dict.fromkeys(kernels.values())}
    if len(by_backend) == 1:
        return f"all {next(iter(by_backend))}"
    return "; ".join(f"{name}: {', '.join(ops)}" for name, ops in by_backend.items())


def kernel_backends(device: torch.device) -> dict[str, str]:
    """The backend of every op on this device; UserError where CAE_KERNELS asks for one that cannot run."""
    try:
        return {op: backend(op, torch.empty(0, device=device)) for op in BACKENDS}
    except ValueError as error:
        raise UserError(str(error)) from error


def open_index(config: RunConfig, world: World) -> ImageIndex:
    """The images of a run; process 0 looks for changes, and scans them where no index is there yet."""
    index = shared_index(config.data, Path(config.train.run_dir), world)
    log.info("data: %s", index)
    return index


def shared_index(data: DataConfig, run_dir: Path, world: World) -> ImageIndex:
    """The index that process 0 opens or makes, on every process."""
    return ImageIndex(world.on_main(lambda: index_for(data, run_dir).folder))


def set_normalization(data: DataConfig, state: Path | None, weights: str | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the encoder's input, also put where the user set none.

    Those of the run that is continued (`state`), else those that the file `weights` was trained with, else ImageNet's.
    Others than the weights' are warned of: the encoder would see inputs of another scale than it knows.
    """
    known: dict[str, Any] = {}
    for path in (state, weights and Path(weights)):
        if path and path.is_file() and not known:
            known = read_header(path).get("config", {}).get("data", {})

    chosen = []
    for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        theirs, own = known.get(name), getattr(data, name)
        if own is None:
            own = list(theirs or usual)
            setattr(data, name, own)
            if own != usual and state is None:
                log.info("data.%s: %s, as %s was trained with", name, own, weights)
        elif theirs and theirs != own and state is None:
            log.warning("data.%s is %s, but %s was trained with %s", name, own, weights, theirs)
        chosen.append(own)
    return chosen[0], chosen[1]


def begin(config: RunConfig, device: torch.device, kernels: dict[str, str], world: World) -> None:
    """Process 0 makes the run folder ready, and keeps there the resolved settings and what they run on."""
    if not world.main:
        return
    run_dir = Path(config.train.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir, run_dir / FOLDER)
        (run_dir / STOPPED).unlink(missing_ok=True)
        record(config, run_dir, device, kernels, world)
    except OSError as error:
        raise UserError(f"train.run_dir is {run_dir}: cannot be written: {error.strerror}") from error


def record(config: RunConfig, run_dir: Path, device: torch.device, kernels: dict[str, str], world: World) -> None:
    """Keep the resolved settings and what they run on beside the results."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    facts = {
        "command": shlex.join(["cae-fast", *sys.argv[1:]]),
        "revision": revision or None,
        "cae_fast": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "kernels": kernels,
    }
    write_text(run_dir / "environment.json", json.dumps(facts, indent=1))
