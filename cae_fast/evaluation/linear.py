"""The linear probe.

B batch, N patches, D width, S image side, K classes.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cae_fast.config import ClassifyOptimConfig, HeadConfig
from cae_fast.evaluation.classifier import BatchNorm, frozen_tokens, new_linear
from cae_fast.models.vit import VisionTransformer


class LinearProbe(nn.Module):
    """Class token -> BatchNorm without parameters -> Linear, as in MAE and the original's run_linear.py.

    With `patch_mean` the mean of the patch tokens takes the class token's place.
    """

    settings: ClassVar[tuple[str, ...]] = ("features", "cache_features")
    packages: ClassVar[tuple[str, ...]] = ("timm.optim",)
    trains_encoder: ClassVar[bool] = False

    def __init__(self, embed_dim: int, num_classes: int, patch_mean: bool = False):
        super().__init__()
        self.patch_mean = patch_mean
        self.norm = BatchNorm(embed_dim, eps=1e-6)
        self.linear = new_linear(embed_dim, num_classes, 0.01)

    @classmethod
    def make(cls, encoder: VisionTransformer, num_classes: int, config: HeadConfig) -> "LinearProbe":
        return cls(encoder.embed_dim, num_classes, config.features == "patch_mean")

    def read(self, encoder: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """What the head reads of normalized images (B, 3, S, S): float32 (B, 1, D)."""
        return self.select(frozen_tokens(encoder, images)).float()

    def select(self, tokens: Tensor) -> Tensor:
        """What the head reads of an encoder's normalized tokens (B, N + 1, D): (B, 1, D)."""
        return tokens[:, 1:].mean(1, keepdim=True) if self.patch_mean else tokens[:, :1]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, 1, D) of `select`. Returns logits (B, K)."""
        return self.linear(self.norm(tokens[:, 0]))

    def make_optimizer(self, groups: list[dict[str, Any]], optim: ClassifyOptimConfig) -> torch.optim.Optimizer:
        """LARS (arXiv 1708.03888): a weight's gradient is scaled by 0.001 |w| / |g|; biases have momentum alone.

        timm's skips the scaling where weight_decay is 0, unless the group's always_adapt, true for weights, says
        otherwise.
        """
        from timm.optim import Lars

        return Lars(groups, lr=optim.lr, momentum=optim.momentum, trust_coeff=0.001)
