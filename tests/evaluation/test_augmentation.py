"""Mixup, CutMix, random erasing and RandAugment: what they do to images and targets."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cae_fast.config import AugmentConfig, UserError
from cae_fast.evaluation import augmentation
from cae_fast.evaluation.augmentation import BatchAugmentation, import_eval, make_rand_augment
from data_files import photograph

CPU, CLASSES = torch.device("cpu"), 7


def augment(images, labels, seed, **settings):
    return BatchAugmentation(AugmentConfig(**settings), CLASSES, len(images), CPU)(images.clone(), labels, seed)


def constant_images(count=8, side=16):
    """Image i is i + 1 everywhere, so that shares of a mix can be read off its pixels."""
    return torch.arange(1.0, count + 1)[:, None, None, None].expand(-1, 3, side, side).clone()


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_targets_are_the_shares_of_the_two_images(timm, settings):
    images, labels = constant_images(), torch.arange(8) % CLASSES
    kinds = set()
    for seed in range(12):
        mixed, targets = augment(images, labels, seed, **settings)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        own = ((mixed.mean((1, 2, 3)) - images.flip(0)[:, 0, 0, 0]) / (images - images.flip(0))[:, 0, 0, 0])[0]
        expected = own * F.one_hot(labels, CLASSES) + (1 - own) * F.one_hot(labels.flip(0), CLASSES)
        torch.testing.assert_close(targets, expected.float(), atol=2e-5, rtol=1e-4)
        pixels = set(mixed[0].unique().tolist())
        kinds.add("cutmix" if pixels <= {1.0, 8.0} else "mixup")
    assert kinds == set(settings)


def test_smoothing_in_the_loss_is_timms_smoothing_of_the_targets(timm):
    from timm.data.mixup import mixup_target

    logits, labels = torch.randn(6, CLASSES), torch.randint(CLASSES, (6,))
    plain = mixup_target(labels, CLASSES, lam=0.3, smoothing=0.0)
    smooth = mixup_target(labels, CLASSES, lam=0.3, smoothing=0.1)
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, plain, label_smoothing=0.1), expected)


def test_a_seed_decides_everything(timm):
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % CLASSES
    settings = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5}
    first, again, other = (augment(images, labels, seed, **settings) for seed in (1, 1, 2))
    assert first[0].equal(again[0])
    assert first[1].equal(again[1])
    assert not first[0].equal(other[0])


def test_random_erasing_puts_noise_into_a_rectangle_of_as_many_images_as_asked(timm):
    images = torch.full((400, 3, 16, 16), 9.0)
    erased, labels = augment(images, torch.zeros(400, dtype=torch.int64), 3, random_erasing=0.25)
    changed = (erased != 9.0).any(1)  # (B, S, S)
    hit = changed.any((1, 2))
    assert 0.18 < hit.float().mean() < 0.32
    for mask in changed[hit]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == len(rows) * len(columns)
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    noise = erased[(erased != 9.0)]
    assert abs(noise.mean()) < 0.1
    assert 0.9 < noise.std() < 1.1
    assert labels.equal(torch.zeros(400, dtype=torch.int64))


def test_without_settings_nothing_changes():
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([1, 2, 3])
    same, targets = augment(images, labels, 0, label_smoothing=0.1)
    assert same.equal(images)
    assert targets.equal(labels)
    assert make_rand_augment("", 224, [0.5] * 3) is None


def test_rand_augment_is_timms_and_can_be_sent_to_a_worker(timm):
    function = make_rand_augment("rand-m9-mstd0.5-inc1", 32, [0.485, 0.456, 0.406])
    image = Image.fromarray(photograph(32, 32))
    results = []
    for each in (function, pickle.loads(pickle.dumps(function))):
        np.random.seed(0)  # noqa: NPY002
        augmentation.random.seed(0)
        results.append([np.asarray(each(image)) for _ in range(10)])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    assert all(result.shape == (32, 32, 3) for result in results[0])
    assert sum(not np.array_equal(result, np.asarray(image)) for result in results[0]) > 4
    assert len(function.ops) == 15
    assert {op.magnitude for op in function.ops} == {9}
    assert {op.magnitude_std for op in function.ops} == {0.5}


@pytest.mark.parametrize("text", ["original", "rand-x9", "m9"])
def test_bad_rand_augment(timm, text):
    with pytest.raises(UserError, match=r"augment.rand_augment is .* write it as rand-m9"):
        make_rand_augment(text, 32, [0.5] * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": -1.0}, "augment.mixup is -1.0"),
        ({"random_erasing": 1.5}, "augment.random_erasing is 1.5"),
        ({"label_smoothing": 2.0}, "augment.label_smoothing is 2.0"),
        ({"cutmix": 1.0}, "the micro-batch has 5 images: mixup and CutMix need an even number"),
    ],
)
def test_bad_settings(timm, settings, message):
    with pytest.raises(UserError, match=message):
        BatchAugmentation(AugmentConfig(**settings), CLASSES, 5, CPU)


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"needs timmm .*pip install 'cae-fast\[eval\]'"):
        import_eval("timmm.data")
