"""How a tokenizer makes codes of features: Gumbel-softmax (the paper's), finite scalar or vector quantization.

Each quantizer takes float32 inputs (B, N, in_dim) and gives vectors (B, N, code_dim) for the decoder. In training it
may draw from torch's global generators: seed them before a step to make the step repeatable.

B batch, N positions, V codes, E = code_dim.
"""

import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.config import UserError

VQ_DECAY = 0.95
VQ_DEAD_SIZE = 0.02
"""A code whose running count falls below this (used once, then not in 18 batches) restarts at a vector of the batch."""


class Quantized(NamedTuple):
    """Of one batch; the three terms are float32 scalars."""

    vectors: Tensor
    """What the decoder sees, float32 (B, N, E)."""
    codes: Tensor
    """int64 (B, N)."""
    kl: Tensor
    """Mean over positions of KL(q || uniform) in nats; 0 where a position has one code only."""
    diversity: Tensor
    """KL of the batch's mean q from uniform in nats, 0 when all codes are equally likely."""
    commitment: Tensor
    """Weighted distance between inputs and their codes (vq)."""


def uniform_kl(log_q: Tensor) -> Tensor:
    """KL(q || uniform) = ln V - H(q) in nats of log-probabilities (..., V) -> (...)."""
    return math.log(log_q.shape[-1]) + (log_q.exp() * log_q).sum(-1)


def perplexity(counts: Tensor) -> Tensor:
    """exp(H) of code counts (V,): the number of codes that, equally used, would have the same entropy."""
    share = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp()


class GumbelQuantizer(nn.Module):
    """Mixture of codebook vectors with Gumbel-softmax weights (arXiv 2102.12092, section 2.1); inputs are logits."""

    def __init__(self, num_codes: int, code_dim: int, straight_through: bool):
        super().__init__()
        self.in_dim, self.code_dim, self.straight_through = num_codes, code_dim, straight_through
        self.codebook = nn.Parameter(torch.randn(num_codes, code_dim))  # (V, E)

    def forward(self, logits: Tensor, temperature: float) -> Quantized:
        log_q = logits.log_softmax(-1)  # (B, N, V)
        weights = F.gumbel_softmax(logits, temperature, hard=self.straight_through)  # (B, N, V)
        vectors = (weights.to(self.codebook.dtype) @ self.codebook).float()  # (B, N, E)
        mean_q = log_q.exp().flatten(0, -2).mean(0)  # (V,)
        diversity = math.log(len(mean_q)) - torch.special.entr(mean_q).sum()
        return Quantized(
            vectors=vectors,
            codes=logits.argmax(-1),
            kl=uniform_kl(log_q).mean(),
            diversity=diversity,
            commitment=logits.new_zeros(()),
        )

    def codes(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.codebook[codes].float()


class FiniteScalarQuantizer(nn.Module):
    """Every coordinate is rounded to one of a few levels (FSQ, arXiv 2309.15505); there is no codebook to collapse."""

    def __init__(self, levels: list[int]):
        super().__init__()
        self.library = vector_quantize_library("fsq").FSQ(levels)
        self.in_dim = self.code_dim = len(levels)

    def forward(self, inputs: Tensor, temperature: float) -> Quantized:
        vectors, codes = self.library(inputs)  # (B, N, E), int32 (B, N)
        zero = inputs.new_zeros(())
        return Quantized(vectors=vectors, codes=codes.long(), kl=zero, diversity=zero, commitment=zero)

    def codes(self, inputs: Tensor) -> Tensor:
        return self.library(inputs)[1].long()

    def vectors(self, codes: Tensor) -> Tensor:
        return self.library.indices_to_codes(codes.flatten(1)).float().view(*codes.shape, self.code_dim)


class VectorQuantizer(nn.Module):
    """Nearest vector of a codebook of running means that starts with k-means (VQ-VAE, arXiv 1711.00937).

    The library's update waits for the device in training, unlike everything else in a step.
    """

    def __init__(self, num_codes: int, code_dim: int, commitment_weight: float):
        super().__init__()
        self.library = vector_quantize_library("vq").VectorQuantize(
            dim=code_dim,
            codebook_size=num_codes,
            kmeans_init=True,
            decay=VQ_DECAY,
            threshold_ema_dead_code=VQ_DEAD_SIZE,
            commitment_weight=commitment_weight,
        )
        self.in_dim = self.code_dim = code_dim

    def forward(self, inputs: Tensor, temperature: float) -> Quantized:
        vectors, codes, commitment = self.library(inputs)
        zero = inputs.new_zeros(())
        return Quantized(vectors=vectors, codes=codes.long(), kl=zero, diversity=zero, commitment=commitment.sum())

    def codes(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(0, -2)  # (B * N, E)
        book = self.library.codebook.float()  # (V, E)
        # In parts: all distances of a large batch to 8192 codes would fill gigabytes.
        nearest = [torch.cdist(part, book).argmin(-1) for part in rows.split(4096)]
        return torch.cat(nearest).view(inputs.shape[:-1])

    def vectors(self, codes: Tensor) -> Tensor:
        return self.library.codebook[codes].float()


Quantizer = GumbelQuantizer | FiniteScalarQuantizer | VectorQuantizer


def vector_quantize_library(quantizer: str) -> ModuleType:
    """Not imported at the top of the file: it is an optional package and takes seconds."""
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise UserError(
            f"tokenizer.quantizer is {quantizer}: needs the vector-quantize-pytorch package: "
            "pip install 'cae-fast[tokenizer]'"
        ) from error
    return vector_quantize_pytorch
