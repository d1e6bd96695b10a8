"""The rendering of the original's step against the original's own numbers, and against our step (float32, CPU)."""

import copy

import numpy as np
import pytest
import torch

from benchmarks.speed.original_step import OriginalStep, OriginalTokenizer, boolean_mask
from cae_fast.config import ModelConfig, OptimConfig
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.dalle import DalleEncoder, DalleTokenizer, map_pixels
from cae_kernels import block_mask
from golden_model import golden_model, ours

CPU = torch.device("cpu")


def test_twelve_steps_are_the_originals(golden):
    """Losses, gradient norms and final weights of the original code itself."""
    step = OriginalStep(golden_model(golden("cae_tiny.safetensors")), None, OptimConfig(), CPU)
    for number, expected in enumerate(golden("cae_tiny_12steps.json")["log"]["f32"]):
        random = np.random.RandomState(1000 + number)
        images = torch.from_numpy(random.standard_normal((3, 3, 96, 96))).float()
        mask = torch.zeros(3, 36, dtype=torch.bool)
        for row in mask:
            row[torch.from_numpy(random.permutation(36)[:18])] = True
        labels = torch.from_numpy(random.randint(0, 128, 54))
        result = step(images, mask, labels, expected["lr"])
        for name in ("loss", "loss_main", "loss_align", "grad_norm"):
            assert float(result[name]) == pytest.approx(expected[name], rel=1e-5), (number, name)
    final = ours(golden("cae_tiny_12steps.safetensors"), "final.")
    for name, parameter in step.model.named_parameters():
        # The gradient of norm_k's bias is zero but for rounding, which Adam blows up to full steps.
        if not name.startswith("alignment_encoder.") and not name.endswith("norm_k.bias"):
            assert (parameter - final[name]).norm() / final[name].norm() < 1e-5, name


def small_model(codes: int) -> ContextAutoencoder:
    config = ModelConfig(size="tiny", image_size=32, depth=2, regressor_depth=2, decoder_depth=2, drop_path_rate=0.0)
    return ContextAutoencoder(config, codes, predict_codes=True)


def test_loss_and_codes_equal_ours():
    encoder = DalleEncoder(8, num_codes=64).eval()
    model = small_model(64)
    step = OriginalStep(model, encoder, OptimConfig(), CPU)
    images = torch.randn(4, 3, 32, 32)
    token_images = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    visible_ids, masked_ids = block_mask(torch.arange(4), seed=0, height=8, width=8, num_masked=32)
    masked = boolean_mask(masked_ids, 64)
    codes = DalleTokenizer(copy.deepcopy(encoder), None).encode(token_images, masked_ids)
    labels = step.labels(token_images, masked)
    assert labels.equal(codes.flatten())
    main, alignment = step.losses(images, masked, labels)
    expected = model(images, visible_ids, masked_ids, codes)
    assert main.item() == pytest.approx(expected.main.item(), rel=1e-5)
    assert alignment.item() == pytest.approx(expected.alignment.item(), rel=1e-5)


def test_the_tokenizer_scales_its_branches_as_ours():
    encoder = DalleEncoder(8, num_codes=64).eval()
    pixels = map_pixels(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8))
    with torch.no_grad():
        expected = encoder(pixels)
    assert OriginalTokenizer(encoder)(pixels, torch.float32).equal(expected.argmax(1).flatten(1))


def test_it_trains():
    step = OriginalStep(small_model(16), None, OptimConfig(), CPU)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(16, (128,))
    _, masked_ids = block_mask(torch.arange(4), seed=0, height=8, width=8, num_masked=32)
    masked = boolean_mask(masked_ids, 64)
    losses = [step(images, masked, labels, 1e-3)["loss_main"] for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
