"""Learning rates, parameter groups and clipping; all of them pure functions."""

import math
import re

import torch
from torch import Tensor, nn

from cae_fast.config import OptimConfig, UserError


def check_optim(optim: OptimConfig) -> None:
    """UserError for settings that make no schedule."""
    if optim.epochs < 1:
        raise UserError(f"optim.epochs is {optim.epochs}: it must be at least 1")
    if not 0 <= optim.warmup_epochs < optim.epochs:
        raise UserError(
            f"optim.warmup_epochs is {optim.warmup_epochs}: it must be from 0 to below the {optim.epochs} epochs"
        )
    for name in ("lr", "min_lr", "eps", "weight_decay", "clip_grad_norm"):
        if not 0 <= getattr(optim, name) < math.inf:
            raise UserError(f"optim.{name} is {getattr(optim, name)}: it must be a finite number of at least 0")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"optim.betas is {optim.betas}: two numbers from 0 to below 1")


def learning_rate(step: int, warmup_steps: int, total_steps: int, peak: float, lowest: float) -> float:
    """Linear from 0 to `peak` over the warmup, whose last step is at the peak; then half a cosine down to `lowest`."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return lowest + 0.5 * (peak - lowest) * (1 + math.cos(math.pi * min(1.0, progress)))


def scheduled_lr(step: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    warmup, total = optim.warmup_epochs * steps_per_epoch, optim.epochs * steps_per_epoch
    return learning_rate(step, warmup, total, peak=optim.lr, lowest=optim.min_lr)


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay for everything but biases and one-dimensional parameters; class and mask tokens are decayed."""
    return parameter.ndim > 1 and not name.endswith("bias")


def layer_id(name: str, depth: int) -> int:
    """Depth of an encoder parameter for layer decay: 0 for the embeddings, i + 1 for block i, depth + 1 after."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block.group(1)) + 1 if block else depth + 1


def layer_decay_scales(decay: float, depth: int) -> list[float]:
    """Learning-rate factors of layer ids 0 .. depth + 1 (BEiT's layer-wise decay): decay ** (depth + 1 - id)."""
    return [decay ** (depth + 1 - i) for i in range(depth + 2)]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def squared_norm(gradients: list[Tensor]) -> Tensor:
    """Sum of squares as a float64 scalar: rounded once in the end, whatever the order and cut of the tensors."""
    return torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).double().square().sum()


def clip_factor(norm: Tensor, largest: float) -> Tensor:
    """What gradients of this norm are multiplied by, a float32 scalar; largest = 0: no clipping."""
    factor = torch.ones_like(norm)
    return factor if largest == 0 else factor / ((norm + 1e-6) / largest).clamp(min=1.0)
