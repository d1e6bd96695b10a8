"""The tiny CAE of the golden files: our model with the original's parameters in it."""

import re

import torch

from cae_fast.config import ModelConfig
from cae_fast.models.cae import ContextAutoencoder

TINY = ModelConfig(
    size="tiny",
    image_size=96,
    patch_size=16,
    embed_dim=64,
    depth=2,
    num_heads=4,
    regressor_depth=2,
    decoder_depth=2,
    layer_scale_init=0.1,
    drop_path_rate=0.0,
)
NUM_CODES = 128
RENAMED = [
    (r"^rd_pos_embed$", "regressor_pos_embed"),
    (r"^regresser\.regressor_blocks\.", "regressor.blocks."),
    (r"^regresser\.", "regressor."),
    (r"^decoder\.decoder_blocks\.", "decoder.blocks."),
    (r"^encoder_to_regresser", "encoder_to_regressor"),
    (r"gamma_([12])_cross", r"gamma_\1"),
    (r"norm1_([qkv])\.", r"norm_\1."),
    (r"norm2_cross", "norm2"),
    (r"cross_attn", "attn"),
    (r"mlp_cross", "mlp"),
]


def our_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def ours(tensors: dict, prefix: str) -> dict[str, torch.Tensor]:
    """Tensors under `prefix` by our names, without the original's copy of the encoder."""
    chosen = {our_name(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}
    return {k: v for k, v in chosen.items() if not k.startswith("alignment_encoder.")}


def golden_model(tensors: dict) -> ContextAutoencoder:
    model = ContextAutoencoder(TINY, NUM_CODES, predict_codes=True)
    report = model.load_state_dict(ours(tensors, "param."), strict=False)
    assert set(report.missing_keys) == {"encoder.pos_embed", "regressor_pos_embed"}
    assert not report.unexpected_keys
    return model


def split_mask(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boolean mask (B, N), True = masked, as visible_ids and masked_ids."""
    order = torch.argsort(mask.to(torch.uint8), dim=1, stable=True)
    visible = int((~mask[0]).sum())
    return order[:, :visible], order[:, visible:]
