"""Every kind of odd and bad file in one folder, through the index and the loaders of both CPU decoders."""

import numpy as np
import pytest
import torch
from PIL import Image

from cae_fast.data.index import build_index
from cae_fast.data.loader import labelled_loader, pretrain_loader
from cae_fast.data.sampling import SamplingPlan
from data_files import (
    ARITHMETIC,
    bad_files,
    encode,
    good_files,
    jpeg_claiming,
    photograph,
    pillow_pixels,
    undecodable_files,
)

MAX_PIXELS = 1_000_000
BATCH = 8
# libjpeg fills what such a file lacks with gray; Pillow, and so the reference, does not tell.
SHOWN_BY_PILLOW = {"ended early.jpg", "taller.jpg", "zeros inside.jpg"}


def other_shapes():
    return {
        "arithmetic coding.jpg": ARITHMETIC,
        "1x1.png": encode(photograph(1, 1), "PNG"),
        "1x1.jpg": encode(photograph(1, 1), "JPEG"),
        "3x2000.jpg": encode(photograph(2000, 3), "JPEG"),
        "2000x3.jpg": encode(photograph(3, 2000), "JPEG"),
        "2000x3.webp": encode(photograph(3, 2000), "WEBP"),
        "smaller in the header.jpg": jpeg_claiming(encode(photograph(48, 64), "JPEG"), 24, 64),
    }


def changed_files(folder):
    """Damage files that the index took for good: {name: a part of the reason}."""
    (folder / "late cut.jpg").write_bytes((folder / "late cut.jpg").read_bytes()[:-20])
    (folder / "late size.png").write_bytes(encode(photograph(30, 41), "PNG"))
    (folder / "late page.jpg").write_bytes(b"<html></html>")
    (folder / "late empty.jpg").write_bytes(b"")
    (folder / "late gone.jpg").unlink()
    (folder / "late folder.jpg").unlink()
    (folder / "late folder.jpg").mkdir()
    return {
        "late cut.jpg": "truncated",
        "late size.png": "is 30 x 41 pixels (height x width), expected 30 x 40",
        "late page.jpg": "not an image",
        "late empty.jpg": "not an image",
        "late gone.jpg": "cannot be read: No such file",
        "late folder.jpg": "cannot be read: Is a directory",
    }


@pytest.fixture(scope="module")
def files():
    """{name: content} of all files that the index takes."""
    late = ("late cut.jpg", "late page.jpg", "late empty.jpg", "late gone.jpg", "late folder.jpg", "late size.png")
    content = {name: encode(photograph(30, 40), "PNG" if name.endswith("png") else "JPEG") for name in late}
    return good_files(40, 60) | other_shapes() | undecodable_files() | content


@pytest.fixture(scope="module")
def data(files, tmp_path_factory):
    """(index, {name: reason} of the files damaged after the scan)."""
    folder = tmp_path_factory.mktemp("images")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name, (content, _) in bad_files().items():
        (folder / name).write_bytes(content)
    index = build_index(folder, tmp_path_factory.mktemp("indexes") / "x.index", MAX_PIXELS)
    return index, changed_files(folder)


def empty_masks(positions):
    return positions[:, None], positions[:, None]


def plan_of(index):
    return SamplingPlan(len(index), index.heights, index.widths, BATCH, 3, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)


def load(index, decoder, start_step=0, num_workers=0):
    plan = plan_of(index)
    return list(
        pretrain_loader(
            index,
            plan,
            empty_masks,
            image_size=24,
            token_size=12,
            start_step=start_step,
            stop_step=3 * plan.steps_per_epoch,
            rank=0,
            world_size=1,
            micro_batch_size=4,
            num_workers=num_workers,
            pin_memory=False,
            decoder=decoder,
        )
    )


def unusable(decoder, changed):
    names = set(undecodable_files()) | set(changed)
    return names - SHOWN_BY_PILLOW if decoder == "pil" else names


