"""Codes at the masked positions only, from a tokenizer's last features.

B batch, C channels, G side of the grid, N = G^2 positions, Nm masked, V codes.
"""

import torch
from torch import Tensor

from cae_kernels import linear_argmax


def masked_codes(features: Tensor, weight: Tensor, bias: Tensor, masked_ids: Tensor) -> Tensor:
    """Codes of a 1x1 convolution with `weight` (V, C), `bias` (V,) on features (B, C, G, G) at masked_ids (B, Nm) only.

    Returns int64 (B, Nm); of equal logits the first code. Positions are counted row by row.
    """
    batch, channels, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).reshape(-1, channels)  # (B * N, C), no copy in channels_last
    starts = torch.arange(batch, device=masked_ids.device)[:, None] * (height * width)  # (B, 1)
    return linear_argmax(rows, weight, bias, (masked_ids + starts).flatten()).view(masked_ids.shape)
