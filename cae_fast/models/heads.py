"""Heads that classify an encoder's tokens: linear and attentive probe, and the head of fine-tuning (paper, section 4).

B batch, N patches, n tokens, D width, H heads, C head width, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.models.cae import CrossAttention
from cae_fast.models.vit import NORM_EPS, SelfAttention, VisionTransformer, run_blocks


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


class LinearProbe(nn.Module):
    """Class token -> BatchNorm without parameters -> Linear, as in MAE and the original's run_linear.py.

    With `patch_mean` the mean of the patch tokens takes the class token's place.
    """

    def __init__(self, embed_dim: int, num_classes: int, patch_mean: bool = False):
        super().__init__()
        self.patch_mean = patch_mean
        self.norm = BatchNorm(embed_dim, eps=1e-6)
        self.linear = new_linear(embed_dim, num_classes, 0.01)

    def select(self, tokens: Tensor) -> Tensor:
        """What the head reads of an encoder's normalized tokens (B, N + 1, D): (B, 1, D)."""
        return tokens[:, 1:].mean(1, keepdim=True) if self.patch_mean else tokens[:, :1]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, 1, D) of `select`. Returns logits (B, K)."""
        return self.linear(self.norm(tokens[:, 0]))


class AttentiveProbe(nn.Module):
    """One learned query attends to the tokens; BatchNorm without parameters; Linear (paper, section 4.2).

    No residual and no MLP. Keys and values are the patches; the original code adds the class token (`class_token`).
    """

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


class FinetuneHead(nn.Module):
    """Mean of the patch tokens before the encoder's final norm -> LayerNorm, from that norm -> Linear, small at first.

    It takes the encoder's final norm over, which stands still from then on.
    """

    def __init__(self, encoder: VisionTransformer, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(encoder.embed_dim, eps=NORM_EPS)
        self.norm.load_state_dict(encoder.norm.state_dict())
        encoder.norm.requires_grad_(False)
        self.linear = new_linear(encoder.embed_dim, num_classes, 0.02)
        with torch.no_grad():
            self.linear.weight.mul_(0.001)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N + 1, D) before the final norm, class token first. Returns logits (B, K)."""
        return self.linear(self.norm(tokens[:, 1:].mean(1)))


def new_linear(embed_dim: int, num_classes: int, std: float) -> nn.Linear:
    """Weights truncated normal, bias 0: std 0.01 in MAE's and the original's probes, 0.02 in BEiT's fine-tuning."""
    linear = nn.Linear(embed_dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear


class Classifier(nn.Module):
    """An encoder and a head, which computes in float32. With a probe the encoder is frozen, in evaluation mode."""

    def __init__(self, encoder: VisionTransformer, head: LinearProbe | AttentiveProbe | FinetuneHead):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.probe = None if isinstance(head, FinetuneHead) else head
        encoder.requires_grad_(self.probe is None)
        encoder.norm.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Frozen float32 tokens (B, n, D) of normalized images (B, 3, S, S), as the probe reads them."""
        assert self.probe is not None
        with torch.no_grad():
            return self.probe.select(self.encoder.forward_features(images)).float()

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (B, K), float32, of normalized images (B, 3, S, S). keep: drop-path factors (2 * depth, B)."""
        if self.probe is not None:
            return self.head(self.features(images))
        outputs: list[Tensor] = []
        encoder = self.encoder
        run_blocks(encoder.blocks, encoder.norm, encoder.all_tokens(images), keep, outputs)
        return self.head(outputs[-1].float())


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
