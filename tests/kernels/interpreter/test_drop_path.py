"""The drop-path kernel makes the same bits as the torch version."""

import pytest
import torch

from cae_kernels import drop_path_scales
from cae_kernels.drop_path import drop_path_scales_reference


@pytest.mark.parametrize("branches", [1, 4, 6, 64])
@pytest.mark.parametrize("count", [1, 7, 128, 200])
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 + 5])
def test_the_same_bits(branches, count, seed, written):
    positions = torch.arange(count) * 3 + 2**32 - 100
    rates = torch.linspace(0, 0.9, branches)
    scales = drop_path_scales(seed, positions, rates)
    written(scales)
    assert torch.equal(scales, drop_path_scales_reference(seed, positions, rates))
    if branches > 1 and count > 100:
        assert 0 < (scales == 0).float().mean() < 0.9
