"""First half of an MLP: gelu(x W^T + b), exact (erf) GELU.

B batch, n tokens, D width, F hidden width.
"""

import torch.nn.functional as F
from torch import Tensor


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: (B, n, D); weight: (F, D); bias: (F,). Returns (B, n, F) in x's dtype."""
    return linear_gelu_reference(x, weight, bias)
