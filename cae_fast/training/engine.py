"""One process without a framework: compute in bfloat16 or float32, float32 master weights, AdamW on the device.

A step with a non-finite loss or gradient leaves weights and moments untouched; that decision is taken on the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cae_fast.config import OptimConfig
from cae_fast.models.cae import CaeLosses, ContextAutoencoder
from cae_fast.training.optim import decay_groups, set_learning_rate, trainable

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class StepResult(NamedTuple):
    """Scalars on the device: gradient norm before clipping, and 1 where the step was skipped, else 0."""

    grad_norm: Tensor
    skipped: Tensor


class Engine:
    """Model, master weights and optimizer of one process.

    The order of roundings is that of DeepSpeed's ZeRO-1 in bfloat16: masters start from the rounded weights, losses
    are divided by the accumulation steps, gradients are summed in the compute type, clipped in float32.
    """

    def __init__(
        self, model: ContextAutoencoder, optim: OptimConfig, precision: str, device: torch.device, accumulation: int
    ):
        self.module: nn.Module = model.to(device=device, dtype=PRECISIONS[precision])
        self.accumulation, self.clip = accumulation, optim.clip_grad_norm
        self.names = [name for name, _ in trainable(model)]
        self.parameters = [parameter for _, parameter in trainable(model)]
        in_place = precision == "float32"
        self.masters = [p if in_place else nn.Parameter(p.detach().float()) for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            decay_groups(zip(self.names, self.masters, strict=True), optim.weight_decay),
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            fused=True,
        )
        self.device = device
        self.loss_sum: Tensor | None = None

    def __call__(self, *inputs: Tensor | None) -> CaeLosses:
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
        gradients = [p.grad.float() for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters), "a trainable parameter got no gradient"
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        skipped = 1.0 - (norm + self.loss_sum).isfinite().float()
        if self.clip > 0:
            torch._foreach_mul_(gradients, 1.0 / ((norm + 1e-6) / self.clip).clamp(min=1.0))
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        set_learning_rate(self.optimizer, lr)
        # torch's fused optimizers skip on the device where found_inf is set, as GradScaler relies on.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.masters[0] is not self.parameters[0]:
            torch._foreach_copy_(list[Tensor](self.parameters), list[Tensor](self.masters))
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = master.grad = None
        self.loss_sum = None
        return StepResult(norm, skipped)

    def state(self) -> dict[str, Tensor]:
        """Training state by parameter: `param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` float32 and `step/NAME`."""
        state: dict[str, Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            moments = self.optimizer.state.get(master) or {
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
                "step": torch.zeros((), device=self.device),
            }
            state[f"param/{name}"] = master.detach()
            for key in ("exp_avg", "exp_avg_sq", "step"):
                state[f"{key}/{name}"] = moments[key]
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()`; raises KeyError or RuntimeError when it belongs to another model."""
        for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
            master.copy_(state[f"param/{name}"])
            parameter.copy_(master)
            self.optimizer.state[master] = {
                key: state[f"{key}/{name}"].to(self.device, copy=True) for key in ("step", "exp_avg", "exp_avg_sq")
            }

    def model_state(self) -> dict[str, Tensor]:
        """The consolidated model in float32: master weights and the fixed position embeddings."""
        masters = dict(zip(self.names, (m.detach() for m in self.masters), strict=True))
        return {name: masters.get(name, tensor).float() for name, tensor in self.module.state_dict().items()}
