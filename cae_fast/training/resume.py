"""Continue a run, or start one from other weights; refuse what would silently be another experiment."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from cae_fast.config import RunConfig, UserError
from cae_fast.files import read_header
from cae_fast.training.checkpoint import load_model_weights, load_state, newest_whole, state_files
from cae_fast.training.loop import Trained

log = logging.getLogger(__name__)

FREE_TO_CHANGE = {
    *("log", "checkpoint", "probe", "data.path", "data.index", "data.num_workers", "target.tokenizer"),
    *("target.compile", "encoder.path", "validation"),
    *("train.run_dir", "train.device", "train.micro_batch_size", "train.resume", "train.init_from", "train.max_steps"),
    *("train.zero", "train.offload_optimizer", "train.activation_checkpointing", "train.deepspeed"),
    "train.timeout_seconds",
}

FROZEN = {"tokenizer": "target.tokenizer", "encoder": "encoder.path"}
"""Where a training state keeps the SHA-256 of a file that the run reads, and the setting that names the file."""


def newest_state(config: RunConfig) -> Path | None:
    """The training state to continue from, None for a new run; UserError where train.resume forbids it."""
    mode = config.train.resume
    if mode not in ("auto", "never", "force"):
        raise UserError(f"train.resume is {mode!r}: set auto, never or force")
    states = state_files(Path(config.train.run_dir))
    if mode == "never" and states:
        raise UserError(
            f"train.run_dir {config.train.run_dir} holds a run at step {states[-1][0]} and train.resume is never: "
            "choose another train.run_dir"
        )
    return newest_whole(Path(config.train.run_dir))


def first_backend(path: Path | None) -> str | None:
    """The data.backend of a training state's run; None without one."""
    return None if path is None else read_header(path)["config"]["data"].get("backend")


def resume(config: RunConfig, trained: Trained, path: Path, facts_now: dict[str, Any]) -> int:
    """Load a training state. Returns the steps already done; UserError where it belongs to another experiment.

    facts_now: this run's, of which "data" and the keys of FROZEN count.
    """
    state, facts = load_state(path)
    changed = changed_settings(facts["config"], asdict(config), asdict(type(config)()))
    if facts["data"] != facts_now["data"]:
        changed.append("data (the images or their order changed)")
    for key, setting in FROZEN.items():
        if facts.get(key) != facts_now.get(key):
            changed.append(f"{setting} (the file's content changed)")
    if changed and config.train.resume != "force":
        raise UserError(
            f"{path} was trained with other settings: {'; '.join(changed)}. "
            "Choose another train.run_dir, or train.resume=force to continue all the same"
        )
    try:
        trained.load_state(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} holds another model than these settings describe: {error}") from error
    log.info("resumed from %s", path)
    return facts["step"]


def changed_settings(old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that change what is computed, as `name was A, is B`. One that `old` does not know had its default."""
    changed = []
    for key, value in new.items():
        name = prefix + key
        if name in FREE_TO_CHANGE:
            continue
        before = old.get(key, defaults[key])
        if isinstance(value, dict):
            changed += changed_settings(before, value, defaults[key], f"{name}.")
        elif value != before:
            changed.append(f"{name} was {before}, is {value}")
    return changed


def load_weights(model: nn.Module, path: str) -> None:
    """Start from a model.safetensors; UserError names what does not fit."""
    try:
        model.load_state_dict(load_model_weights(path))
    except RuntimeError as error:
        raise UserError(f"train.init_from is {path}: {' '.join(str(error).split())[:300]}") from error
