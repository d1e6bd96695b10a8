"""Training on DeepSpeed's ZeRO (arXiv 1910.02054): masters, moments, gradients or weights shared out over processes.

DeepSpeed moves the data; norm, clipping, the decision to skip a step and AdamW are ours, so that every stage computes
what `Engine` computes and nothing waits for the device (stage 3 and offloading do, inside DeepSpeed).
"""

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.config import OptimConfig, PretrainConfig, TrainConfig, UserError
from cae_fast.training.checkpoint import consolidated
from cae_fast.training.distributed import World, set_group_timeouts
from cae_fast.training.engine import PRECISIONS, Engine, StepResult
from cae_fast.training.optim import clip_factor, decays, squared_norm, trainable
from cae_kernels import adamw, adamw_state
from cae_kernels.adamw import AdamWState

log = logging.getLogger(__name__)
KEYS = (("param", None), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq"))
"""Our names and DeepSpeed's of what is kept for a parameter."""


def zero_stage(train: TrainConfig, world: World) -> int:
    """The ZeRO stage of a run; 0: without DeepSpeed. UserError for settings that do not go together."""
    stage = train.zero if train.zero is not None else int(world.size > 1)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"train.zero is {train.zero}: set 0, 1, 2, 3 or leave it empty")
    for name, value in (("offload_optimizer", train.offload_optimizer), ("deepspeed", train.deepspeed)):
        if stage == 0 and value:
            raise UserError(f"train.{name} is {value}: it needs train.zero=1, 2 or 3")
    if stage and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"train.zero={stage} (1 is the default of several processes) needs the deepspeed package: "
            "pip install 'cae-fast[distributed]', or set train.zero=0"
        )
    return stage


def derived_settings(
    train: TrainConfig, stage: int, world_size: int, accumulation: int, cuda: bool
) -> dict[str, tuple[Any, str]]:
    """DeepSpeed's settings that follow from ours: {dotted name: (value, whose setting it follows from)}."""
    kind = "bf16" if train.precision == "bfloat16" else "fp32"
    micro = train.global_batch_size // (world_size * accumulation)
    offload = {"device": "cpu", "pin_memory": cuda} if train.offload_optimizer else {"device": "none"}
    zero = {
        "stage": (stage, "train.zero"),
        "offload_optimizer": (offload, "train.offload_optimizer"),
        # One odd-sized tensor would misalign all that follow in the flat buffer: no vector loads.
        "parameter_alignment": (True, "cae_fast"),
        "compute_grad_norm": (stage == 3 or train.offload_optimizer, "cae_fast"),
        "memory_efficient_linear": (False, "cae_fast"),  # replaces F.linear of the whole process
    }

    # None: a setting that the file must not have and DeepSpeed does not get, as we do its work.
    return {
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "train_micro_batch_size_per_gpu": (micro, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "train.micro_batch_size"),
        "gradient_clipping": (0.0, "optim.clip_grad_norm"),
        "bf16": ({"enabled": kind == "bf16", "check_grad_overflow": False}, "train.precision"),
        "fp16": ({"enabled": False}, "train.precision"),
        "data_types": ({"grad_accum_dtype": kind}, "train.precision"),
        "communication_data_type": (kind, "train.precision"),
        "optimizer": (None, "optim"),
        "scheduler": (None, "optim"),
        "activation_checkpointing": (None, "train.activation_checkpointing"),
        "zero_allow_untested_optimizer": (True, "cae_fast"),
        "zero_force_ds_cpu_optimizer": (False, "cae_fast"),
        "steps_per_print": (None, "log.every_steps"),
    } | {f"zero_optimization.{name}": value for name, value in zero.items()}


def deepspeed_settings(derived: dict[str, tuple[Any, str]], path: str | None) -> dict[str, Any]:
    """DeepSpeed's configuration: the file of train.deepspeed and what follows from our settings.

    Raises UserError for a file that is no JSON object, and for one that sets what follows from our settings.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            settings = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"train.deepspeed is {path}: cannot be read as JSON ({error})") from error
        if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
            raise UserError(f"train.deepspeed is {path}: it must hold an object of DeepSpeed's settings")

    zero = settings.setdefault("zero_optimization", {})
    for name, (value, source) in derived.items():
        section, key = (zero, name.split(".")[1]) if "." in name else (settings, name)
        if key in section:
            raise UserError(f"{path} sets {name} to {section[key]}, but it follows from {source}: remove it there")
        if value is not None:
            section[key] = value

    # DeepSpeed's own 5e8 is a buffer of 1 GB made anew in every backward pass.
    zero.setdefault("reduce_bucket_size", 100_000_000)
    zero.setdefault("allgather_bucket_size", 100_000_000)
    return settings


class PartitionAdamW(torch.optim.Optimizer):
    """AdamW of cae_kernels on the flat float32 partitions that DeepSpeed puts into the groups.

    `lr`, `clip_factor` and `skip` are set before every step.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig):
        super().__init__(groups, {"lr": optim.lr, "weight_decay": 0.0})
        self.betas, self.eps = (optim.betas[0], optim.betas[1]), optim.eps
        self.lr, self.clip_factor, self.skip = 0.0, torch.empty(0), torch.empty(0)
        self.partitions: dict[Tensor, AdamWState] = {}

    def prepare(self, partition: Tensor, weight_decay: float) -> None:
        state = adamw_state([partition], [partition], [weight_decay])
        self.partitions[partition] = state
        self.state[partition] = {"exp_avg": state.exp_avg[0], "exp_avg_sq": state.exp_avg_sq[0]}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for partition in (partition for group in self.param_groups for partition in group["params"]):
            factor, skip = (value.to(partition.device) for value in (self.clip_factor, self.skip))
            state = self.partitions[partition]
            gradients = [partition.grad]
            adamw(state, gradients, lr=self.lr, betas=self.betas, eps=self.eps, clip_factor=factor, skip=skip)


