import gc
import multiprocessing
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from cae_fast.config import UserError
from cae_fast.data import batches as loader_module
from cae_fast.data.batches import Batch
from cae_fast.data.index import build_index
from cae_fast.data.loader import labelled_loader, pretrain_loader, resolve_num_workers
from cae_fast.data.sampling import SamplingPlan

NUM_IMAGES = 30


def half_mask(positions):
    """A stand-in for block masks: 5 of 9 patches, chosen by the position alone."""
    scores = torch.sin(positions[:, None].double() * 12.9898 + torch.arange(9) * 78.233)
    order = scores.argsort(dim=1)
    return order[:, 5:].sort(dim=1).values, order[:, :5].sort(dim=1).values


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photograph, encode):
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        height, width = random.integers(20, 60, 2)
        format = ("JPEG", "PNG", "BMP")[i % 3]
        (root / f"class {i % 2}").mkdir(exist_ok=True)
        (root / f"class {i % 2}" / f"{i:02}.jpg").write_bytes(encode(photograph(height, width, i), format))
    return root


@pytest.fixture(scope="module")
def index(folder, tmp_path_factory):
    return build_index(folder, tmp_path_factory.mktemp("indexes") / "x.index", 10_000)


@pytest.fixture
def own_index(tmp_path, photograph, encode):
    """An index whose files a test may damage."""
    (tmp_path / "images").mkdir()
    for i in range(NUM_IMAGES):
        (tmp_path / "images" / f"{i:02}.png").write_bytes(encode(photograph(20 + i, 30, i), "PNG"))
    return build_index(tmp_path / "images", tmp_path / "x.index", 10_000)


def make_plan(index, batch=8, seed=3):
    return SamplingPlan(len(index), index.heights, index.widths, batch, seed, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)


def load(index, plan=None, **changes):
    settings = {
        "image_size": 24,
        "token_size": 12,
        "start_step": 0,
        "stop_step": 5,
        "rank": 0,
        "world_size": 1,
        "micro_batch_size": 4,
        "num_workers": 0,
        "pin_memory": False,
    }
    return pretrain_loader(index, plan or make_plan(index), half_mask, **(settings | changes))


TENSORS = ("images", "token_images", "visible_ids", "masked_ids", "positions", "sample_ids")


def join(batches):
    """All tensors of some batches, one after the other, by name."""
    batches = list(batches)
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS}


def assert_same(a, b):
    for name in TENSORS:
        assert torch.equal(a[name], b[name]), name


def worker_processes():
    gc.collect()
    return multiprocessing.active_children()


def test_shapes_and_dtypes(index):
    batches = list(load(index))
    assert len(batches) == 10
    for batch in batches:
        assert batch.images.shape == (4, 3, 24, 24)
        assert batch.token_images.shape == (4, 3, 12, 12)
        assert batch.images.dtype == batch.token_images.dtype == torch.uint8
        assert batch.visible_ids.shape == (4, 4)
        assert batch.masked_ids.shape == (4, 5)
        assert batch.positions.dtype == batch.sample_ids.dtype == batch.visible_ids.dtype == torch.int64
        assert batch.replaced == []
    assert torch.equal(join(batches)["positions"], torch.arange(40))
    assert next(load(index, token_size=None)).token_images is None


def test_pixels_are_pillows_of_the_planned_crops(index):
    plan = make_plan(index)
    joined = join(load(index, plan))
    drawn = [plan.draw(step, 0, 8) for step in range(5)]
    ids = np.concatenate([sample.sample_ids for sample in drawn])
    boxes = np.concatenate([sample.boxes for sample in drawn])
    flips = np.concatenate([sample.flips for sample in drawn])
    assert np.array_equal(joined["sample_ids"], ids)
    assert flips.any()
    views = (("images", 24, Image.Resampling.BICUBIC), ("token_images", 12, Image.Resampling.LANCZOS))
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        image = Image.open(index.path(int(ids[i]))).convert("RGB").crop((left, top, left + width, top + height))
        for name, size, filter in views:
            view = image.resize((size, height), filter).resize((size, size), filter)
            if flips[i]:
                view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            difference = np.asarray(view).astype(int) - joined[name][i].permute(1, 2, 0).numpy()
            assert np.abs(difference).mean() < 0.05


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(index, num_workers):
    assert_same(join(load(index, num_workers=num_workers)), join(load(index)))


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (1, 1), (2, 4), (2, 2), (4, 2), (4, 1), (8, 1)])
def test_processes_and_micro_batches_change_nothing(index, world_size, micro_batch_size):
    expected = join(load(index))
    parts = [
        join(load(index, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size))
        for rank in range(world_size)
    ]
    share = 8 // world_size
    together = {  # (step, rank, image) to one row per global position
        name: torch.stack([part[name].unflatten(0, (5, share)) for part in parts], dim=1).flatten(0, 2)
        for name in TENSORS
    }
    assert_same(together, expected)


