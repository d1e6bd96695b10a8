"""The context autoencoder (arXiv 2202.03026): encoder, latent contextual regressor, decoder and the two losses.

loss = prediction(decoder(z_m + pos_m)) + weight * MSE(z_m, stop_gradient(encoder(masked patches)))

B batch, N patches, Nv visible, Nm masked, D encoder width, R regressor and decoder width, H heads, C head width,
V codes, P = 3 p^2 values of a patch.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.config import ModelConfig, UserError
from cae_fast.models.vit import (
    NORM_EPS,
    Block,
    Mlp,
    VisionTransformer,
    branch_keep,
    drop_path_rates,
    initialize,
    norm_parameters,
    rescale_output_projections,
    run_block,
    run_blocks,
    sincos_position_embedding,
)
from cae_kernels import (
    QKV,
    cross_attention,
    linear_cross_entropy,
    norm_qkv,
    residual_norm,
    residual_norm_qkv,
    squared_error,
)


class Size(NamedTuple):
    """What a model.size stands for; regressor and decoder are the encoder's size where it says nothing else."""

    embed_dim: int
    depth: int
    num_heads: int
    layer_scale_init: float
    patch_size: int = 16
    decoder_embed_dim: int | None = None
    decoder_num_heads: int | None = None


LARGE = Size(embed_dim=1024, depth=24, num_heads=16, layer_scale_init=1e-5)
SIZES = {
    "tiny": Size(embed_dim=96, depth=4, num_heads=3, layer_scale_init=0.1, patch_size=4),
    "small": Size(embed_dim=384, depth=12, num_heads=6, layer_scale_init=0.1),
    "base": Size(embed_dim=768, depth=12, num_heads=12, layer_scale_init=0.1),
    "large": LARGE,
    "large_dec768": LARGE._replace(decoder_embed_dim=768, decoder_num_heads=12),
    "huge": Size(embed_dim=1280, depth=32, num_heads=16, layer_scale_init=1e-5, patch_size=14),
}


@dataclass(frozen=True)
class ModelShape:
    """A ModelConfig with every field filled; the fields mean the same."""

    size: str
    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_num_heads: int
    regressor_depth: int
    decoder_depth: int
    layer_scale_init: float
    drop_path_rate: float
    align_drop_path: bool
    rescale_init: bool


def resolve_model(model: ModelConfig) -> ModelShape:
    """Fill the empty fields from the size and check that the whole makes a model; UserError says what to set."""
    if model.size not in SIZES:
        raise UserError(f"model.size is {model.size!r}: choose one of {', '.join(SIZES)}")
    filled = SIZES[model.size]._asdict()
    given = {name: value for name, value in asdict(model).items() if value is not None}
    for name in ("embed_dim", "num_heads"):
        if filled[f"decoder_{name}"] is None or name in given:
            filled[f"decoder_{name}"] = given.get(name, filled[name])
    shape = ModelShape(**filled | given)
    _check_shape(shape)
    return shape


def _check_shape(shape: ModelShape) -> None:
    for name, value in asdict(shape).items():
        lowest = 0 if name == "decoder_depth" else 1
        if type(value) is int and value < lowest:
            raise UserError(f"model.{name} is {value}: it must be at least {lowest}")
    if shape.image_size % shape.patch_size:
        near = max(1, round(shape.image_size / shape.patch_size)) * shape.patch_size
        raise UserError(
            f"model.image_size is {shape.image_size}, not a multiple of the patch size {shape.patch_size}: "
            f"set model.image_size={near} or another model.patch_size"
        )

    if not 0 <= shape.drop_path_rate < 1:
        raise UserError(f"model.drop_path_rate is {shape.drop_path_rate}: it must be at least 0 and below 1")
    for name, width, heads in (
        ("embed_dim", shape.embed_dim, shape.num_heads),
        ("decoder_embed_dim", shape.decoder_embed_dim, shape.decoder_num_heads),
    ):
        if width % 4:
            raise UserError(f"model.{name} is {width}: sine-cosine positions need a multiple of 4")
        if heads > width:
            raise UserError(f"model.{name} is {width} with {heads} heads: a head must be at least 1 wide")


