import math

import pytest
import torch

from cae_fast.config import UserError
from cae_fast.evaluation import knn_probe
from cae_fast.evaluation.knn_probe import extract_features, knn_accuracy


def reference_accuracy(train, train_labels, test, test_labels, k, temperature, num_classes):
    """One query at a time, in Python floats."""
    correct = 0
    for query, truth in zip(test.tolist(), test_labels.tolist(), strict=True):
        similar = []
        for vector, label in zip(train.tolist(), train_labels.tolist(), strict=True):
            dot = math.fsum(a * b for a, b in zip(query, vector, strict=True))
            similar.append((dot / (math.hypot(*query) * math.hypot(*vector)), label))
        votes = [0.0] * num_classes
        for similarity, label in sorted(similar, reverse=True)[:k]:
            votes[label] += math.exp(similarity / temperature)
        correct += max(range(num_classes), key=votes.__getitem__) == truth
    return correct / len(test)


def clusters(count, width, num_classes, generator):
    labels = torch.randint(num_classes, (count,), generator=generator)
    centers = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    features = centers[labels] + 1.6 * torch.randn(count, width, generator=generator)
    return features * torch.rand(count, 1, generator=generator).add(0.1), labels


@pytest.mark.parametrize("k", [1, 5, 20, 150])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_agrees_with_a_brute_force_vote(k, temperature, monkeypatch):
    # 150 training rows make chunks of 7 of the 90 queries: several full ones and a rest.
    monkeypatch.setattr(knn_probe, "SIMILARITIES_AT_ONCE", 7 * 150 + 3)
    generator = torch.Generator().manual_seed(k)
    train, train_labels = clusters(150, 12, 5, generator)
    test, test_labels = clusters(90, 12, 5, generator)
    expected = reference_accuracy(train, train_labels, test, test_labels, k, temperature, 5)
    actual = knn_accuracy(train, train_labels, test, test_labels, k=k, temperature=temperature, num_classes=5)
    assert 0.2 < expected < 1.0
    assert actual == pytest.approx(expected, abs=1e-12)


def test_nearer_neighbours_outvote_more_numerous_ones():
    angles = torch.tensor([0.05, 0.6, 0.6])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[3.0, 0.0]])
    labels, truth = torch.tensor([0, 1, 1]), torch.tensor([0])
    # exp(cos(0.05) / 0.07) is 6.0 times the sum of the two others; at temperature 1 they win.
    assert knn_accuracy(train, labels, query, truth, k=3, num_classes=2) == 1.0
    assert knn_accuracy(train, labels, query, truth, k=3, num_classes=2, temperature=1.0) == 0.0


def test_low_temperature_does_not_overflow():
    generator = torch.Generator().manual_seed(0)
    train, train_labels = clusters(60, 8, 3, generator)
    test, test_labels = clusters(40, 8, 3, generator)
    nearest = knn_accuracy(train, train_labels, test, test_labels, k=1, num_classes=3)
    assert knn_accuracy(train, train_labels, test, test_labels, k=5, num_classes=3, temperature=1e-4) == nearest


def test_bfloat16_features_are_compared_in_float32():
    generator = torch.Generator().manual_seed(1)
    train, train_labels = clusters(100, 16, 4, generator)
    test, test_labels = clusters(50, 16, 4, generator)
    train, test = train.bfloat16(), test.bfloat16()
    expected = reference_accuracy(train, train_labels, test, test_labels, 10, 0.07, 4)
    assert knn_accuracy(train, train_labels, test, test_labels, k=10, num_classes=4) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range_names_the_setting(k):
    features, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(UserError, match=rf"probe\.k={k}.*1 to 3"):
        knn_accuracy(features, labels, features, labels, k=k, num_classes=3)


def test_features_that_are_not_finite_are_refused():
    features, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match="not finite"):
        knn_accuracy(features, labels, features.where(features == 0, torch.nan), labels, k=1, num_classes=3)


def test_extract_features_keeps_order_and_records_no_gradient():
    weight = torch.randn(12, 5, requires_grad=True)
    images = torch.randint(256, (7, 3, 2, 2), dtype=torch.uint8)
    labels = torch.tensor([4, 1, 0, 2, 2, 3, 1], dtype=torch.int32)
    loader = zip(images.split(3), labels.split(3), strict=True)

    def encode(batch):
        assert batch.dtype == torch.uint8
        return (batch.flatten(1).float() @ weight).double()

    features, found = extract_features(encode, loader)
    assert features.dtype == torch.float32
    assert found.dtype == torch.int64
    assert not features.requires_grad
    torch.testing.assert_close(features, images.flatten(1).float() @ weight.detach())
    assert found.tolist() == labels.tolist()


def test_an_empty_loader_is_refused():
    with pytest.raises(UserError, match="no labelled images"):
        extract_features(lambda images: images.flatten(1), [])
