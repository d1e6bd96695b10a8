"""Weighted k-nearest-neighbour classification of frozen features.

Shapes: M training samples, T test samples, D feature width, B batch.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cae_fast.config import UserError

SIMILARITIES_AT_ONCE = 2**26
"""Bounds the similarity matrix to 256 MiB of float32."""


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Features of every image of a loader: float32 (M, D) and int64 labels (M,), both on the features' device.

    `loader` yields (uint8 images, integer labels (B,)); `encode` maps such images to features (B, D) and takes care
    of device, normalization and evaluation mode. Raises UserError when the loader is empty.
    """
    features, labels = [], []
    for images, batch_labels in loader:
        encoded = encode(images).float()  # (B, D)
        features.append(encoded)
        labels.append(batch_labels.to(encoded.device, torch.int64))
    if not features:
        raise UserError("probe: no labelled images found")
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int,
    *,
    num_classes: int,
    temperature: float = 0.07,
) -> float:
    """Share (0..1) of test samples whose class wins the vote of their k most similar training samples.

    The protocol of Wu et al. 2018 (arXiv 1805.01978, section 3.4), also used by DINO: features are L2-normalized and
    a neighbour of cosine similarity s votes for its class with weight exp(s / temperature). Features are (M, D) and
    (T, D) of any float type, labels integers (M,) and (T,) below num_classes, all on one device.
    Raises UserError for a k outside 1..M and ValueError for features that are not finite.
    """
    votes = knn_votes(
        train_features, train_labels, test_features, k, num_classes=num_classes, temperature=temperature
    )  # (T, num_classes)
    return int((votes.argmax(dim=1) == test_labels).sum()) / len(test_features)


@torch.no_grad()
def knn_votes(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int,
    num_classes: int,
    temperature: float = 0.07,
) -> Tensor:
    """The votes of `knn_accuracy`, float32 (T, num_classes), up to a factor for each test sample."""
    samples = len(train_features)
    if not 1 <= k <= samples:
        raise UserError(f"probe.k={k}: give a number from 1 to {samples}, the number of training images")
    if not (train_features.isfinite().all() and test_features.isfinite().all()):
        raise ValueError("k-NN probe: the features are not finite")

    train = F.normalize(train_features.float(), dim=1)  # (M, D)
    test = F.normalize(test_features.float(), dim=1)  # (T, D)
    votes = train.new_zeros(len(test), num_classes)  # (T, num_classes)
    rows = max(SIMILARITIES_AT_ONCE // samples, 1)
    for queries, part in zip(test.split(rows), votes.split(rows), strict=True):
        similarity, neighbours = (queries @ train.T).topk(k, dim=1)  # (B, k)
        # Relative to the nearest neighbour: the same winner, and no overflow at a low temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        part.scatter_add_(1, train_labels[neighbours], weights)
    return votes
