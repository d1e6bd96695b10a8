import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cae_fast.config import UserError
from cae_fast.training import pictures
from cae_fast.training.pictures import reconstruct, save_curves, save_reconstructions


def interval(step, **values):
    line = {"step": step, "epoch": step / 100, "time": 0.0, "loss": 1.0, "loss_main": 0.9, "loss_align": 0.1}
    return {**line, "lr": 1e-3, "grad_norm": 2.0, "images_per_second": 500.0, **values}


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def dark_pixels(path, color, tolerance=40):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels - wanted).max(axis=2) <= tolerance).sum())


@pytest.mark.parametrize("count", [1, 2, 40, 100_000])
def test_curves_of_any_length_show_every_series(tmp_path, count):
    entries = [interval(10 * i, loss=2 / i, loss_main=1.5 / i, loss_align=0.5 / i) for i in range(1, count + 1)]
    save_curves(write_lines(tmp_path / "metrics.jsonl", entries), tmp_path / "curves.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > image.height > 500
    for _, _, color in (*pictures.LOSSES, *pictures.BELOW):
        assert dark_pixels(tmp_path / "curves.png", color) > 20


def drawn(entries, skipped=()):
    figure = pictures._curves_figure(entries, list(skipped))
    figure.canvas.draw()
    return figure


def test_curve_holds_the_files_values_and_gaps_where_not_finite():
    figure = drawn([interval(1, loss=3.0), interval(2, loss=None), interval(3, loss=1.0)])
    total = figure.axes[0].lines[0]
    np.testing.assert_array_equal(total.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(total.get_ydata(), [3, math.nan, 1])


def test_long_curve_is_drawn_as_bin_means():
    count = pictures.MAX_POINTS * 10
    values = np.random.default_rng(0).uniform(1, 2, count)
    values[500:510], values[25] = math.nan, math.nan
    entries = [interval(i, loss=None if math.isnan(v) else v) for i, v in enumerate(values, start=1)]
    line = drawn(entries).axes[0].lines[0]
    bins = values.reshape(pictures.MAX_POINTS, 10)
    expected = [np.nan if np.isnan(row).all() else np.nanmean(row) for row in bins]
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, count + 1).reshape(-1, 10).mean(axis=1))


def test_title_gives_final_values_and_skipped_steps_are_marked():
    figure = drawn([interval(10), interval(1200, loss=0.5, loss_main=0.375, loss_align=0.125)], skipped=[7, 8])
    title = figure.get_suptitle()
    assert all(part in title for part in ("1,200", "epoch 12", "0.5", "0.375", "0.125"))
    assert "skipped step (2)" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_scale_is_logarithmic_only_for_a_wide_range():
    assert drawn([interval(1, loss_align=0.9), interval(2, loss_align=0.8)]).axes[0].get_yscale() == "linear"
    assert drawn([interval(1, loss_align=0.01)]).axes[0].get_yscale() == "log"
    assert drawn([interval(1, loss_align=0.0)]).axes[0].get_yscale() == "linear"


