"""Which patches of an image are masked: a pure function of the global sample position.

Legend: B images of a micro-batch, Nv visible patches, Nm masked patches.
"""

from functools import partial

import torch
from torch import Tensor

from cae_fast.config import MaskConfig, UserError
from cae_fast.data.batches import Mask
from cae_kernels import block_mask, random_mask


def make_mask(mask: MaskConfig, grid: int, seed: int) -> tuple[Mask, int]:
    """The mask as a function of global sample positions (B,): visible_ids (B, Nv) and masked_ids (B, Nm); and Nm."""
    num_masked = int(mask.ratio * grid**2)
    if not 0 < num_masked < grid**2:
        raise UserError(
            f"mask.ratio is {mask.ratio}: it masks {num_masked} of {grid**2} patches, but at least one must be masked "
            "and one visible"
        )

    draw: Mask = partial(random_mask, seed=seed, height=grid, width=grid, num_masked=num_masked)
    if mask.kind not in ("block", "random"):
        raise UserError(f"mask.kind is {mask.kind!r}: set block or random")
    if mask.kind == "block":
        if mask.min_block > num_masked:
            raise UserError(f"mask.min_block is {mask.min_block}: more than the {num_masked} patches that are masked")
        blocks = partial(block_mask, min_block=mask.min_block, max_block=mask.max_block, min_aspect=mask.min_aspect)
        draw = partial(blocks, seed=seed, height=grid, width=grid, num_masked=num_masked)

    try:  # the ops know best which blocks cannot be
        draw(torch.zeros(1, dtype=torch.int64))
    except ValueError as error:
        raise UserError(f"mask: {error}") from error
    return draw, num_masked


def no_mask(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The mask of whoever masks nothing: two empty lists of patches, int64 (B, 0)."""
    empty = positions.new_empty(len(positions), 0)
    return empty, empty