def test_the_index_takes_or_lists_every_file(data, files):
    index, _ = data
    assert {index.path(i).name for i in range(len(index))} == set(files)
    rows = [row.split("\t") for row in index.bad_files.read_text().splitlines()]
    listed = {name.replace("\\t", "\t").replace("\\n", "\n"): reason for name, reason in rows}
    assert set(listed) == set(bad_files())
    for name, (_, reason) in bad_files().items():
        assert reason in listed[name], name


@pytest.mark.parametrize("decoder", ["cpu", "pil"])
def test_every_file_is_shown_right_or_replaced_and_reported(data, files, decoder):
    index, changed = data
    plan = plan_of(index)
    batches = load(index, decoder)
    assert len(batches) == 2 * 3 * plan.steps_per_epoch
    assert torch.equal(torch.cat([batch.positions for batch in batches]), torch.arange(4 * len(batches)))
    wrong, shown, replaced = unusable(decoder, changed), set(), {}
    for batch in batches:
        for position, path, reason in batch.replaced:
            assert position in batch.positions
            replaced.setdefault(path.rpartition("/")[2], set()).add(reason)
        for i, (position, sample_id) in enumerate(zip(batch.positions, batch.sample_ids, strict=True)):
            name = index.path(int(sample_id)).name
            shown.add(name)
            assert name not in wrong
            assert_shows(batch, i, plan, pillow_pixels(files[name]), int(position), int(sample_id), decoder)
    assert set(replaced) == wrong
    assert shown == set(files) - wrong
    for name, reason in changed.items():
        assert len(replaced[name]) == 1
        assert reason in replaced[name].pop()


def assert_shows(batch, i, plan, pixels, position, sample_id, decoder):
    top, left, height, width = plan.boxes(np.array([position]), np.array([sample_id]))[0].tolist()
    crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    step, image = divmod(position, BATCH)
    flip = bool(plan.draw(step, image, image + 1).flips[0])
    views = (batch.images, 24, Image.Resampling.BICUBIC), (batch.token_images, 12, Image.Resampling.LANCZOS)
    for images, size, filter in views:
        one_call = crop.resize((size, size), filter)
        expected = crop.resize((size, height), filter).resize((size, size), filter) if decoder == "cpu" else one_call
        if flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = np.abs(np.asarray(expected).astype(int) - images[i].permute(1, 2, 0).numpy())
        assert difference.mean() <= (0.1 if decoder == "cpu" else 0)


@pytest.mark.parametrize("decoder", ["cpu", "pil"])
@pytest.mark.parametrize("start_step", [1, 4, 9])
def test_the_same_batches_on_resume(data, decoder, start_step):
    index, _ = data
    whole, resumed = load(index, decoder), load(index, decoder, start_step, num_workers=1)
    assert any(batch.replaced for batch in resumed)
    for ours, expected in zip(resumed, whole[2 * start_step :], strict=True):
        assert ours.replaced == expected.replaced
        for name in ("images", "token_images", "positions", "sample_ids"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name


def test_evaluation_leaves_out_what_fails(data, files, caplog):
    index, changed = data
    images = torch.cat([images for images, _ in labelled_loader(index, 24, 8, 0)])
    wrong = unusable("cpu", changed)
    assert len(images) == len(files) - len(wrong)
    assert {record.args[0].rpartition("/")[2] for record in caplog.records} == wrong


def test_a_file_without_permission_is_replaced(data, monkeypatch):
    # root may read every file, so that the refusal has to be played.
    index, _ = data
    forbidden = next(i for i in range(len(index)) if index.path(i).name == "420.jpg")
    read = type(index).read

    def refusing_read(self, i):
        if i == forbidden:
            raise PermissionError(13, "Permission denied")
        return read(self, i)

    monkeypatch.setattr(type(index), "read", refusing_read)
    for decoder in ("cpu", "pil"):
        batches = load(index, decoder)
        reasons = {reason for batch in batches for _, path, reason in batch.replaced if path.endswith("/420.jpg")}
        assert reasons == {"cannot be read: Permission denied"}
        assert all(forbidden not in batch.sample_ids for batch in batches)
