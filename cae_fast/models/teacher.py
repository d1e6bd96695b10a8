"""A frozen vision transformer whose patch features are the targets, with a cosine loss (as in CAE v2, 2211.09799).

B batch, N patches, Nm masked, S image side, D teacher's width.
"""

import torch
from torch import Tensor

from cae_fast.config import UserError
from cae_fast.models.encoder import load_encoder
from cae_fast.models.flops import block_flops
from cae_fast.models.vit import VisionTransformer


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
        embed = 2 * patches * model.patch_embed.proj.weight.numel()
        return embed + len(model.blocks) * block_flops(patches + 1, width, model.num_heads)

    @torch.no_grad()
    def encode(self, images: Tensor, masked_ids: Tensor) -> Tensor:
        """Normalized images (B, 3, S, S) and masked_ids (B, Nm) -> float32 features (B, Nm, D)."""
        features = self.model(images.to(self.model.norm.weight.dtype))[:, 1:]  # (B, N, D)
        return features.gather(1, masked_ids[..., None].expand(-1, -1, self.output_dim)).float()


def load_teacher(path: str, image_size: int, patch_size: int, device: torch.device | str = "cpu") -> TeacherFeatures:
    """The teacher in a file that `load_encoder` reads, for images of the student's size.

    Raises UserError where the file is something else or has another grid of patches than the student.
    """
    try:
        model = load_encoder(path)
    except UserError as error:
        raise UserError(f"target.tokenizer is {error}") from error
    patch = model.patch_embed.patch_size
    side = model.grid * patch
    if (side, patch) != (image_size, patch_size):
        raise UserError(
            f"target.tokenizer is {path}: its images have {side} px in patches of {patch}, the model's "
            f"{image_size} in patches of {patch_size}; set model.image_size and model.patch_size to the teacher's"
        )
    return TeacherFeatures(model, device)
