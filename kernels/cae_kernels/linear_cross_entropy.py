"""Prediction head and its loss: logits = x W^T + b, loss = mean(-log softmax(logits)[target]) in float32.

M rows, D width, V codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight, bias).float()  # (M, V)
    loss = F.cross_entropy(logits, target, ignore_index=ignore_index)
    with torch.no_grad():
        counted = target != ignore_index
        accuracy = (logits.argmax(-1) == target).sum() / counted.sum()
    return loss, accuracy


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the rows whose target is not `ignore_index`, and the share of them predicted right.

    x: (M, D); weight: (V, D); bias: (V,); target: (M,) int64. Returns two float32 scalars; accuracy has no gradient.
    """
    return linear_cross_entropy_reference(x, weight, bias, target, ignore_index)
