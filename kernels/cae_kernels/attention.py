"""Self-attention on packed queries, keys and values: out = softmax(scale * q k^T) v, per head.

B batch, N tokens, H heads, C head width.
"""

import torch.nn.functional as F
from torch import Tensor


def attention_reference(qkv: Tensor, scale: float) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, C) each
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)  # (B, N, H, C)


def attention(qkv: Tensor, scale: float) -> Tensor:
    """Attention of every token to every token of its image.

    qkv: (B, N, 3, H, C), float; scale: factor on the scores. Returns (B, N, H, C) in qkv's dtype.
    """
    return attention_reference(qkv, scale)
