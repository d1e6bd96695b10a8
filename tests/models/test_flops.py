"""FLOPs against the golden counts and against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cae_fast.config import ModelConfig
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.flops import forward_flops, pretraining_flops

NAMES = {
    "ViT-S/16": "small",
    "ViT-B/16": "base",
    "ViT-L/16": "large",
    "ViT-L/16 dec768": "large_dec768",
    "ViT-H/14": "huge",
}


def counted(model: ContextAutoencoder, backward: bool) -> int:
    """FLOPs of one image by torch's counter, attention as its plain products."""
    side, patches = model.shape.image_size, model.encoder.grid**2
    order = torch.arange(patches, device="meta")[None]
    half = patches // 2
    codes = torch.zeros(1, half, dtype=torch.int64, device="meta")
    images = torch.empty(1, 3, side, side, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = model(images, order[:, :half], order[:, half:], codes)
        if backward:
            losses.total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_matches_the_original_and_the_counter(golden, name):
    """Every part as in the original, which embeds the patches a second time for the targets; we reuse them."""
    expected = golden("flops.json")[name]
    with torch.device("meta"):
        model = ContextAutoencoder(ModelConfig(size=NAMES[name]), 8192, predict_codes=True)
    reused = expected["fwd"].pop("align_patch_embed")
    assert forward_flops(model, model.encoder.grid**2 // 2) == expected["fwd"]
    forward, backward = expected["fwd_total"] - reused, expected["bwd_total"]
    assert counted(model, backward=False) == forward
    assert counted(model, backward=True) == forward + backward == pretraining_flops(model, model.encoder.grid**2 // 2)


def test_ablations_agree_with_the_counter():
    for alignment_weight, decoder_depth in ((0.0, 4), (2.0, 0)):
        config = ModelConfig(size="tiny", image_size=32, num_heads=5, decoder_embed_dim=64, decoder_depth=decoder_depth)
        model = ContextAutoencoder(config, 100, True, alignment_weight).to("meta")
        assert counted(model, backward=True) == pretraining_flops(model, 32)
