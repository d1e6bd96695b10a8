"""Training without a framework, alone or plain data parallel: compute in bfloat16 or float32, float32 masters.

A step with a non-finite loss or gradient leaves weights and moments untouched; that decision is taken on the device.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cae_fast.config import OptimConfig
from cae_fast.training.checkpoint import consolidated
from cae_fast.training.distributed import World
from cae_fast.training.optim import clip_factor, decays, squared_norm, trainable
from cae_kernels import adamw, adamw_state

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class StepResult(NamedTuple):
    """Scalars on the device: gradient norm before clipping, and 1 where the step was skipped, else 0."""

    grad_norm: Tensor
    skipped: Tensor


class Engine:
    """Model, master weights and optimizer, the same on every process.

    The order of roundings is that of DeepSpeed's ZeRO-1 in bfloat16: masters start from the rounded weights, losses
    are divided by the accumulation steps, gradients are summed in the compute type, clipped in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        precision: str,
        device: torch.device,
        accumulation: int,
        world: World | None = None,
    ):
        self.world = World() if world is None else world
        self.module: nn.Module = model.to(device=device, dtype=PRECISIONS[precision])
        self.accumulation, self.clip = accumulation, optim.clip_grad_norm
        self.names = [name for name, _ in trainable(model)]
        self.parameters = [parameter for _, parameter in trainable(model)]
        in_place = precision == "float32"
        self.masters = [p.detach() if in_place else p.detach().float() for p in self.parameters]
        decay = [optim.weight_decay if decays(name, p) else 0.0 for name, p in trainable(model)]
        self.adamw = adamw_state(self.masters, self.parameters, decay)
        self.betas, self.eps = (optim.betas[0], optim.betas[1]), optim.eps
        self.device = device
        self.loss_sum: Tensor | None = None

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss."""
        (loss / self.accumulation).backward()
        seen = loss.detach()
        self.loss_sum = seen if self.loss_sum is None else self.loss_sum + seen

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Clip, update and clear the gradients."""
        assert self.loss_sum is not None, "step() without backward()"
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters), "a trainable parameter got no gradient"
        self.world.average(gradients)

        # The host reads none of them: the kernel takes the clip factor and the skip from the device.
        norm = squared_norm(gradients).sqrt().float()
        skipped = 1.0 - (norm + self.world.mean(self.loss_sum)).isfinite().float()
        factor = clip_factor(norm, self.clip)
        adamw(self.adamw, gradients, lr=lr, betas=self.betas, eps=self.eps, clip_factor=factor, skip=skipped)
        for parameter in self.parameters:
            parameter.grad = None
        self.loss_sum = None
        return StepResult(norm, skipped)

    def state(self) -> dict[str, Tensor]:
        """Training state: `param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` in float32, and `step`, the steps taken."""
        state = {"step": self.adamw.step}
        for key, tensors in self._lists():
            state |= {f"{key}/{name}": tensor for name, tensor in zip(self.names, tensors, strict=True)}
        return state

    def state_items(self) -> Iterable[tuple[str, Tensor]]:
        """`state()` one tensor at a time."""
        return self.state().items()

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()`; raises KeyError or RuntimeError when it belongs to another model."""
        for key, tensors in self._lists():
            for name, tensor in zip(self.names, tensors, strict=True):
                tensor.copy_(state[f"{key}/{name}"])
        self.adamw.step.copy_(state["step"])
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)

    def _lists(self) -> tuple[tuple[str, list[Tensor]], ...]:
        return ("param", self.masters), ("exp_avg", self.adamw.exp_avg), ("exp_avg_sq", self.adamw.exp_avg_sq)

    def model_state(self) -> dict[str, Tensor]:
        """The consolidated model in float32: master weights and the fixed position embeddings."""
        return consolidated(self.module, self.state())