class ZeroEngine:
    """A model on `deepspeed.initialize`, with the interface of `Engine`. Every method is called by all processes."""

    def __init__(self, model: nn.Module, config: PretrainConfig, device: torch.device, accumulation: int, world: World):
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed calls what newer versions of torch rename.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        if device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes

        train, self.stage = config.train, zero_stage(config.train, world)
        self.module: nn.Module = model.to(device=device, dtype=PRECISIONS[train.precision])
        self.world, self.accumulation, self.clip, self.device = world, accumulation, config.optim.clip_grad_norm, device
        self.parameters = dict(trainable(model))
        named, weight_decay = self.parameters.items(), config.optim.weight_decay
        groups = [
            {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
            {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        ]

        cuda = device.type == "cuda"
        derived = derived_settings(train, self.stage, world.size, accumulation, cuda=cuda)
        self.optimizer = PartitionAdamW(groups, config.optim)
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False)
        self.engine: Any = deepspeed.initialize(
            model=self.module, optimizer=self.optimizer, config=deepspeed_settings(derived, train.deepspeed)
        )[0]
        set_group_timeouts(train.timeout_seconds, world)

        self.zero: Any = self.engine.optimizer
        for partition, decay in zip(self._partitions(), self._weight_decays(groups), strict=True):
            self.optimizer.prepare(partition, decay)
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()
        self.offload = train.offload_optimizer
        self.loss_sum: Tensor | None = None

    def _partitions(self) -> list[Tensor]:
        """This process's flat float32 masters, one for each group, or at stage 3 for each part of a group."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _weight_decays(self, groups: list[dict[str, Any]]) -> list[float]:
        order = self.zero.sub_group_to_group_id.values() if self.stage == 3 else range(len(groups))
        return [groups[i]["weight_decay"] for i in order]

    def __call__(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch
        seen = loss.detach()
        self.loss_sum = seen if self.loss_sum is None else self.loss_sum + seen

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Clip, update and clear the gradients."""
        assert self.loss_sum is not None, "step() without backward()"
        if self.offload and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # DeepSpeed copies gradients to the host on streams of its own

        # One collective for both: the norm of all gradients, and whether a loss is not finite.
        own = squared_norm(self._gradients()).to(self.device)
        sums = torch.stack((own, self.loss_sum.double()))
        if self.world.size > 1:
            dist.all_reduce(sums)
        norm = sums[0].sqrt().float()
        skipped = 1.0 - sums.sum().isfinite().float()

        self.optimizer.lr, self.optimizer.skip = lr, skipped
        self.optimizer.clip_factor = clip_factor(norm, self.clip)
        self.engine.step()
        self.loss_sum = None
        return StepResult(norm, skipped)

    def _gradients(self) -> list[Tensor]:
        if self.offload:
            return [partition.grad for partition in self._partitions() if partition.grad is not None]
        return [gradient for group in self.zero.averaged_gradients.values() for gradient in group]

    @torch.no_grad()
    def state_items(self) -> Generator[tuple[str, Tensor], None, None]:
        """The training state as `Engine.state()` names it, every tensor whole on every process, one at a time."""
        from deepspeed.utils import safe_get_full_optimizer_state

        yield "step", next(iter(self.optimizer.partitions.values())).step
        yield from self._masters()
        for ours, theirs in KEYS[1:]:
            for name, parameter in self.parameters.items():
                yield f"{ours}/{name}", safe_get_full_optimizer_state(parameter, theirs)

    def _masters(self) -> Generator[tuple[str, Tensor], None, None]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.parameters.items():
            yield f"param/{name}", safe_get_full_fp32_param(parameter)

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a state of any stage and number of processes; errors as `Engine.load_state`'s."""
        for ours, theirs in KEYS:
            for name, parameter in self.parameters.items():
                value, shape = state[f"{ours}/{name}"], getattr(parameter, "ds_shape", parameter.shape)
                if value.shape != shape:
                    raise RuntimeError(f"{name} has shape {tuple(value.shape)}, must have {tuple(shape)}")
                self._set(parameter, value, theirs)
        for partition in self.optimizer.partitions.values():
            partition.step.copy_(state["step"])
        self._refresh_weights()

    def _set(self, parameter: Tensor, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.stage == 3:
            # DeepSpeed's own way to set a whole tensor fails where it does not divide by the processes.
            length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            flat = F.pad(value.flatten(), (0, length * self.world.size - value.numel()))
            value = flat[length * self.world.rank :][:length]
        args = (parameter, value) if key is None else (parameter, value, key)
        if self.stage == 3:
            (safe_set_local_fp32_param if key is None else safe_set_local_optimizer_state)(*args)
        else:
            (safe_set_full_fp32_param if key is None else safe_set_full_optimizer_state)(*args)

    def _refresh_weights(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for number in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def model_state(self) -> dict[str, Tensor]:
        """The consolidated model in float32 on the host."""
        with torch.no_grad():
            return consolidated(self.module, {name: tensor.cpu() for name, tensor in self._masters()})


AnyEngine = Engine | ZeroEngine


def make_engine(
    model: nn.Module, config: PretrainConfig, device: torch.device, accumulation: int, world: World
) -> AnyEngine:
    stage = zero_stage(config.train, world)
    if stage or world.size > 1:
        name = f"DeepSpeed ZeRO-{stage}" if stage else "plain data parallel"
        log.info("engine: %s, processes: %d, micro-batches a step: %d", name, world.size, accumulation)
    if stage:
        return ZeroEngine(model, config, device, accumulation, world=world)
    return Engine(model, config.optim, config.train.precision, device, accumulation=accumulation, world=world)
