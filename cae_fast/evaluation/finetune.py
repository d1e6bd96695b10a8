"""Fine-tuning: its head, and relative position biases for its encoder.

B batch, N patches, n tokens, G side of their grid, D width, H heads, C head width, S image side, K classes.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.config import ClassifyOptimConfig, HeadConfig
from cae_fast.evaluation.classifier import new_linear
from cae_fast.models.vit import NORM_EPS, SelfAttention, VisionTransformer, run_blocks


class FinetuneHead(nn.Module):
    """Mean of the patch tokens before the encoder's final norm -> LayerNorm, from that norm -> Linear, small at first.

    It takes the encoder's final norm over, which stands still from then on.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    trains_encoder: ClassVar[bool] = True

    def __init__(self, encoder: VisionTransformer, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=NORM_EPS)
        self.norm.load_state_dict(encoder.norm.state_dict())
        encoder.norm.requires_grad_(False)
        self.linear = new_linear(encoder.embed_dim, num_classes, 0.02)
        with torch.no_grad():
            self.linear.weight.mul_(0.001)

    @classmethod
    def make(cls, encoder: VisionTransformer, num_classes: int, config: HeadConfig) -> "FinetuneHead":
        return cls(encoder, num_classes)

    def read(self, encoder: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens before the final norm of normalized images (B, 3, S, S): float32 (B, N + 1, D)."""
        outputs: list[Tensor] = []
        run_blocks(encoder.blocks, encoder.norm, encoder.all_tokens(images), keep, outputs=outputs)
        return outputs[-1].float()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N + 1, D) before the final norm, class token first. Returns logits (B, K)."""
        return self.linear(self.norm(tokens[:, 1:].mean(1)))

    def make_optimizer(self, groups: list[dict[str, Any]], optim: ClassifyOptimConfig) -> torch.optim.Optimizer:
        cuda = groups[0]["params"][0].is_cuda
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=cuda)


class BiasedSelfAttention(SelfAttention):
    """Self-attention whose scores get a learned bias for each head and relative position of two patches, 0 at first.

    relative_position_bias_table: ((2 G - 1)^2 + 3, H) for a grid of G x G patches; its last three rows are class token
    to patches, patches to class token, class token to itself (BEiT, arXiv 2106.08254; Swin's table).
    """

    relative_position_index: Tensor

    def __init__(self, attention: SelfAttention, grid: int):
        super().__init__(attention.proj.out_features, attention.num_heads)
        self.load_state_dict(attention.state_dict())
        index = relative_position_index(grid)
        self.register_buffer("relative_position_index", index, persistent=False)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(int(index.max()) + 1, self.num_heads))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.get_buffer("k_bias"), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, n, 3, H, C)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, n, C) each
        scores_bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (H, n, n)
        attended = F.scaled_dot_product_attention(query, key, value, scores_bias[None], scale=self.head_dim**-0.5)
        return self.proj(attended.transpose(1, 2).flatten(-2))


def relative_position_index(grid: int) -> Tensor:
    """Row of the bias table for every pair (query, key) of tokens, class token first: int64 (G^2 + 1, G^2 + 1)."""
    span = 2 * grid - 1
    row, column = torch.arange(grid**2) // grid, torch.arange(grid**2) % grid
    index = torch.empty(grid**2 + 1, grid**2 + 1, dtype=torch.int64)
    index[1:, 1:] = (row[:, None] - row + grid - 1) * span + column[:, None] - column + grid - 1
    index[0, :], index[:, 0] = span**2, span**2 + 1
    index[0, 0] = span**2 + 2
    return index


def add_relative_position_bias(encoder: VisionTransformer) -> None:
    """Give every block's attention a bias of its own. It then runs in torch's scaled_dot_product_attention."""
    for block in encoder.blocks:
        block.attn = BiasedSelfAttention(block.attn, encoder.grid)  # type: ignore[arg-type]
