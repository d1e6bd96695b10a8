"""Files of a run: training state for resuming, the consolidated model, and the encoder under timm's names.

RUN/checkpoints/step_00001250.safetensors   parameters, moments and step counts in float32, run facts in the header
RUN/model.safetensors                       everything, float32, our names
RUN/encoder.safetensors                     what timm's VisionTransformer loads
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cae_fast.config import UserError
from cae_fast.models.encoder import read_weights
from cae_fast.models.weight_names import encoder_for_timm

STATE_FILE = re.compile(r"step_(\d{8})\.safetensors")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write under a temporary name, flush to disk, then rename: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors makes private files; others may want to read a checkpoint
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def state_files(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of every complete training state of a run, oldest first."""
    folder = run_dir / "checkpoints"
    found = [(STATE_FILE.fullmatch(p.name), p) for p in folder.glob("step_*.safetensors")]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def save_state(run_dir: Path, step: int, state: dict[str, Tensor], facts: dict[str, Any], keep: set[int]) -> Path:
    """Write the training state after `step` steps and prune older ones except the steps in `keep`.

    `facts` is JSON that `load_state` gives back: step, configuration, data fingerprint.
    """
    path = run_dir / "checkpoints" / f"step_{step:08d}.safetensors"
    write_safetensors(path, state, {"cae_fast": json.dumps(facts)})
    for old_step, old in state_files(run_dir):
        if old_step < step and old_step not in keep:
            old.unlink()
    return path


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed process left half written."""
    for folder in (run_dir, run_dir / "checkpoints"):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU, and the facts. Raises UserError for a file that is not one of ours."""
    facts = load_facts(path)
    return load_file(path), facts


def load_facts(path: Path) -> dict[str, Any]:
    """What `save_state` was told besides the tensors. Raises UserError for a file that is not one of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["cae_fast"])
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{path} is not a training state of cae_fast: {error}") from error


def save_model(run_dir: Path, model_state: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write model.safetensors and encoder.safetensors; `facts` (JSON) describe the model in their headers."""
    cpu = {name: tensor.cpu() for name, tensor in model_state.items()}
    metadata = {"format": "pt", "cae_fast": json.dumps(facts)}
    write_safetensors(run_dir / "model.safetensors", cpu, metadata)
    write_safetensors(run_dir / "encoder.safetensors", encoder_for_timm(cpu), metadata)


def consolidated(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole model in float32: masters of a training state, and the model's own fixed tensors."""
    return {name: state.get(f"param/{name}", tensor).float() for name, tensor in model.state_dict().items()}


def load_model_weights(path: str) -> dict[str, Tensor]:
    """Tensors of a model.safetensors. Raises UserError where there is no such file or it is something else."""
    try:
        return read_weights(Path(path))[1]
    except UserError as error:
        raise UserError(f"train.init_from is {error}") from error