@pytest.mark.parametrize("start", [1, 3, 4])
def test_resume_in_the_middle_of_an_epoch(index, start):
    # 30 images, 8 per step: 3 steps per epoch, so steps 0..4 cross its end.
    expected = join(load(index))
    resumed = join(load(index, start_step=start, num_workers=1))
    assert_same(resumed, {name: values[start * 8 :] for name, values in expected.items()})


def test_seeds_and_epochs_differ(index):
    first = join(load(index, stop_step=3))
    assert not torch.equal(first["images"], join(load(index, make_plan(index, seed=4), stop_step=3))["images"])
    assert not torch.equal(first["images"], join(load(index, start_step=3, stop_step=6))["images"])


def test_the_global_random_numbers_stay(index):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(load(index, num_workers=1, stop_step=1))
    list(load(index, stop_step=1))
    list(labelled_loader(index, 28, 8, 0))
    list(labelled_loader(index, 28, 8, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["truncated", "gone", "another size", "html"])
def test_a_file_that_fails_later_is_replaced(own_index, damage, photograph, encode, caplog):
    plan = make_plan(own_index)
    bad = int(plan.draw(1, 5, 6).sample_ids[0])
    before = join(load(own_index, stop_step=3))
    path = own_index.path(bad)
    content = path.read_bytes()
    damaged = {"truncated": content[:-200], "another size": encode(photograph(7, 7), "PNG"), "html": b"<html>"}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    runs = []
    for num_workers in (0, 2):
        caplog.clear()
        batches = list(load(own_index, stop_step=3, num_workers=num_workers))
        replaced = [entry for batch in batches for entry in batch.replaced]
        assert [(position, name) for position, name, _ in replaced] == [(13, str(path))]
        assert replaced[0][2]
        assert "\n" not in replaced[0][2]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert str(path) in caplog.text
        runs.append(join(batches))
    assert_same(*runs)
    substitute = plan.replacement(13, 1)
    assert runs[0]["sample_ids"][13] == substitute != bad
    top, left, height, width = plan.boxes(np.array([13]), np.array([substitute]))[0].tolist()
    image = Image.open(own_index.path(substitute)).crop((left, top, left + width, top + height))
    view = image.resize((24, height), Image.Resampling.BICUBIC).resize((24, 24), Image.Resampling.BICUBIC)
    if plan.draw(1, 5, 6).flips[0]:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.abs(np.asarray(view).astype(int) - runs[0]["images"][13].permute(1, 2, 0).numpy()).mean() < 0.05
    for name in TENSORS:  # all other images are as before
        kept = torch.arange(24) != 13
        assert torch.equal(runs[0][name][kept], before[name][kept])
        assert name in ("images", "token_images", "sample_ids") or torch.equal(runs[0][name], before[name])


def test_substitutes_that_fail_are_replaced_too(own_index):
    plan = make_plan(own_index)
    bad = [int(plan.draw(0, 2, 3).sample_ids[0]), plan.replacement(2, 1), plan.replacement(2, 2)]
    for sample_id in bad:
        own_index.path(sample_id).write_bytes(b"")
    batch = next(load(own_index, plan, micro_batch_size=8))
    mine = [path for position, path, _ in batch.replaced if position == 2]
    assert mine == [str(own_index.path(sample_id)) for sample_id in bad]
    assert batch.sample_ids[2] == plan.replacement(2, 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_files_end_the_run(own_index, num_workers):
    for i in range(NUM_IMAGES):
        own_index.path(i).write_bytes(b"")
    with pytest.raises(UserError, match="17 files in a row cannot be used") as error:
        list(load(own_index, num_workers=num_workers))
    plan = make_plan(own_index)
    for sample_id in [int(plan.draw(0, 0, 1).sample_ids[0]), plan.replacement(0, 1), plan.replacement(0, 16)]:
        assert str(own_index.path(sample_id)) in str(error.value)
    assert "\n" not in str(error.value)
    del error
    assert worker_processes() == []


def test_no_worker_stays_behind(index):
    finished = load(index, num_workers=2)
    list(finished)
    assert worker_processes() == []

    closed = load(index, num_workers=2, stop_step=1000)
    next(closed)
    assert len(worker_processes()) == 2
    closed.close()
    assert worker_processes() == []

    abandoned = load(index, num_workers=2, stop_step=1000)
    next(abandoned)
    del abandoned
    assert worker_processes() == []

    labelled = labelled_loader(index, 28, 4, 2)
    next(labelled)
    labelled.close()
    assert worker_processes() == []


def test_no_worker_stays_behind_an_error_that_someone_keeps(index, monkeypatch):
    def failing(*arguments):
        raise RuntimeError("deliberate")

    monkeypatch.setattr(loader_module, "resized_crop", failing)
    with pytest.raises(RuntimeError, match="deliberate") as kept:
        list(load(index, num_workers=1))
    assert worker_processes() == []
    assert kept.value is not None


def test_workers_ignore_interruptions_by_others(index):
    batches = load(index, num_workers=2, stop_step=20)
    received = [next(batches)]
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    assert len(workers) == 2
    for name in ("-INT", "-TERM"):
        subprocess.run(["kill", name, *workers], check=True)
    received.extend(batches)
    assert_same(join(received), join(load(index, stop_step=20)))
    assert worker_processes() == []


def test_workers_end_when_the_main_process_says_so(index):
    # Otherwise an interpreter that exits with a loader still open would wait for ever.
    batches = load(index, num_workers=2, stop_step=1000)
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=20)
        assert worker.exitcode == 0
    batches.close()


def test_the_data_set_pickles_without_its_arrays(index):
    plan = make_plan(index)
    dataset = loader_module.PlannedImages(index, plan, half_mask, 24, 12, "cpu", None)
    content = pickle.dumps(dataset)
    assert len(content) < 2000
    assert len(plan.heights) == NUM_IMAGES
    copy = pickle.loads(content)
    assert_same(join([copy[3, 2, 6]]), join([dataset[3, 2, 6]]))


@pytest.mark.parametrize(
    "settings",
    [{"world_size": 3}, {"micro_batch_size": 3}, {"micro_batch_size": 0}, {"world_size": 4, "micro_batch_size": 4}],
)
def test_sizes_that_do_not_divide(index, settings):
    with pytest.raises(UserError, match=r"train\.global_batch_size=8: must be a multiple"):
        load(index, **settings)


def test_a_plan_of_another_index(index, own_index):
    plan = SamplingPlan(5, own_index.heights[:5], own_index.widths[:5], 4, 0, (0.2, 1.0), (0.75, 1.33), 0.5)
    with pytest.raises(ValueError, match="5 images, the index 30"):
        load(index, plan)


def test_batch_to_a_device(index):
    batch = next(load(index))
    moved = batch.to("meta")
    for name in TENSORS:
        assert getattr(moved, name).device.type == "meta"
        assert getattr(batch, name).device.type == "cpu"
    assert moved.replaced == batch.replaced
    without = next(load(index, token_size=None)).to("cpu")
    assert isinstance(without, Batch)
    assert without.token_images is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: memory is pinned for one")
@pytest.mark.gpu
def test_pinned_batches(index):
    for num_workers in (0, 1):
        pinned = list(load(index, pin_memory=True, num_workers=num_workers))
        assert all(getattr(batch, name).is_pinned() for batch in pinned for name in TENSORS)
        assert_same(join(pinned), join(load(index)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labelled_images_come_in_order(index, num_workers):
    batches = list(labelled_loader(index, 28, 7, num_workers))
    assert [len(labels) for _, labels in batches] == [7, 7, 7, 7, 2]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.shape == (NUM_IMAGES, 3, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert np.array_equal(labels, index.labels)
    for i in (0, 11, 29):
        image = Image.open(index.path(i)).convert("RGB")
        short = min(image.size)
        width, height = (28 * side // short for side in image.size)
        resized = image.resize((width, image.height), Image.Resampling.BICUBIC)
        resized = resized.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - 28) / 2), round((height - 28) / 2)
        expected = np.asarray(resized.crop((left, top, left + 28, top + 28))).astype(int)
        assert np.abs(images[i].permute(1, 2, 0).numpy() - expected).mean() < 0.05


def test_a_labelled_file_that_fails_is_left_out(own_index, caplog):
    own_index.path(3).write_bytes(b"")
    for i in range(8, 12):
        own_index.path(i).unlink()
    batches = list(labelled_loader(own_index, 28, 4, 0))
    assert [len(labels) for _, labels in batches] == [3, 4, 0, 4, 4, 4, 4, 2]
    assert batches[2][0].shape == (0, 3, 28, 28)
    assert len(caplog.records) == 5
    assert str(own_index.path(3)) in caplog.text


def test_number_of_workers(monkeypatch):
    for cores, world_size, expected in ((1, 1, 0), (2, 1, 1), (16, 1, 12), (16, 2, 7), (64, 8, 7), (4, 8, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        assert resolve_num_workers(None, world_size) == expected
    assert resolve_num_workers(0, 1) == 0
    assert resolve_num_workers(30, 8) == 30
    with pytest.raises(UserError, match=r"data\.num_workers=-1"):
        resolve_num_workers(-1, 1)
