"""Attention by other libraries' kernels, for CAE_KERNELS: one pinned backend of torch's SDPA, or xFormers.

B batch, N queries, M keys, H heads, C head width.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def library_attention(name: str, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v per head by the named library ("xformers" or a key of SDPA).

    query: (B, N, H, C); key, value: (B, M, H, C), the same float type. Returns (B, N, H, C). Raises what the library
    raises for inputs that its kernel does not take (RuntimeError, NotImplementedError), rather than another's result.
    """
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(query, key, value, scale=scale)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, H, n, C) views
    with sdpa_kernel(SDPA[name]):
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
