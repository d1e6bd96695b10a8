"""A frozen vision transformer whose patch features are the targets, with a cosine loss (as in CAE v2, 2211.09799).

B batch, N patches, Nm masked, S image side, D teacher's width.
"""

import json
import logging
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cae_fast.config import UserError
from cae_fast.models.flops import block_flops
from cae_fast.models.vit import VisionTransformer

log = logging.getLogger(__name__)
USUAL_HEAD_WIDTH = 64


class TeacherFeatures:
    """Outputs of a ViT's final norm at the masked patches; bfloat16 on CUDA, float32 elsewhere. It sees all patches."""

    def __init__(self, model: VisionTransformer, device: torch.device | str = "cpu"):
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model, self.output_dim = model.eval().requires_grad_(False).to(device, dtype), model.embed_dim

    def token_size(self, grid: int) -> None:
        """`encode` reads the encoder's own view, none of another size."""

    def encode_flops(self, grid: int, num_masked: int) -> int:
        model, patches = self.model, grid**2
        width = model.embed_dim
        heads = model.blocks[0].attn.num_heads  # type: ignore[union-attr]
        embed = 2 * patches * model.patch_embed.proj.weight.numel()
        return embed + len(model.blocks) * block_flops(patches + 1, width, heads)  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(self, images: Tensor, masked_ids: Tensor) -> Tensor:
        """Normalized images (B, 3, S, S) and masked_ids (B, Nm) -> float32 features (B, Nm, D)."""
        features = self.model(images.to(self.model.norm.weight.dtype))[:, 1:]  # (B, N, D)
        return features.gather(1, masked_ids[..., None].expand(-1, -1, self.output_dim)).float()


def load_teacher(path: str, image_size: int, patch_size: int, device: torch.device | str = "cpu") -> TeacherFeatures:
    """The teacher in an encoder.safetensors of ours or in timm's names, for images of the student's size.

    A plain VisionTransformer with class token and final norm; LayerScale may be absent. Raises UserError where the
    file is something else or has another grid of patches than the student.
    """
    if not Path(path).is_file():
        raise UserError(f"target.tokenizer is {path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("cae_fast", "{}"))
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        state = from_timm(state)
        embed_dim = state["cls_token"].shape[-1]
        depth = sum(name.endswith(".attn.qkv.weight") for name in state)
        grid, patch = math.isqrt(state["pos_embed"].shape[1] - 1), state["patch_embed.proj.weight"].shape[-1]
        model = VisionTransformer(grid * patch, patch, embed_dim, depth, _num_heads(facts, embed_dim, path), 1.0)
        model.load_state_dict(state)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"target.tokenizer is {path}: not a vision transformer in timm's names ({text})") from error
    if (grid * patch, patch) != (image_size, patch_size):
        raise UserError(
            f"target.tokenizer is {path}: its images have {grid * patch} px in patches of {patch}, the model's "
            f"{image_size} in patches of {patch_size}; set model.image_size and model.patch_size to the teacher's"
        )
    return TeacherFeatures(model, device)


def from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of timm's VisionTransformer as our encoder's; its classification head is left out.

    Biases of keys are left out too: softmax does not see what all its logits have in common.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(("head.", "fc_norm.")):
            continue
        if name.endswith("attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            renamed[name.replace("qkv.bias", "q_bias")] = query
            renamed[name.replace("qkv.bias", "v_bias")] = value
        else:
            renamed[re.sub(r"ls([12])\.gamma$", r"gamma_\1", name)] = tensor
    for name in [name for name in renamed if name.endswith("attn.qkv.weight")]:
        for gamma in ("gamma_1", "gamma_2"):
            renamed.setdefault(name.replace("attn.qkv.weight", gamma), torch.ones(renamed["cls_token"].shape[-1]))
    return renamed


def _num_heads(facts: dict, embed_dim: int, path: str) -> int:
    """From the header of a file of ours; shapes do not tell it."""
    if "config" in facts:
        return facts["config"]["model"]["num_heads"]
    if embed_dim % USUAL_HEAD_WIDTH:
        raise UserError(
            f"target.tokenizer is {path}: its header does not say how many heads a width of {embed_dim} has"
        )
    log.info("%s: taken to have heads of width %d, as its header says nothing", path, USUAL_HEAD_WIDTH)
    return embed_dim // USUAL_HEAD_WIDTH
