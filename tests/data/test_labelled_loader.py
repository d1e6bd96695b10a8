"""Labelled images for evaluation: the plan's random crops to train on, central crops to test on."""

import multiprocessing
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cae_fast.config import UserError
from cae_fast.data.index import build_index
from cae_fast.data.loader import labelled_loader, labelled_train_loader, pretrain_loader
from cae_fast.data.sampling import SamplingPlan
from data_files import encode, photograph

NUM_IMAGES = 30


@pytest.fixture
def index(tmp_path):
    for i in range(NUM_IMAGES):
        folder = tmp_path / "images" / f"class {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02}.png").write_bytes(encode(photograph(20 + i, 45, i), "PNG"))
    return build_index(tmp_path / "images", tmp_path / "x.index", 10_000)


def make_plan(index):
    return SamplingPlan(len(index), index.heights, index.widths, 8, 3, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)


SETTINGS = {
    "image_size": 24,
    "start_step": 0,
    "stop_step": 5,
    "rank": 0,
    "world_size": 1,
    "micro_batch_size": 4,
    "num_workers": 0,
    "pin_memory": False,
}


def load(index, **changes):
    """(images, labels, positions) of all steps."""
    batches = labelled_train_loader(index, make_plan(index), **(SETTINGS | changes))
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def solarize_at_random(image):
    """Draws from all three global generators, as augmentation libraries do."""
    threshold = random.randrange(256)
    shift = int(np.random.randint(20)) + int(torch.randint(20, ()))  # noqa: NPY002
    return ImageOps.solarize(image, threshold).point(lambda value: value + shift)


def test_crops_labels_and_positions_are_the_plans(index):
    images, labels, positions = load(index)
    plan = make_plan(index)
    ids = np.concatenate([plan.draw(step, 0, 8).sample_ids for step in range(5)])
    assert images.shape == (40, 3, 24, 24)
    assert images.dtype == torch.uint8
    assert labels.dtype == positions.dtype == torch.int64
    assert positions.tolist() == list(range(40))
    assert labels.tolist() == [int(index.path(int(i)).parent.name[-1]) for i in ids]
    settings = SETTINGS | {"token_size": None}
    unlabelled = pretrain_loader(index, plan, lambda positions: (positions, positions), **settings)
    assert torch.equal(images, torch.cat([batch.images for batch in unlabelled]))


@pytest.mark.parametrize("augment", [None, solarize_at_random])
def test_workers_processes_and_resuming_change_nothing(index, augment):
    expected = load(index, augment=augment)
    assert_same(load(index, augment=augment), expected)
    assert_same(load(index, augment=augment, num_workers=2), expected)
    assert_same(load(index, augment=augment, start_step=2), [part[16:] for part in expected])
    for world_size, micro_batch_size in ((2, 4), (4, 1)):
        parts = [
            load(index, augment=augment, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
            for rank in range(world_size)
        ]
        together = [
            torch.stack([part.unflatten(0, (5, -1)) for part in same], dim=1).flatten(0, 2)
            for same in zip(*parts, strict=True)
        ]
        assert_same(together, expected)


def test_augmentation_is_seeded_by_the_position_and_leaves_the_global_numbers(index):
    plain, augmented = load(index)[0], load(index, augment=solarize_at_random)[0]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    for position in (0, 7, 23):
        image = Image.fromarray(plain[position].permute(1, 2, 0).numpy())
        seed = make_plan(index).augment_seed(position)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        assert np.array_equal(augmented[position].permute(1, 2, 0), solarize_at_random(image))
    random.setstate(states[0])
    torch.set_rng_state(states[2])
    seeds = [make_plan(index).augment_seed(position) for position in range(1000)]
    assert len(set(seeds)) == 1000
    assert max(seeds) < 2**32
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    load(index, augment=solarize_at_random, stop_step=1)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_substitute_brings_its_own_label(index, caplog):
    plan = make_plan(index)
    for step, image in ((0, 3), (1, 6), (2, 0)):
        index.path(int(plan.draw(step, image, image + 1).sample_ids[0])).write_bytes(b"")
    _, labels, positions = load(index, stop_step=3)
    assert positions.tolist() == list(range(24))
    assert len(caplog.records) >= 3  # a substitute may be one of the three
    batches = pretrain_loader(
        index, plan, lambda positions: (positions, positions), **(SETTINGS | {"token_size": None, "stop_step": 3})
    )
    ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
    assert labels.tolist() == [int(index.path(i).parent.name[-1]) for i in ids]


def test_images_without_a_label_are_a_mistake(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(8):
        (tmp_path / "images" / f"{i}.png").write_bytes(encode(photograph(20, 20), "PNG"))
    index = build_index(tmp_path / "images", tmp_path / "x.index", 10_000)
    with pytest.raises(UserError, match="images without a label"):
        load(index)


def test_no_worker_stays_behind(index):
    batches = labelled_train_loader(index, make_plan(index), **(SETTINGS | {"num_workers": 2, "stop_step": 1000}))
    next(batches)
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("size", "crop_pct", "side"), [(28, 224 / 256, 32), (21, 224 / 256, 24), (28, 1.0, 28)])
def test_evaluation_resizes_and_takes_the_middle(index, size, crop_pct, side):
    images = torch.cat([images for images, _ in labelled_loader(index, size, 7, 0, crop_pct=crop_pct)])
    assert images.shape == (NUM_IMAGES, 3, size, size)
    for i in range(NUM_IMAGES):
        image = Image.open(index.path(i))
        width, height = (int(side * edge / min(image.size)) for edge in image.size)
        rows = image.resize((width, image.height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        middle = rows.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        assert np.abs(images[i].permute(1, 2, 0).numpy() - np.asarray(middle).astype(int)).mean() < 0.05


def test_evaluation_is_torchvisions(index):
    transforms = pytest.importorskip("torchvision.transforms", exc_type=(ImportError, RuntimeError))
    mode = transforms.InterpolationMode.BICUBIC
    transform = transforms.Compose([transforms.Resize(32, mode), transforms.CenterCrop(28)])
    images = torch.cat([images for images, _ in labelled_loader(index, 28, 7, 0, crop_pct=224 / 256)])
    for i in range(NUM_IMAGES):
        expected = np.asarray(transform(Image.open(index.path(i)))).astype(int)
        difference = np.abs(images[i].permute(1, 2, 0).numpy() - expected)
        assert difference.mean() < 0.3
        assert difference.max() <= 2


def test_every_epoch_crops_anew(index):
    images = load(index, stop_step=6)[0].flatten(1).unsqueeze(0)
    assert all(not torch.equal(a, b) for a, b in pairwise(images[0]))
    first, second = images[0, :24], images[0, 24:]
    assert not any(torch.equal(a, b) for a in first for b in second)
