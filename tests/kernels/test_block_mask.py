"""Laws are compared with 200,000 masks of the original implementation: two-sample chi-square tests at fixed seeds."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cae_kernels import block_mask, random_mask
from cae_kernels.parts.philox import STREAM_MASK, draw, uniform

GOLDEN = Path(__file__).parents[1] / "golden" / "block_mask_distribution"
LOWEST_P_VALUE = 1e-4
SAMPLES = 50_000
GRID = {"height": 14, "width": 14, "num_masked": 98}
SMALL = {"height": 7, "width": 7, "num_masked": 24, "min_block": 4}
module = importlib.import_module("cae_kernels.block_mask")  # the package's attribute of this name is the function


def scipy(name):
    """A module of it, wanted late: the test on a GPU needs none."""
    return pytest.importorskip(f"scipy.{name}")


def sequential_masks(
    positions, *, seed, height, width, num_masked, min_block=16, max_block=None, min_aspect=0.3, proposals=384
):
    """The law as its definition reads: one image and one proposal at a time, a mask as the bits of an integer.

    Returns masks (B, height, width) bool, and per image the patches added and the proposal taken by each block.
    """
    words = draw(seed, STREAM_MASK, torch.arange(proposals), positions[:, None])
    areas, aspects, *places = (uniform(word).numpy() for word in words)
    stretches = float32_exp(aspects * np.float32(-math.log(min_aspect)) + np.float32(math.log(min_aspect) / 2))
    max_block, smallest, half = max_block or num_masked, np.float32(min_block), np.float32(0.5)
    masks, added, taken = [], [], []
    for image in range(len(positions)):
        mask, news, indices = 0, [], []
        for index in range(proposals):
            limit = min(num_masked - sum(news), max_block)
            if limit == 0:
                break
            root = np.sqrt((np.float32(limit) - smallest) * areas[image, index] + smallest)
            rows = math.floor(root * stretches[image, index] + half)
            columns = math.floor(root * (np.float32(1) / stretches[image, index]) + half)
            if rows >= height or columns >= width:
                continue
            top = math.floor(places[0][image, index].item() * (height - rows + 1))
            left = math.floor(places[1][image, index].item() * (width - columns + 1))
            block = sum(((1 << columns) - 1) << (row * width + left) for row in range(top, top + rows))
            new = (block & ~mask).bit_count()
            if 0 < new <= limit:
                mask |= block
                news.append(new)
                indices.append(index)
        masks.append(np.array([mask >> patch & 1 for patch in range(height * width)], dtype=bool))
        added.append(news)
        taken.append(indices)
    return np.stack(masks).reshape(-1, height, width), added, taken


def float32_exp(x):
    x = x * np.float32(1 / 16)
    power = np.full_like(x, 1 / 720)
    for factorial in (120, 24, 6, 2, 1, 1):
        power = power * x + np.float32(1 / factorial)
    for _ in range(4):
        power = power * power
    return power


def as_grid(masked_ids, height, width):
    masks = torch.zeros(len(masked_ids), height * width, dtype=torch.bool).scatter_(1, masked_ids, True)
    return masks.view(-1, height, width).numpy()


@pytest.fixture(scope="module")
def masks():
    chunks = torch.arange(SAMPLES).split(5_000)
    return np.concatenate([as_grid(block_mask(chunk, seed=2024, **GRID)[1], 14, 14) for chunk in chunks])


@pytest.fixture(scope="module")
def traced():
    """Masks, patches added and proposals taken of 15,000 images drawn sequentially."""
    return sequential_masks(torch.arange(15_000), seed=77, **GRID)


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.with_suffix(".json").read_text()) | load_file(GOLDEN.with_suffix(".safetensors"))


def same_law(values, histogram):
    """p-value of a two-sample chi-square test; neighbouring bins are pooled until each expects 5 values or more."""
    values = np.asarray(values, dtype=np.int64)
    largest = max(values.max(), *map(int, histogram))
    ours = np.bincount(values, minlength=largest + 1)
    theirs = np.bincount([int(key) for key in histogram], weights=list(histogram.values()), minlength=largest + 1)
    share = ours.sum() / (ours.sum() + theirs.sum())
    columns, column = [], np.zeros(2)
    for pair in np.stack((ours, theirs), axis=1):
        column = column + pair
        if column.sum() * min(share, 1 - share) >= 5:
            columns.append(column)
            column = np.zeros(2)
    columns[-1] = columns[-1] + column
    assert len(columns) > 1
    return scipy("stats").chi2_contingency(np.stack(columns), correction=False).pvalue


def components(masks):
    """4-connected components of many masks: (image of each component, its size)."""
    in_plane = np.zeros((3, 3, 3), dtype=bool)
    in_plane[1] = scipy("ndimage").generate_binary_structure(2, 1)
    labels, count = scipy("ndimage").label(masks, structure=in_plane)
    image_of_patch = np.broadcast_to(np.arange(len(masks))[:, None, None], masks.shape)
    image = np.zeros(count + 1, dtype=np.int64)
    image[labels.ravel()] = image_of_patch.ravel()
    return image[1:], np.bincount(labels.ravel(), minlength=count + 1)[1:]


def test_same_components_as_original(masks, golden):
    image, size = components(masks)
    largest = np.zeros(len(masks), dtype=np.int64)
    np.maximum.at(largest, image, size)
    assert same_law(np.bincount(image), golden["components_masked_4conn"]["hist"]) > LOWEST_P_VALUE
    assert same_law(largest, golden["largest_component"]["hist"]) > LOWEST_P_VALUE
    image, _ = components(~masks)
    assert same_law(np.bincount(image), golden["components_visible_4conn"]["hist"]) > LOWEST_P_VALUE


def test_same_mask_visible_edges_as_original(masks, golden):
    vertical = (masks[:, 1:] != masks[:, :-1]).sum(axis=(1, 2))
    horizontal = (masks[:, :, 1:] != masks[:, :, :-1]).sum(axis=(1, 2))
    assert same_law(vertical + horizontal, golden["mask_visible_edges"]["hist"]) > LOWEST_P_VALUE


def test_same_marginals_as_original(masks, golden):
    """Hotelling's test of the 196 probabilities with the original's covariance, of rank 195 as the count is fixed."""
    expected = golden["prob"].ravel().astype(np.float64)
    covariance = golden["joint"] - np.outer(expected, expected)
    difference = masks.reshape(len(masks), -1).mean(axis=0) - expected
    variance_factor = 1 / len(masks) + 1 / golden["samples"]
    statistic = difference @ np.linalg.pinv(covariance, rcond=1e-6, hermitian=True) @ difference / variance_factor
    assert scipy("stats").chi2.sf(statistic, 195) > LOWEST_P_VALUE
    assert scipy("stats").chi2.cdf(statistic, 195) > LOWEST_P_VALUE


def worst_p_value(difference, variance):
    """Bonferroni-corrected p-value of the largest of many normal deviates."""
    known = variance > 0
    deviate = np.abs(difference[known] / np.sqrt(variance[known])).max()
    return min(1.0, 2 * scipy("stats").norm.sf(deviate) * known.sum())


def test_same_joint_probabilities_as_original(masks, golden):
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    joint = (flat.T @ flat).astype(np.float64) / len(masks)
    pairs = np.triu_indices(196)
    ours, theirs = joint[pairs], golden["joint"][pairs].astype(np.float64)
    pooled = (ours * len(masks) + theirs * golden["samples"]) / (len(masks) + golden["samples"])
    variance = pooled * (1 - pooled) * (1 / len(masks) + 1 / golden["samples"])
    assert worst_p_value(ours - theirs, variance) > LOWEST_P_VALUE


def test_same_autocorrelation_as_original(masks, golden):
    """Mean over the patches with a patch (dy, dx) away of "both are masked", from the spectrum of the padded mask."""
    sample = masks[:20_000].astype(np.float32)
    spectrum = scipy("fft").rfft2(sample, s=(28, 28))
    pairs = np.round(scipy("fft").irfft2(np.abs(spectrum) ** 2, s=(28, 28))[:, :14, :14])
    places = np.outer(np.arange(14, 0, -1), np.arange(14, 0, -1))
    autocorrelation = (pairs / places).astype(np.float64)
    variance = autocorrelation.var(axis=0) * (1 / len(sample) + 1 / golden["samples"])
    assert worst_p_value(autocorrelation.mean(axis=0) - golden["autocorr"], variance) > LOWEST_P_VALUE


def test_blocks_of_the_sequential_law_as_in_the_original(traced, golden):
    _, added, taken = traced
    assert same_law([len(news) for news in added], golden["blocks_placed"]["hist"]) > LOWEST_P_VALUE
    assert same_law([news[0] for news in added], golden["first_block_area"]["hist"]) > LOWEST_P_VALUE
    # The original gives up after ten proposals and calls its function again: ceil(proposals / 10) calls per block.
    calls = [sum(-(-gap // 10) for gap in np.diff([-1, *indices])) for indices in taken]
    assert same_law(calls, golden["mask_calls"]["hist"]) > LOWEST_P_VALUE


def test_masks_are_those_of_the_sequential_law(traced):
    _, masked_ids = block_mask(torch.arange(15_000), seed=77, **GRID)
    np.testing.assert_array_equal(as_grid(masked_ids, 14, 14), traced[0])


SETTINGS = [
    SMALL,
    {"height": 16, "width": 16, "num_masked": 128},
    {"height": 9, "width": 17, "num_masked": 61, "min_block": 6, "max_block": 20, "min_aspect": 0.5},
    {"height": 3, "width": 40, "num_masked": 90, "min_block": 2, "min_aspect": 0.1},
    {"height": 14, "width": 14, "num_masked": 117, "min_block": 16, "max_block": 16, "min_aspect": 1.0},
    {"height": 14, "width": 14, "num_masked": 5},
    {"height": 24, "width": 24, "num_masked": 400},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_other_settings_follow_the_sequential_law(settings):
    positions = torch.arange(60) * 3 + 2**32 - 90  # on both sides of a carry into the position's high word
    _, masked_ids = block_mask(positions, seed=2**63 + 5, **settings)
    expected, _, _ = sequential_masks(positions, seed=2**63 + 5, proposals=2048, **settings)
    np.testing.assert_array_equal(as_grid(masked_ids, settings["height"], settings["width"]), expected)


def assert_exact(visible_ids, masked_ids, settings):
    patches = settings["height"] * settings["width"]
    assert visible_ids.dtype == masked_ids.dtype == torch.int64
    assert visible_ids.shape == (len(masked_ids), patches - settings["num_masked"])
    assert masked_ids.shape == (len(visible_ids), settings["num_masked"])
    for ids in (visible_ids, masked_ids):
        assert torch.all(ids.diff(dim=1) > 0)
    together = torch.cat((visible_ids, masked_ids), dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(patches).expand_as(together))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("function", [block_mask, random_mask])
def test_every_patch_is_visible_or_masked_and_ids_ascend(function, settings):
    if function is random_mask:
        settings = {key: settings[key] for key in GRID}
    assert_exact(*function(torch.arange(500), seed=1, **settings), settings)


def test_an_unfinished_mask_is_filled_from_the_first_patches(monkeypatch):
    monkeypatch.setattr(module, "MAX_PROPOSALS", 1)  # only the first drawing of proposals
    positions = torch.arange(400)
    visible_ids, masked_ids = block_mask(positions, seed=3, **GRID)
    assert_exact(visible_ids, masked_ids, GRID)
    expected, added, _ = sequential_masks(positions, seed=3, proposals=module._DRAWN_AT_ONCE, **GRID)
    lacking = np.array([98 - sum(news) for news in added])
    assert (lacking > 0).any()
    assert (lacking == 0).any()
    for mask, missing in zip(expected, lacking, strict=True):
        mask.flat[np.flatnonzero(~mask)[:missing]] = True
    np.testing.assert_array_equal(as_grid(masked_ids, 14, 14), expected)


@pytest.mark.parametrize(("function", "settings"), [(block_mask, GRID), (block_mask, SETTINGS[2]), (random_mask, GRID)])
def test_masks_depend_on_seed_and_position_only(function, settings):
    positions = torch.arange(100, 228)
    whole = function(positions, seed=9, **settings)[1]
    parts = [function(part, seed=9, **settings)[1] for part in positions.split([1, 50, 77])]
    assert torch.equal(whole, torch.cat(parts))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole[order], function(positions[order], seed=9, **settings)[1])
    assert len(whole.unique(dim=0)) == 128
    for other in (
        function(positions, seed=10, **settings)[1],
        function(positions, seed=9 + 2**32, **settings)[1],
        function(positions + 2**32, seed=9, **settings)[1],
    ):
        assert not (whole == other).all(dim=1).any()


def test_masks_of_neighbouring_positions_are_independent(masks):
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    common = (flat[:-1] * flat[1:]).sum(axis=1, dtype=np.float64)
    expected = (flat.mean(axis=0, dtype=np.float64) ** 2).sum()
    assert abs(common.mean() - expected) < 4 * common.std() / len(common) ** 0.5


def test_random_masks_are_uniform_over_all_subsets():
    _, masked_ids = random_mask(torch.arange(20_000), seed=4, height=2, width=3, num_masked=3)
    counts = (2**masked_ids).sum(dim=1).unique(return_counts=True)[1]
    assert len(counts) == math.comb(6, 3)
    assert scipy("stats").chisquare(counts.numpy()).pvalue > LOWEST_P_VALUE


def test_random_masks_mask_every_patch_equally_often():
    samples = 20_000
    _, masked_ids = random_mask(torch.arange(samples), seed=5, height=10, width=14, num_masked=50)
    counts = np.bincount(masked_ids.flatten().numpy(), minlength=140)
    share = 50 / 140
    statistic = ((counts - samples * share) ** 2).sum() / (samples * share * (1 - share)) * 139 / 140
    assert LOWEST_P_VALUE < scipy("stats").chi2.sf(statistic, 139) < 1 - LOWEST_P_VALUE


def test_exponential_is_accurate():
    x = torch.linspace(-4, 4, 10_001)
    error = module._exp(x).double() / x.double().exp() - 1
    assert error.abs().max() < 3e-6


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"num_masked": 0}, "num_masked"),
        ({"num_masked": 196}, "num_masked"),
        ({"height": 0}, "height"),
        ({"height": 1, "num_masked": 5, "min_block": 2}, "height"),
        ({"width": 1, "num_masked": 5, "min_block": 2}, "width"),
        ({"min_aspect": 0.0}, "min_aspect"),
        ({"min_aspect": 1.5}, "min_aspect"),
        ({"min_aspect": float("nan")}, "min_aspect"),
        ({"min_block": 0}, "min_block"),
        ({"max_block": 0}, "max_block"),
        ({"height": 4, "width": 4, "num_masked": 15}, "min_block"),
        ({"height": 2, "width": 98, "num_masked": 98}, "min_block"),
        ({"min_block": 100, "min_aspect": 1.0}, "min_block"),
    ],
)
def test_impossible_sizes_are_refused(change, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        block_mask(torch.arange(2), seed=0, **GRID | change)


@pytest.mark.parametrize("num_masked", [0, 196, 200])
def test_impossible_random_masks_are_refused(num_masked):
    with pytest.raises(ValueError, match=r"^num_masked: "):
        random_mask(torch.arange(2), seed=0, height=14, width=14, num_masked=num_masked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("settings", SETTINGS)
def test_cuda_makes_the_same_masks(settings):
    positions = torch.arange(2_000) + 2**32 - 1_000
    for cpu, cuda in zip(
        block_mask(positions, seed=6, **settings), block_mask(positions.cuda(), seed=6, **settings), strict=True
    ):
        assert torch.equal(cpu, cuda.cpu())
