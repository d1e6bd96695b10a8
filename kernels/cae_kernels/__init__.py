"""Fused ops of the context autoencoder; every op has a plain torch reference beside it."""

from .adamw import adamw, adamw_state
from .attention import attention
from .bias_relu import bias_relu, bias_residual_relu, conv2d_and_bias
from .block_mask import block_mask
from .cross_attention import cross_attention
from .drop_path import drop_path_scales
from .gather_tokens import gather_tokens
from .linear_argmax import linear_argmax
from .linear_cross_entropy import linear_cross_entropy
from .linear_gelu import linear_gelu
from .qkv_norm import QKV, norm_qkv, residual_norm_qkv
from .random_mask import random_mask
from .residual_norm import layer_norm, residual_norm
from .squared_error import squared_error

__all__ = [
    "QKV",
    "adamw",
    "adamw_state",
    "attention",
    "bias_relu",
    "bias_residual_relu",
    "block_mask",
    "conv2d_and_bias",
    "cross_attention",
    "drop_path_scales",
    "gather_tokens",
    "layer_norm",
    "linear_argmax",
    "linear_cross_entropy",
    "linear_gelu",
    "norm_qkv",
    "random_mask",
    "residual_norm",
    "residual_norm_qkv",
    "squared_error",
]