def test_losses_without_alignment_or_finite_values_are_drawn(tmp_path):
    entries = [{k: v for k, v in interval(i).items() if k != "loss_align"} for i in (1, 2)]
    entries.append(interval(3, loss=None, loss_main=None, grad_norm=None))
    save_curves(write_lines(tmp_path / "metrics.jsonl", entries), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_curves_without_intervals_are_refused(tmp_path):
    path = write_lines(tmp_path / "metrics.jsonl", [{"event": "skipped_step", "step": 1, "sample_ids": []}])
    with pytest.raises(UserError, match="no metrics"):
        save_curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_import_does_not_load_matplotlib():
    code = "import sys, cae_fast.training.pictures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reconstruction_puts_every_predicted_pixel_in_its_place():
    patch, side, per_row = 2, 6, 3
    images = torch.rand(2, 3, side, side)
    masked_ids = torch.tensor([[0, 5, 7], [1, 2, 8]])
    predicted = torch.rand(2, 3, patch * patch * 3)
    masked, rebuilt = reconstruct(images, masked_ids, predicted, patch)
    expected_masked, expected_rebuilt = images.clone(), images.clone()
    for k in range(2):
        for slot, patch_id in enumerate(masked_ids[k].tolist()):
            top, left = patch_id // per_row * patch, patch_id % per_row * patch
            for row in range(patch):
                for column in range(patch):
                    for channel in range(3):
                        value = predicted[k, slot, (row * patch + column) * 3 + channel]
                        expected_rebuilt[k, channel, top + row, left + column] = value
                        expected_masked[k, channel, top + row, left + column] = 0.5
    assert torch.equal(masked, expected_masked)
    assert torch.equal(rebuilt, expected_rebuilt)


def test_predictions_outside_the_pixel_range_are_clamped():
    images = torch.full((1, 3, 4, 4), 0.25)
    predicted = torch.tensor([-1.0, 2.0]).repeat(24).reshape(1, 1, 48)
    _, rebuilt = reconstruct(images, torch.tensor([[0]]), predicted, 4)
    assert sorted(rebuilt.unique().tolist()) == [0.0, 1.0]


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (3, 1), (4, 2), (5, 2), (8, 2), (11, 2)])
def test_picture_shows_the_exact_pixels_of_every_triple(tmp_path, count, groups):
    side, patch, scale = 28, 4, 5  # 5 * 28 is the first multiple of at least 128
    images = torch.randint(256, (count, 3, side, side)).float() / 255
    masked_ids = torch.stack([torch.randperm(49)[:24].sort().values for _ in range(count)])
    predicted = torch.randint(256, (count, 24, patch * patch * 3)).float() / 255
    save_reconstructions(tmp_path / "r.png", images, masked_ids, predicted, patch)
    assert [path.name for path in tmp_path.iterdir()] == ["r.png"]
    picture = np.asarray(Image.open(tmp_path / "r.png"))
    masked, rebuilt = reconstruct(images, masked_ids, predicted, patch)
    cell, gap = side * scale, pictures.GAP
    for k in range(min(count, 8)):
        for column, source in enumerate((images, masked, rebuilt)):
            top = pictures.TITLE_HEIGHT + k // groups * (cell + gap)
            left = gap + k % groups * (3 * cell + 6 * gap) + column * (cell + gap)
            shown = picture[top : top + cell, left : left + cell]
            expected = (source[k].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            np.testing.assert_array_equal(shown, np.kron(expected, np.ones((scale, scale, 1), np.uint8)))
    rows = math.ceil(min(count, 8) / groups)
    assert picture.shape == (
        pictures.TITLE_HEIGHT + rows * (cell + gap),
        groups * (3 * cell + 2 * gap) + (groups - 1) * 4 * gap + 2 * gap,
        3,
    )
    assert (picture[: pictures.TITLE_HEIGHT] < 128).any(), "the column titles"


@pytest.mark.parametrize(("count", "groups"), [(2, 1), (5, 2), (20, 2)])
def test_pairs_show_the_exact_pixels(tmp_path, count, groups):
    side, scale = 64, 2
    images, decoded = (torch.randint(256, (count, 3, side, side)).float() / 255 for _ in range(2))
    pictures.save_pairs(tmp_path / "p.png", images, decoded)
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    cell, gap, shown = side * scale, pictures.GAP, min(count, 16)
    assert picture.shape[0] == pictures.TITLE_HEIGHT + math.ceil(shown / groups) * (cell + gap)
    for k in range(shown):
        for column, source in enumerate((images, decoded)):
            top = pictures.TITLE_HEIGHT + k // groups * (cell + gap)
            left = gap + k % groups * (2 * cell + 5 * gap) + column * (cell + gap)
            expected = (source[k].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            np.testing.assert_array_equal(
                picture[top : top + cell, left : left + cell], np.kron(expected, np.ones((scale, scale, 1), np.uint8))
            )


def test_large_images_are_not_enlarged(tmp_path):
    images, predicted = torch.rand(1, 3, 224, 224), torch.rand(1, 1, 16 * 16 * 3)
    save_reconstructions(tmp_path / "r.png", images, torch.tensor([[0]]), predicted, 16)
    assert Image.open(tmp_path / "r.png").width == 3 * 224 + 4 * pictures.GAP
