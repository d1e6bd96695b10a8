"""An encoder with a head that classifies its tokens, and what heads are made of. Each head has a file of its own.

B batch, N patches, n tokens that a head reads, D width, S image side, K classes.
"""

from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.config import ClassifyOptimConfig, HeadConfig
from cae_fast.models.vit import VisionTransformer


class Head(Protocol):
    """What `cae-fast classify` needs of a head, an nn.Module that computes in float32."""

    settings: ClassVar[tuple[str, ...]]
    """The fields of HeadConfig that it reads."""
    packages: ClassVar[tuple[str, ...]]
    """Modules of the extra `eval` that its training needs."""
    trains_encoder: ClassVar[bool]

    @classmethod
    def make(cls, encoder: VisionTransformer, num_classes: int, config: HeadConfig) -> Any:
        """A new head for this encoder."""

    def read(self, encoder: VisionTransformer, images: Tensor, keep: Tensor | None) -> Tensor:
        """Float32 tokens (B, n, D) of normalized images (B, 3, S, S). keep: drop-path factors (2 * depth, B)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, K) of what `read` gives."""

    def make_optimizer(self, groups: list[dict[str, Any]], optim: ClassifyOptimConfig) -> torch.optim.Optimizer:
        """For parameter groups with lr_scale, weight_decay and always_adapt."""


class Classifier(nn.Module):
    """An encoder and a head. With a probe the encoder is frozen, in evaluation mode."""

    def __init__(self, encoder: VisionTransformer, head: Any):
        super().__init__()
        self.encoder, self.head = encoder, head
        encoder.requires_grad_(head.trains_encoder)
        encoder.norm.requires_grad_(False)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (B, K), float32, of normalized images (B, 3, S, S). keep: drop-path factors (2 * depth, B)."""
        return self.head(self.head.read(self.encoder, images, keep))


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm without parameters over a micro-batch (B, D), which leaves its running statistics alone in training.

    `seen` collects every micro-batch's mean and unbiased variance, (2, D), for `update`: they may be other processes',
    too, and a step may turn out not to count.
    """

    def __init__(self, width: int, eps: float):
        super().__init__(width, affine=False, eps=eps)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        variance, mean = torch.var_mean(x.detach(), 0)
        self.seen.append(torch.stack((mean, variance)))
        return F.batch_norm(x, None, None, training=True, eps=self.eps)

    @torch.no_grad()
    def update(self, statistics: Tensor, counts: Tensor) -> None:
        """Move the running statistics towards those of micro-batches (k, 2, D) in turn, where the scalar `counts`."""
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        for running, values in ((self.running_mean, statistics[:, 0]), (self.running_var, statistics[:, 1])):
            for value in values:
                running.lerp_(torch.where(counts, value, running), self.momentum)


@torch.no_grad()
def frozen_tokens(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Normalized tokens (B, N + 1, D), in the encoder's type, class token first."""
    return encoder.forward_features(images)


def new_linear(embed_dim: int, num_classes: int, std: float) -> nn.Linear:
    """Weights truncated normal, bias 0: std 0.01 in MAE's and the original's probes, 0.02 in BEiT's fine-tuning."""
    linear = nn.Linear(embed_dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear
