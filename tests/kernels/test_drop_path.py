"""Drop path: rates, independence, the documented layout of random numbers, and the same bits on a GPU."""

import numpy as np
import pytest
import torch

from cae_fast.data import sampling
from cae_kernels import drop_path_scales
from cae_kernels.drop_path import drop_path_scales_reference
from cae_kernels.parts.philox import STREAM_DROP_PATH

RATES = torch.tensor([0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9])


def test_drop_path_scales_drop_each_branch_with_its_rate():
    samples = 40_000
    scales = drop_path_scales(11, torch.arange(samples), RATES)
    assert scales.shape == (len(RATES), samples)
    assert scales.dtype == torch.float32
    for branch, rate in zip(scales, RATES, strict=True):
        dropped = int((branch == 0).sum())
        assert torch.all((branch == 0) | (branch == 1 / (1 - rate)))
        assert pytest.importorskip("scipy.stats").binomtest(dropped, samples, rate.item()).pvalue > 1e-4
        deviation = (rate / (1 - rate) / samples).sqrt()  # standard error of a mean of 1
        assert abs(branch.mean() - 1) <= 5 * deviation + 1e-6


def test_drop_path_scales_drop_branches_independently():
    dropped = drop_path_scales(12, torch.arange(40_000), torch.full((6,), 0.3)) == 0
    correlation = torch.corrcoef(dropped.to(torch.float32)) - torch.eye(6)
    assert correlation.abs().max() < 5 / 40_000**0.5


def test_drop_path_scales_follow_the_documented_layout():
    """Against the data pipeline's generator, which is numpy's integers and was tested against known answers."""
    positions, seed = np.array([0, 7, 2**32 + 9]), 2**40 + 5
    scales = drop_path_scales(seed, torch.from_numpy(positions), torch.full((6,), 0.5))
    for branch in range(6):
        words = sampling.philox4x32(seed, branch // 4, positions % 2**32, STREAM_DROP_PATH, positions // 2**32)
        expected = np.where(words[branch % 4] // 2**8 / 2**24 < 0.5, 0.0, 2.0)
        assert scales[branch].tolist() == expected.tolist()


def test_drop_path_scales_do_not_depend_on_batch_split_or_branch_count():
    positions = torch.arange(1000, 1064)
    whole = drop_path_scales(5, positions, RATES)
    parts = [drop_path_scales(5, part, RATES) for part in positions.split(17)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert torch.equal(whole[:3], drop_path_scales(5, positions, RATES[:3]))
    assert not torch.equal(whole, drop_path_scales(6, positions, RATES))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("count", [1, 128, 300])
def test_cuda_makes_the_same_bits(count):
    positions, rates = torch.arange(count) + 2**33, torch.linspace(0, 0.9, 30)
    on_device = drop_path_scales(2**63 + 5, positions.cuda(), rates.cuda()).cpu()
    assert torch.equal(on_device, drop_path_scales_reference(2**63 + 5, positions, rates))
