"""The mask kernels make the same bits as the torch versions."""

import sys

import pytest
import torch

from cae_kernels import block_mask, random_mask
from cae_kernels.block_mask import block_mask_reference
from cae_kernels.random_mask import random_mask_reference

module = sys.modules["cae_kernels.block_mask"]

SETTINGS = [
    {"height": 14, "width": 14, "num_masked": 98},
    {"height": 16, "width": 16, "num_masked": 128},
    {"height": 9, "width": 17, "num_masked": 61, "min_block": 6, "max_block": 20, "min_aspect": 0.5},
    {"height": 3, "width": 20, "num_masked": 45, "min_block": 2, "min_aspect": 0.1},
    {"height": 14, "width": 14, "num_masked": 117, "min_block": 16, "max_block": 16, "min_aspect": 1.0},
    {"height": 14, "width": 14, "num_masked": 5},
]
SEEDS = [0, 7, 2**63 + 5, 2**32 - 1]
POSITIONS = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3])


def reference(positions, seed, **settings):
    settings = {"min_block": 16, "max_block": settings["num_masked"], "min_aspect": 0.3} | settings
    return block_mask_reference(positions, seed=seed, **settings, max_proposals=module.MAX_PROPOSALS)


@pytest.mark.parametrize("settings", SETTINGS)
def test_block_masks_have_the_same_bits(settings, written):
    for number, seed in enumerate(SEEDS):
        positions = POSITIONS[number::3]
        outputs = block_mask(positions, seed=seed, **settings)
        written(*outputs)
        for ours, theirs in zip(outputs, reference(positions, seed, **settings), strict=True):
            assert ours.dtype == torch.int64
            assert torch.equal(ours, theirs)


def test_unfinished_masks_are_filled_alike(monkeypatch):
    settings = {"height": 14, "width": 14, "num_masked": 150, "min_block": 1, "max_block": 4}
    positions = torch.arange(2)
    finished = reference(positions, 3, **settings)[1]
    monkeypatch.setattr(module, "MAX_PROPOSALS", module._DRAWN_AT_ONCE)
    ours, theirs = block_mask(positions, seed=3, **settings), reference(positions, 3, **settings)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(theirs[1], finished)


@pytest.mark.parametrize(
    ("height", "width", "num_masked"), [(14, 14, 98), (5, 7, 1), (5, 7, 34), (16, 16, 128), (1, 2, 1)]
)
def test_random_masks_have_the_same_bits(height, width, num_masked, written):
    for seed in SEEDS:
        outputs = random_mask(POSITIONS, seed=seed, height=height, width=width, num_masked=num_masked)
        written(*outputs)
        expected = random_mask_reference(POSITIONS, seed, height * width, num_masked)
        for ours, theirs in zip(outputs, expected, strict=True):
            assert torch.equal(ours, theirs)
