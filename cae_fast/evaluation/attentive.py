"""The attentive probe.

B batch, N patches, n tokens, D width, H heads, C head width, S image side, K classes.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.config import ClassifyOptimConfig, HeadConfig
from cae_fast.evaluation.classifier import BatchNorm, frozen_tokens, new_linear
from cae_fast.models.cae import CrossAttention
from cae_fast.models.vit import NORM_EPS, VisionTransformer


class AttentiveProbe(nn.Module):
    """One learned query attends to the tokens; BatchNorm without parameters; Linear (paper, section 4.2).

    No residual and no MLP. Keys and values are the patches; the original code adds the class token (`class_token`).
    """

    settings: ClassVar[tuple[str, ...]] = ("class_token", "cache_features")
    packages: ClassVar[tuple[str, ...]] = ()
    trains_encoder: ClassVar[bool] = False

    def __init__(self, embed_dim: int, num_heads: int, num_classes: int, class_token: bool = False):
        super().__init__()
        self.class_token = class_token
        self.query = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(embed_dim, eps=NORM_EPS) for _ in range(3))
        self.attn = CrossAttention(embed_dim, num_heads)
        for linear in (self.attn.q, self.attn.k, self.attn.v, self.attn.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.attn.proj.bias)
        self.norm = BatchNorm(embed_dim, eps=1e-5)
        self.linear = new_linear(embed_dim, num_classes, 0.01)

    @classmethod
    def make(cls, encoder: VisionTransformer, num_classes: int, config: HeadConfig) -> "AttentiveProbe":
        return cls(encoder.embed_dim, encoder.num_heads, num_classes, config.class_token)

    def read(self, encoder: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """What the head reads of normalized images (B, 3, S, S): float32 (B, n, D)."""
        return self.select(frozen_tokens(encoder, images)).float()

    def select(self, tokens: Tensor) -> Tensor:
        """What the head reads of an encoder's normalized tokens (B, N + 1, D): (B, n, D)."""
        return tokens if self.class_token else tokens[:, 1:]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, n, D) of `select`. Returns logits (B, K)."""
        attn = self.attn
        query = F.linear(self.norm_q(self.query), attn.q.weight, attn.q_bias)  # (1, 1, H C)
        query = query.unflatten(-1, (attn.num_heads, attn.head_dim)).expand(len(tokens), -1, -1, -1)  # (B, 1, H, C)
        key, value = attn.key_value(self.norm_k(tokens), self.norm_v(tokens))  # (B, n, H, C)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, scale=attn.head_dim**-0.5)  # (B, H, 1, C)
        return self.linear(self.norm(attn.proj(attended.flatten(1))))

    def make_optimizer(self, groups: list[dict[str, Any]], optim: ClassifyOptimConfig) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.momentum > 0)
