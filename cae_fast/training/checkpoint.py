"""Files of a run, written in a thread while training goes on: training state, whole model, encoder for timm.

RUN/checkpoints/step_00001250.safetensors   parameters, moments and step counts in float32, run facts in the header
RUN/model.safetensors                       everything, float32, our names
RUN/encoder.safetensors                     what timm's VisionTransformer loads
"""

import logging
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from cae_fast.config import UserError
from cae_fast.files import read_weights, write_safetensors
from cae_fast.models.weight_names import encoder_for_timm

log = logging.getLogger(__name__)
STATE_FILE = re.compile(r"step_(\d{8})\.safetensors")
FOLDER = "checkpoints"


def state_files(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of every complete training state of a run, oldest first."""
    found = [(STATE_FILE.fullmatch(path.name), path) for path in (run_dir / FOLDER).glob("step_*.safetensors")]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def save_state(run_dir: Path, step: int, state: dict[str, Tensor], facts: dict[str, Any], keep: set[int]) -> Path:
    """Write the training state after `step` steps and prune older ones except the steps in `keep`.

    `facts` is JSON that `load_state` gives back: step, configuration, data fingerprint.
    """
    path = run_dir / FOLDER / f"step_{step:08d}.safetensors"
    write_safetensors(path, state, facts)
    for old_step, old in state_files(run_dir):
        if old_step < step and old_step not in keep:
            old.unlink()
    return path


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU, and the facts. Raises UserError for a file that is damaged or not one of ours."""
    facts, state = read_weights(path)
    if "step" not in facts or "config" not in facts:
        raise UserError(f"{path} is not a training state of cae_fast")
    return state, facts


def newest_whole(run_dir: Path) -> Path | None:
    """The newest training state that is whole, with a line for every newer one that is not; None without states.

    Raises UserError where there are states and none is whole.
    """
    states = state_files(run_dir)
    for step, path in reversed(states):
        try:
            load_state(path)
            return path
        except UserError as error:
            log.warning("the state of step %d cannot be used: %s", step, error)
    if states:
        raise UserError(f"none of the {len(states)} training states in {run_dir / FOLDER} can be used; see above")
    return None


def save_model(run_dir: Path, model_state: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write model.safetensors and encoder.safetensors; `facts` (JSON) describe the model in their headers."""
    cpu = {name: tensor.cpu() for name, tensor in model_state.items()}
    write_safetensors(run_dir / "model.safetensors", cpu, facts)
    write_safetensors(run_dir / "encoder.safetensors", encoder_for_timm(cpu), facts)


def consolidated(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole model in float32: parameters and buffers of a training state, and the model's own fixed tensors."""
    trained = {
        name.partition("/")[2]: tensor for name, tensor in state.items() if name.startswith(("param/", "buffer/"))
    }
    return {name: trained.get(name, tensor).float() for name, tensor in model.state_dict().items()}


def load_model_weights(path: str) -> dict[str, Tensor]:
    """Tensors of a model.safetensors. Raises UserError where there is no such file or it is something else."""
    try:
        return read_weights(Path(path))[1]
    except UserError as error:
        raise UserError(f"train.init_from is {error}") from error


class Saver:
    """Writes one checkpoint at a time. A context manager: its end waits for the last one.

    A disk that is full or a folder that is gone leaves the checkpoints that are there: it is logged, `failed` is set
    until a later checkpoint is written, and training goes on. Any other error is raised by the next `wait`.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.failed = run_dir, False
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def snapshot(self, tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
        """Copies on the host, valid until the next call, in memory that is used again; empty where not `keep`.

        Call `wait` before. Goes through all tensors in any case, which processes gather together.
        """
        names = []
        for name, tensor in tensors:
            if not keep:
                continue
            names.append(name)
            if name not in self._copies:
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return {name: self._copies[name] for name in names}

    def start(self, write: Callable[[], object], step: int) -> None:
        """Run `write()`, which makes the checkpoint of `step`, in the background."""
        self._thread = threading.Thread(target=self._run, args=(write, step), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong, other than with the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Callable[[], object], step: int) -> None:
        try:
            write()
            self.failed = False
        except OSError as error:
            self.failed = True
            states = state_files(self.run_dir)
            last = f"that of step {states[-1][0]}" if states else "none"
            log.error(
                "the checkpoint of step %d could not be written to %s: %s. The last whole one is %s; going on",
                step,
                self.run_dir,
                " ".join(str(error).split()),
                last,
            )
        except Exception as error:
            self._error = error
