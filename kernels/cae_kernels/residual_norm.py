"""Residual update and the LayerNorms that read it: x' = x + keep * gamma * branch, then LN(x') or LN(x' + position).

B batch, n tokens, N patches, D width.
`keep` is drop path's per-sample factor: 0 or 1 / (1 - rate). Statistics are float32 whatever the inputs are.
"""

import torch.nn.functional as F
from torch import Tensor

Norm = tuple[Tensor, Tensor]  # weight (D,), bias (D,)
QKV = tuple[Tensor | None, Tensor, Tensor]  # inputs of the query, key and value projections, each (B, n, D)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def residual_reference(x: Tensor, branch: Tensor, gamma: Tensor, keep: Tensor | None) -> Tensor:
    scaled = gamma * branch  # (B, n, D)
    return x + (scaled if keep is None else scaled * keep.to(x.dtype)[:, None, None])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension. x: (B, n, D); weight, bias: (D,). Returns (B, n, D)."""
    return layer_norm_reference(x, weight, bias, eps)


def residual_norm(
    x: Tensor, branch: Tensor, gamma: Tensor, keep: Tensor | None, norm: Norm, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a scaled branch to the residual stream and normalize the sum.

    x, branch: (B, n, D); gamma: LayerScale (D,); keep: (B,) float32 or None; norm: weight and bias (D,).
    Returns the new residual stream and its LayerNorm, both (B, n, D).
    """
    x = residual_reference(x, branch, gamma, keep)
    return x, layer_norm_reference(x, *norm, eps)


def norm_qkv(
    x: Tensor, pos_embed: Tensor, ids: Tensor, norm_q: Norm | None, norm_k: Norm, norm_v: Norm, eps: float
) -> QKV:
    """The regressor's input norms: of x + position for queries and keys, of x for values.

    x: (B, n, D); pos_embed: (N, D) table; ids: (B, n) rows of it; norm_q: None where no queries are made.
    Returns inputs of the query, key and value projections, each (B, n, D).
    """
    positioned = x + pos_embed[ids]  # (B, n, D)
    query = None if norm_q is None else layer_norm_reference(positioned, *norm_q, eps)
    return query, layer_norm_reference(positioned, *norm_k, eps), layer_norm_reference(x, *norm_v, eps)


def residual_norm_qkv(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor,
    keep: Tensor | None,
    pos_embed: Tensor,
    ids: Tensor,
    norm_q: Norm,
    norm_k: Norm,
    norm_v: Norm,
    eps: float,
) -> tuple[Tensor, QKV]:
    """`residual_norm`'s update followed by `norm_qkv`'s three norms of the new residual stream.

    Shapes as there. Returns the new residual stream (B, n, D) and the three norms.
    """
    x = residual_reference(x, branch, gamma, keep)
    return x, norm_qkv(x, pos_embed, ids, norm_q, norm_k, norm_v, eps)
