"""Token sequences of the visible and of the masked patches: [class token ; chosen patches] + positions.

B batch, N patches, Nv visible, Nm masked, D width.
"""

import torch
from torch import Tensor


def gather_reference(patches: Tensor, ids: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
    batch, _, width = patches.shape
    chosen = patches.gather(1, ids[..., None].expand(-1, -1, width)) + pos_embed[1:][ids]  # (B, n, D)
    first = (cls_token + pos_embed[:1]).expand(batch, 1, width)  # (B, 1, D)
    return torch.cat((first.to(chosen.dtype), chosen), 1)


def gather_tokens(
    patches: Tensor, visible_ids: Tensor, masked_ids: Tensor | None, cls_token: Tensor, pos_embed: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Inputs of the encoder's two passes; the masked one carries no gradient (it only makes alignment targets).

    patches: (B, N, D) patch embeddings; visible_ids (B, Nv), masked_ids (B, Nm) or None: int64, unique in a row;
    cls_token: (1, 1, D); pos_embed: (N + 1, D), the class token's row first.
    Returns (B, Nv + 1, D) and (B, Nm + 1, D) or None.
    """
    visible = gather_reference(patches, visible_ids, cls_token, pos_embed)
    if masked_ids is None:
        return visible, None
    with torch.no_grad():
        masked = gather_reference(patches, masked_ids, cls_token, pos_embed)
    return visible, masked
