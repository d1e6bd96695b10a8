"""Encoders in files: a run's encoder.safetensors or model.safetensors, what `cae-fast convert` writes, timm's ViTs.

D width, S image side.
"""

import logging
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cae_fast.config import ModelConfig, UserError
from cae_fast.files import read_weights
from cae_fast.models.cae import SIZES, ModelShape, resolve_model
from cae_fast.models.vit import VisionTransformer
from cae_fast.models.weight_names import encoder_part, to_ours

log = logging.getLogger(__name__)


def load_encoder(path: str | Path, image_size: int | None = None) -> VisionTransformer:
    """The encoder in a safetensors file: float32, on the CPU, in evaluation mode, for images of `image_size` pixels.

    Reads a run's encoder.safetensors or model.safetensors, what `cae-fast convert` writes, and any plain
    VisionTransformer of timm with class token and final norm. `forward_features(images)` maps normalized images
    (B, 3, S, S) to tokens (B, N + 1, D), `get_intermediate_layers` gives those of single blocks. For another image
    size than the file's, positions are interpolated (`resize_positions`). Raises UserError for other files and sizes.
    """
    facts, state = read_weights(Path(path))
    try:
        state = {name: tensor.float() for name, tensor in encoder_part(to_ours(state)[0]).items()}
        shape = header_shape(facts)
        heads = shape.num_heads if shape else usual_heads(path, state["blocks.0.attn.proj.weight"])
        return make_encoder(state, heads, image_size)
    except (KeyError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not a vision transformer in timm's names or ours ({text})") from error


def make_encoder(state: dict[str, Tensor], num_heads: int, image_size: int | None = None) -> VisionTransformer:
    """A VisionTransformer of the tensors' shapes with them in it. KeyError or RuntimeError where they make none."""
    embed_dim, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(state["pos_embed"].shape[1] - 1) * patch
    image_size = side if image_size is None else image_size
    if image_size < patch or image_size % patch:
        raise UserError(f"image_size is {image_size}: set a multiple of the patch size, {patch}")

    model = VisionTransformer(
        image_size=image_size,
        patch_size=patch,
        embed_dim=embed_dim,
        depth=sum(name.endswith(".attn.qkv.weight") for name in state),
        num_heads=num_heads,
        layer_scale_init=1.0,
    )
    if image_size != side:
        state = state | {"pos_embed": resize_positions(state["pos_embed"], image_size // patch)}
    model.load_state_dict(state)
    return model.eval()


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Positions (1, N + 1, D) of a square grid, interpolated to grid x grid patches: (1, grid^2 + 1, D).

    Bicubic as timm's resample_abs_pos_embed; the original interpolates, too, for segmentation. Sin-cos positions as
    well: recomputed on a larger grid they would hold rows and columns that the encoder never saw, interpolated they
    are, within 0.05, the sine and cosine at places between those that it knows.
    """
    old = math.isqrt(pos_embed.shape[1] - 1)
    patches = pos_embed[:, 1:].mT.unflatten(2, (old, old))  # (1, D, old, old)
    resized = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat((pos_embed[:, :1], resized.flatten(2).mT), 1)


def header_shape(facts: dict[str, Any]) -> ModelShape | None:
    """The model that a header of ours describes, None where it describes none."""
    known = {field.name for field in fields(ModelConfig)}
    model = {name: value for name, value in facts.get("config", {}).get("model", {}).items() if name in known}
    return resolve_model(ModelConfig(**model)) if model else None


def usual_heads(path: str | Path, projection: Tensor) -> int:
    """Heads of an attention's proj.weight (D, H C), which shapes do not tell: 64 wide, or 80 in ViT-H's width."""
    width, inner = projection.shape
    head_width = 80 if width == SIZES["huge"].embed_dim else 64
    heads = inner // head_width
    if inner % head_width or heads * (width // heads) != inner:
        raise UserError(
            f"{path}: neither header nor shapes say how many heads of together {inner} a width of {width} has"
        )
    log.info("%s: taken to have %d heads of width %d, as its header says nothing", path, heads, head_width)
    return heads
