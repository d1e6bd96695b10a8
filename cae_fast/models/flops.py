"""Floating-point operations of a training step per image: matrix products only, 2 per multiply-add.

N patches, Nv visible, Nm masked, D encoder width, R decoder width, n tokens.
"""

from cae_fast.models.cae import ContextAutoencoder


def block_flops(tokens: int, width: int, heads: int) -> int:
    """Forward pass of one self-attention block: 24 n D^2 + 4 n^2 D where heads fill the width."""
    inner = width // heads * heads
    return 2 * tokens * (3 * width * inner + inner * width + 8 * width**2) + 4 * tokens**2 * inner


def forward_flops(model: ContextAutoencoder, num_masked: int) -> dict[str, int]:
    """Forward pass of each part for one image, by the names of the paper's parts."""
    shape, grid = model.shape, model.encoder.grid
    width, heads = shape.decoder_embed_dim, shape.decoder_num_heads
    patches, visible = grid**2, grid**2 - num_masked
    inner = width // heads * heads
    projection = 2 * shape.embed_dim * width if width != shape.embed_dim else 0
    regressor = (
        2 * num_masked * (2 * width * inner + 8 * width**2)
        + 2 * patches * 2 * width * inner
        + 4 * num_masked * patches * inner
    )
    return {
        "patch_embed": 2 * patches * 3 * shape.patch_size**2 * shape.embed_dim,
        "encoder": shape.depth * block_flops(visible + 1, shape.embed_dim, shape.num_heads),
        "alignment": shape.depth * block_flops(num_masked + 1, shape.embed_dim, shape.num_heads),
        "proj_vis": (visible + 1) * projection,
        "proj_tgt": num_masked * projection,
        "regressor": shape.regressor_depth * regressor,
        "decoder": shape.decoder_depth * block_flops(num_masked, width, heads),
        "head": 2 * num_masked * width * model.decoder.head.out_features,
    }


def pretraining_flops(model: ContextAutoencoder, num_masked: int) -> int:
    """Forward and backward for one image; the patch embedding needs no input gradient, the targets no gradient."""
    parts = forward_flops(model, num_masked)
    once = 0
    if model.alignment_weight > 0:
        once = parts["alignment"] + parts["proj_tgt"]
    twice = 2 * parts["patch_embed"]
    return once + twice + 3 * sum(parts[k] for k in ("encoder", "proj_vis", "regressor", "decoder", "head"))
