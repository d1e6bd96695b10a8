"""What the decoder is asked to predict at the masked patches.

B batch, N patches, Nm masked, S image side, P = 3 p^2 values of a patch (row, column, channel).
"""

import torch
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images (B, 3, S, S) as patches (B, N, P), row by row; within a patch: row, column, channel."""
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * channels)


class PixelTargets:
    """RGB targets (paper, Table 8), optionally with each patch scaled to mean 0 and variance 1."""

    token_size: int | None = None
    """Pixels of the second view of the crop that `encode` reads; None: the encoder's own view."""

    def __init__(self, patch_size: int, normalize: bool):
        self.patch_size, self.normalize = patch_size, normalize

    def encode(self, images: Tensor, masked_ids: Tensor) -> Tensor:
        """Normalized images (B, 3, S, S) and masked_ids (B, Nm) -> float32 targets (B, Nm, P)."""
        patches = self.masked_patches(images, masked_ids)
        if not self.normalize:
            return patches
        mean, std = self.patch_statistics(patches)
        return (patches - mean) / std

    def decode(self, prediction: Tensor, images: Tensor, masked_ids: Tensor) -> Tensor:
        """Predicted targets (B, Nm, P) as pixels of the normalized image; per-patch statistics are the true ones."""
        if not self.normalize:
            return prediction
        mean, std = self.patch_statistics(self.masked_patches(images, masked_ids))
        return prediction * std + mean

    def masked_patches(self, images: Tensor, masked_ids: Tensor) -> Tensor:
        patches = patchify(images.float(), self.patch_size)  # (B, N, P)
        return patches.gather(1, masked_ids[..., None].expand(-1, -1, patches.shape[-1]))  # (B, Nm, P)

    def patch_statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        return mean, (variance + 1e-6).sqrt()