class CaeLosses(NamedTuple):
    """Scalars on the device. total = main + alignment_weight * alignment; accuracy is top-1 over codes, or None."""

    total: Tensor
    main: Tensor
    alignment: Tensor
    accuracy: Tensor | None


class CrossAttention(nn.Module):
    """Multi-head cross-attention with biases on queries and values, none on keys."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        inner = self.num_heads * self.head_dim
        self.q = nn.Linear(embed_dim, inner, bias=False)
        self.k = nn.Linear(embed_dim, inner, bias=False)
        self.v = nn.Linear(embed_dim, inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.proj = nn.Linear(inner, embed_dim)

    def key_value(self, key_input: Tensor, value_input: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.k(key_input), F.linear(value_input, self.v.weight, self.v_bias)
        return self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))  # (B, n, H, C)

    def forward(self, query_input: Tensor, visible: tuple[Tensor, Tensor], masked: tuple[Tensor, Tensor]) -> Tensor:
        query = self._heads(F.linear(query_input, self.q.weight, self.q_bias))  # (B, Nm, H, C)
        attended = cross_attention(query, self.key_value(*visible), self.key_value(*masked), self.head_dim**-0.5)
        return self.proj(attended.flatten(-2))  # (B, Nm, R)


class RegressorBlock(nn.Module):
    """Masked queries attend to [visible latents ; masked queries]; then norm2 replaces the residual stream.

    x = norm2(x + drop(gamma_1 * attention)); the caller adds drop(gamma_2 * mlp(x)) together with the next norms.
    """

    def __init__(self, embed_dim: int, num_heads: int, layer_scale_init: float):
        super().__init__()
        self.norm_q = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.norm_k = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.norm_v = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.attn = CrossAttention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.mlp = Mlp(embed_dim, 4 * embed_dim)
        self.gamma_1 = nn.Parameter(torch.full((embed_dim,), layer_scale_init))
        self.gamma_2 = nn.Parameter(torch.full((embed_dim,), layer_scale_init))

    def input_norms(self) -> dict[str, tuple[Tensor, Tensor]]:
        norms = {"norm_q": self.norm_q, "norm_k": self.norm_k, "norm_v": self.norm_v}
        return {name: norm_parameters(norm) for name, norm in norms.items()}

    def forward(self, x: Tensor, normed: QKV, context: QKV, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        query, *masked = normed
        attended = self.attn(query, context[1:], tuple(masked))
        norm = norm_parameters(self.norm2)
        _, x = residual_norm(x, attended, self.gamma_1, keep, norm=norm, eps=NORM_EPS)
        return x, self.mlp(x)


class Regressor(nn.Module):
    """Predicts the latents of the masked patches from those of the visible ones (paper, section 3.1)."""

    def __init__(self, embed_dim: int, depth: int, num_heads: int, layer_scale_init: float):
        super().__init__()
        self.checkpointed = False
        self.blocks = nn.ModuleList(RegressorBlock(embed_dim, num_heads, layer_scale_init) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)

    def forward(
        self,
        queries: Tensor,
        visible: Tensor,
        pos_embed: Tensor,
        visible_ids: Tensor,
        masked_ids: Tensor,
        keep: Tensor | None,
    ) -> Tensor:
        """queries: (B, Nm, R); visible: (B, Nv, R); pos_embed: (N, R); keep: (2 * depth, B). Returns (B, Nm, R)."""
        blocks = cast(list[RegressorBlock], list(self.blocks))
        x = queries
        normed = norm_qkv(x, pos_embed, masked_ids, **blocks[0].input_norms(), eps=NORM_EPS)
        for i, block in enumerate(blocks):
            norm_k, norm_v = norm_parameters(block.norm_k), norm_parameters(block.norm_v)
            context = norm_qkv(visible, pos_embed, visible_ids, norm_q=None, norm_k=norm_k, norm_v=norm_v, eps=NORM_EPS)
            drop = branch_keep(keep, i)
            x, branch = run_block(block, (x, normed, context, drop[0]), self.checkpointed)

            # The residual update is one pass with the norms that read it: the next block's, or the last.
            if i + 1 < len(blocks):
                norms = blocks[i + 1].input_norms()
                x, normed = residual_norm_qkv(
                    x, branch, block.gamma_2, drop[1], pos_embed=pos_embed, ids=masked_ids, **norms, eps=NORM_EPS
                )
        norm = norm_parameters(self.norm)
        return residual_norm(x, branch, block.gamma_2, drop[1], norm=norm, eps=NORM_EPS)[1]


class Decoder(nn.Module):
    """Self-attention blocks over the masked tokens only, then one linear layer to the targets."""

    def __init__(self, embed_dim: int, depth: int, num_heads: int, layer_scale_init: float, output_dim: int):
        super().__init__()
        self.checkpointed = False
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, layer_scale_init) for _ in range(depth))
        if depth:
            self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.head = nn.Linear(embed_dim, output_dim)

    def forward(self, latents: Tensor, pos_embed: Tensor, ids: Tensor, keep: Tensor | None) -> Tensor:
        """Features that the head reads. latents: (B, n, R); pos_embed: (N, R); ids: (B, n). Returns (B, n, R)."""
        if not self.blocks:
            return latents
        return run_blocks(self.blocks, self.norm, latents + pos_embed[ids], keep, checkpointed=self.checkpointed)


class ContextAutoencoder(nn.Module):
    """CAE for pretraining.

    output_dim: V for codes, P for pixels, the teacher's width for features; predict_codes: cross-entropy over codes,
    else mean squared error, or with cosine_loss one minus the cosine (CAE v2, 2211.09799).
    """

    regressor_pos_embed: Tensor

    def __init__(
        self,
        model: ModelConfig,
        output_dim: int,
        predict_codes: bool,
        alignment_weight: float = 2.0,
        cosine_loss: bool = False,
    ):
        super().__init__()
        shape = resolve_model(model)
        self.shape, self.predict_codes, self.alignment_weight = shape, predict_codes, alignment_weight
        self.cosine_loss = cosine_loss
        self.encoder = VisionTransformer(
            image_size=shape.image_size,
            patch_size=shape.patch_size,
            embed_dim=shape.embed_dim,
            depth=shape.depth,
            num_heads=shape.num_heads,
            layer_scale_init=shape.layer_scale_init,
        )

        width, heads = shape.decoder_embed_dim, shape.decoder_num_heads
        if width != shape.embed_dim:
            self.encoder_to_regressor = nn.Linear(shape.embed_dim, width)
            self.encoder_to_regressor_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        grid = self.encoder.grid
        self.register_buffer("regressor_pos_embed", sincos_position_embedding(grid, grid, width)[None])
        self.regressor = Regressor(width, shape.regressor_depth, heads, shape.layer_scale_init)
        self.decoder = Decoder(
            width, shape.decoder_depth, heads, layer_scale_init=shape.layer_scale_init, output_dim=output_dim
        )

        initialize(self)
        if shape.rescale_init:
            for blocks in (self.encoder.blocks, self.regressor.blocks, self.decoder.blocks):
                rescale_output_projections(blocks)

    def checkpoint_blocks(self, on: bool) -> None:
        """Whether blocks compute their activations again in the backward pass instead of keeping them."""
        self.encoder.checkpointed = self.regressor.checkpointed = self.decoder.checkpointed = on

    def branch_rates(self) -> list[float]:
        """Drop-path rate of every residual branch, in the order of `keep`'s rows: encoder, encoder on the masked
        patches, regressor, decoder; two branches a block."""
        model = self.shape
        encoder = drop_path_rates(model.drop_path_rate, model.depth)
        target = encoder if model.align_drop_path else [0.0] * model.depth
        regressor = drop_path_rates(model.drop_path_rate, model.regressor_depth)
        decoder = drop_path_rates(model.drop_path_rate, model.decoder_depth)
        return [rate for rate in (*encoder, *target, *regressor, *decoder) for _ in range(2)]

    def to_regressor_width(self, latents: Tensor) -> Tensor:
        """Latents (B, n, D) of the encoder in the regressor's width (B, n, R)."""
        if self.shape.decoder_embed_dim == self.shape.embed_dim:
            return latents
        return self.encoder_to_regressor_norm(self.encoder_to_regressor(latents))

    def predict_latents(
        self, visible: Tensor, visible_ids: Tensor, masked_ids: Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """z_m of the paper: (B, Nm, R) from visible patch latents (B, Nv, R)."""
        queries = self.mask_token.expand(*masked_ids.shape, -1)  # (B, Nm, R)
        return self.regressor(
            queries, visible, self.patch_positions(), visible_ids=visible_ids, masked_ids=masked_ids, keep=keep
        )

    def patch_positions(self) -> Tensor:
        return self.regressor_pos_embed[0, 1:]  # (N, R)

    def predict(self, images: Tensor, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """Predictions at the masked patches, without drop path: (B, Nm, output_dim), codes as logits."""
        tokens, _ = self.encoder.tokens(images, visible_ids, None)
        visible = self.to_regressor_width(self.encoder.encode(tokens))[:, 1:]
        latents = self.predict_latents(visible, visible_ids, masked_ids)
        return self.decoder.head(self.decoder(latents, self.patch_positions(), masked_ids, None))

    def forward(
        self, images: Tensor, visible_ids: Tensor, masked_ids: Tensor, targets: Tensor, keep: Tensor | None = None
    ) -> CaeLosses:
        """One training forward pass (paper, section 3.2).

        images: (B, 3, S, S) normalized; visible_ids: (B, Nv), masked_ids: (B, Nm), int64, sorted; targets: codes
        (B, Nm) int64 or pixels (B, Nm, P); keep: drop-path factors (len(branch_rates()), B) float32, or None.
        """
        depths = [2 * len(part.blocks) for part in (self.encoder, self.encoder, self.regressor, self.decoder)]
        keeps = [None] * 4 if keep is None else keep.split(depths)

        align = self.alignment_weight > 0
        tokens, masked_tokens = self.encoder.tokens(images, visible_ids, masked_ids if align else None)
        visible = self.to_regressor_width(self.encoder.encode(tokens, keeps[0]))[:, 1:]  # (B, Nv, R)
        latents = self.predict_latents(visible, visible_ids, masked_ids, keeps[2])  # (B, Nm, R)
        features = self.decoder(latents, self.patch_positions(), masked_ids, keeps[3])  # (B, Nm, R)
        main, accuracy = self._prediction_loss(features, targets)

        if masked_tokens is None:
            return CaeLosses(main, main.detach(), torch.zeros_like(main), accuracy)
        with torch.no_grad():
            target_latents = self.to_regressor_width(self.encoder.encode(masked_tokens, keeps[1])[:, 1:])
        alignment = squared_error(latents, target_latents)
        total = main + self.alignment_weight * alignment
        return CaeLosses(total, main.detach(), alignment.detach(), accuracy)

    def _prediction_loss(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        head = self.decoder.head
        if self.predict_codes:
            return linear_cross_entropy(features.flatten(0, 1), head.weight, head.bias, targets.flatten())
        if self.cosine_loss:
            return 1 - F.cosine_similarity(head(features).float(), targets.float(), dim=-1).mean(), None
        return squared_error(head(features), targets), None
