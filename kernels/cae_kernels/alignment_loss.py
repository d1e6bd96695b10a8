"""Mean squared error in float32: of predicted latents to the encoder's latents, and of predicted pixels to pixels.

B batch, Nm masked, D width.
"""

import torch.nn.functional as F
from torch import Tensor


def alignment_loss_reference(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction.float(), target.float())


def alignment_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of (prediction - target)^2 over everything (paper, section 3.2: the alignment loss).

    prediction, target: (B, Nm, D); target carries no gradient. Returns a float32 scalar.
    """
    return alignment_loss_reference(prediction, target.detach())
