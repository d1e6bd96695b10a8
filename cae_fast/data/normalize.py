"""Normalization on the device: images travel as bytes, a quarter of the traffic of float32.

B batch, S image side.
"""

import torch
from torch import Tensor

from cae_fast.config import UserError


class Normalize:
    """(x / 255 - mean) / std per channel, with its constants kept on the device."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device):
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise UserError(f"data.mean is {mean} and data.std {std}: three numbers each, std above 0")
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) to float32."""
        return (images.float() / 255 - self.mean) / self.std

    def invert(self, images: Tensor) -> Tensor:
        """Normalized float32 (B, 3, S, S) back to [0, 1]."""
        return (images * self.std + self.mean).clamp(0, 1)
