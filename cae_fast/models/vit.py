"""The vision transformer that CAE pretrains: pre-norm blocks with LayerScale on any subset of an image's patches.

B batch, N patches, n tokens, D width, H heads, C head width.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cae_fast.config import UserError
from cae_kernels import attention, gather_tokens, layer_norm, linear_gelu, residual_norm

NORM_EPS = 1e-6


def sincos_position_embedding(height: int, width: int, embed_dim: int) -> Tensor:
    """Fixed 2-D positions, (height * width + 1, embed_dim) float32; the class token's row is first and zero.

    Channels are [sin(row), cos(row), sin(col), cos(col)], each a quarter of the width, at frequencies
    10000^(-i / (D / 4)). Raises UserError when the width is not a multiple of 4.
    """
    if embed_dim % 4:
        raise UserError(f"model.embed_dim is {embed_dim}: sine-cosine positions need a multiple of 4")
    quarter = embed_dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows = torch.arange(height, dtype=torch.float64)[:, None] * frequency  # (height, D/4)
    columns = torch.arange(width, dtype=torch.float64)[:, None] * frequency  # (width, D/4)
    row_part = torch.cat((rows.sin(), rows.cos()), 1)[:, None].expand(-1, width, -1)
    column_part = torch.cat((columns.sin(), columns.cos()), 1)[None].expand(height, -1, -1)
    table = torch.cat((row_part, column_part), 2).reshape(-1, embed_dim)
    return torch.cat((torch.zeros(1, embed_dim), table.float()))  # (N + 1, D)


def norm_parameters(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


class PatchEmbed(nn.Module):
    """Linear embedding of patches, with the weight in a convolution's shape as every ViT checkpoint has it."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        size = self.patch_size
        # One GEMM on unfolded patches: a convolution with stride = kernel is nothing else, and slower in bfloat16.
        patches = images.reshape(batch, channels, height // size, size, width // size, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 3 p^2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases on queries and values, none on keys.

    A head is embed_dim // num_heads wide; where that does not divide the width, the heads together are narrower.
    """

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(embed_dim, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.register_buffer("k_bias", torch.zeros(inner), persistent=False)
        self.proj = nn.Linear(inner, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.get_buffer("k_bias"), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, n, 3, H, C)
        return self.proj(attention(qkv, self.head_dim**-0.5).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))


class Block(nn.Module):
    """x + drop(gamma_1 * attention(norm1 x)), then x + drop(gamma_2 * mlp(norm2 x)).

    Each residual update is fused with the LayerNorm that reads it, so a block gets its input already normalized and
    returns it normalized for whoever comes next.
    """

    def __init__(self, embed_dim: int, num_heads: int, layer_scale_init: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.attn = SelfAttention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.mlp = Mlp(embed_dim, 4 * embed_dim)
        self.gamma_1 = nn.Parameter(torch.full((embed_dim,), layer_scale_init))
        self.gamma_2 = nn.Parameter(torch.full((embed_dim,), layer_scale_init))

    def forward(
        self, x: Tensor, normed: Tensor, next_norm: nn.LayerNorm, keep: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        norm2 = norm_parameters(self.norm2)
        x, normed = residual_norm(x, self.attn(normed), self.gamma_1, keep[0], norm=norm2, eps=NORM_EPS)
        norm = norm_parameters(next_norm)
        return residual_norm(x, self.mlp(normed), self.gamma_2, keep[1], norm=norm, eps=NORM_EPS)


def run_block(block: nn.Module, inputs: tuple[Any, ...], checkpointed: bool) -> Any:
    """block(*inputs); checkpointed: keep only the inputs for the backward pass, which then runs the block again."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing random in a block
    return block(*inputs)


def run_blocks(
    blocks: nn.ModuleList,
    norm: nn.LayerNorm,
    x: Tensor,
    keep: Tensor | None,
    outputs: list[Tensor] | None = None,
    checkpointed: bool = False,
) -> Tensor:
    """All blocks and the final LayerNorm. x: (B, n, D); keep: drop-path factors (2 * depth, B) or None.

    What every block adds up to, before any norm, is appended to `outputs`.
    """
    chain = [*(cast(Block, block).norm1 for block in blocks), norm]
    normed = layer_norm(x, *norm_parameters(chain[0]), NORM_EPS)
    for i, block in enumerate(blocks):
        x, normed = run_block(block, (x, normed, chain[i + 1], branch_keep(keep, i)), checkpointed)
        if outputs is not None:
            outputs.append(x)
    return normed


def branch_keep(keep: Tensor | None, block: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if keep is None else (keep[2 * block], keep[2 * block + 1])


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Linear from 0 to `rate` over the depth, in float32 as the original computes them."""
    return torch.linspace(0, rate, depth).tolist()


class VisionTransformer(nn.Module):
    """ViT with a class token, fixed sine-cosine positions and a final LayerNorm (paper, section 3.1: the encoder)."""

    pos_embed: Tensor

    def __init__(
        self, image_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, layer_scale_init: float
    ):
        super().__init__()
        self.checkpointed = False
        self.grid = image_size // patch_size
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_position_embedding(self.grid, self.grid, embed_dim)[None])
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, layer_scale_init) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)

    def tokens(self, images: Tensor, visible_ids: Tensor, masked_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embedded visible tokens (B, Nv + 1, D) and, where masked_ids are given, masked ones (B, Nm + 1, D)."""
        patches = self.patch_embed(images)  # (B, N, D)
        return gather_tokens(patches, visible_ids, masked_ids, self.cls_token, pos_embed=self.pos_embed[0])

    def encode(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Blocks and final norm. tokens: (B, n, D), class token first; keep: drop-path factors (2 * depth, B)."""
        return run_blocks(self.blocks, self.norm, tokens, keep, checkpointed=self.checkpointed)

    def all_tokens(self, images: Tensor) -> Tensor:
        """Class token and all patches, embedded: (B, N + 1, D). Raises UserError for images of another size."""
        side = self.grid * self.patch_embed.patch_size
        if images.shape[-2:] != (side, side):
            size = "x".join(str(length) for length in images.shape[-2:])
            raise UserError(f"images are {size} px, the encoder's {side}x{side}: load_encoder(path, image_size=...)")
        ids = torch.arange(self.grid**2, device=images.device).expand(len(images), -1)  # (B, N)
        return self.tokens(images, ids, None)[0]

    def forward_features(self, images: Tensor) -> Tensor:
        """All patches of normalized images (B, 3, S, S). Returns (B, N + 1, D) after the final norm, class first."""
        return self.encode(self.all_tokens(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Patch tokens (B, N, D) after the last n blocks, or after those of the given indices, first block first.

        As timm's method of this name: `reshape` makes them (B, D, grid, grid), `norm` applies the final norm to each,
        `return_prefix_tokens` makes them pairs with the class token (B, 1, D). Raises UserError for other blocks.
        """
        depth, outputs = len(self.blocks), cast(list[Tensor], [])
        indices = range(depth - n, depth) if isinstance(n, int) else sorted({i + depth * (i < 0) for i in n})
        if not indices or indices[0] < 0 or indices[-1] >= depth:
            raise UserError(f"n is {n}: the encoder has {depth} blocks")

        run_blocks(self.blocks, self.norm, self.all_tokens(images), None, outputs=outputs)
        tokens = [self.norm(outputs[i]) if norm else outputs[i] for i in indices]  # (B, N + 1, D)
        patches = [x[:, 1:] for x in tokens]
        if reshape:
            patches = [x.mT.unflatten(2, (self.grid, self.grid)).contiguous() for x in patches]  # (B, D, grid, grid)
        return list(zip(patches, (x[:, :1] for x in tokens), strict=True)) if return_prefix_tokens else patches


def initialize(module: nn.Module) -> None:
    """The original's initialization: Linear xavier-uniform with zero bias; patch convolution and tokens normal with
    std 0.02 cut at +-0.02. LayerNorm keeps its 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d) and part.bias is not None:
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.02, b=0.02)
            nn.init.zeros_(part.bias)
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)


@torch.no_grad()
def rescale_output_projections(blocks: nn.ModuleList) -> None:
    """BEiT's depth-wise rescaling: output projections of block l (from 1) divided by sqrt(2 l)."""
    for level, weights in enumerate(_output_projections(blocks), start=1):
        for weight in weights:
            weight.div_(math.sqrt(2.0 * level))


def _output_projections(blocks: nn.ModuleList) -> Iterator[tuple[Tensor, Tensor]]:
    for block in blocks:
        yield block.attn.proj.weight, block.mlp.fc2.weight  # type: ignore[union-attr, misc]
