"""The discrete VAE against formulas, torch's distributions, finite statistics and its own files."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from cae_fast.config import TokenizerConfig, UserError
from cae_fast.data.bundled import bundled_path
from cae_fast.files import write_safetensors
from cae_fast.models.dvae import (
    DiscreteVAE,
    cosine_ramp,
    dvae_facts,
    dvae_flops,
    load_dvae,
    logit_laplace_loss,
    resolve_tokenizer,
    training_flops,
)
from cae_fast.models.quantizers import GumbelQuantizer, perplexity, uniform_kl

LIBRARY = "vector_quantize_pytorch"
QUANTIZERS = {
    "gumbel": {"num_codes": 40, "code_dim": 12},
    "fsq": {"num_codes": 60, "fsq_levels": [5, 4, 3]},
    "vq": {"num_codes": 40, "code_dim": 6},
}


def needs_library(quantizer: str) -> None:
    if quantizer != "gumbel":
        pytest.importorskip(LIBRARY, reason="needs vector-quantize-pytorch: pip install 'cae-fast[tokenizer]'")


def config(quantizer="gumbel", **changes) -> TokenizerConfig:
    settings = {"width": 16, "num_blocks": 1, "image_size": 32, **QUANTIZERS[quantizer], **changes}
    return resolve_tokenizer(TokenizerConfig(quantizer=quantizer, **settings))


def model(quantizer="gumbel", seed=0, **changes) -> DiscreteVAE:
    needs_library(quantizer)
    torch.manual_seed(seed)
    return DiscreteVAE(config(quantizer, **changes))


def pictures(count=4, side=32, seed=0):
    """Smooth colored images, uint8 (B, 3, S, S)."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=random)
    fine = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear", antialias=True)
    return (fine * 255).round().to(torch.uint8)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("loss", ["squared_error", "logit_laplace"])
def test_gradient_reaches_every_parameter(quantizer, loss):
    dvae = model(quantizer, loss=loss)
    torch.manual_seed(1)
    dvae(pictures(), 0.5, 1.0).total.backward()
    for name, parameter in dvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_shapes_are_those_of_the_original_code():
    """Weights of the small size by hand: 4x4 convolutions 3-256-256-256, two blocks 3x3, 3x3, 1x1, 1x1 to 8192."""
    dvae = DiscreteVAE(resolve_tokenizer(TokenizerConfig()))
    counted = sum(p.numel() for part in (dvae.encoder, dvae.head) for p in part.parameters())
    convolutions = 16 * (3 * 256 + 2 * 256**2) + 3 * 256
    blocks = 2 * (19 * 256**2 + 3 * 256)
    assert counted == convolutions + blocks + 256 * 8192 + 8192
    assert dvae.quantizer.codebook.shape == (8192, 512)
    assert dvae.features(pictures(1, 112)).shape == (1, 256, 14, 14)


def test_gumbel_hard_samples_follow_the_softmax():
    """The Gumbel-max trick: one-hot samples have the probabilities softmax(logits), at every temperature."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    quantizer = GumbelQuantizer(4, 4, straight_through=True)
    quantizer.codebook.data = torch.eye(4)
    draws = 40_000
    for temperature in (0.1, 1.0):
        torch.manual_seed(0)
        chosen = quantizer(logits.expand(1, draws, 4), temperature).vectors[0]
        assert set(chosen.unique().tolist()) == {0.0, 1.0}
        share, expected = chosen.double().mean(0), logits.double().softmax(0)
        assert ((share - expected).abs() < 4.5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_gumbel_soft_samples_follow_the_binary_concrete_law():
    """With two codes the first weight is sigmoid((a + L) / t), L logistic (arXiv 1611.00712, section 3)."""
    quantizer = GumbelQuantizer(2, 2, straight_through=False)
    quantizer.codebook.data = torch.eye(2)
    draws, difference, temperature = 40_000, 0.7, 0.5
    torch.manual_seed(0)
    weights = quantizer(torch.tensor([difference, 0.0]).expand(1, draws, 2), temperature).vectors[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(draws))
    for x in (0.1, 0.5, 0.9):
        expected = 1 / (1 + math.exp(-(temperature * math.log(x / (1 - x)) - difference)))
        share = (weights[:, 0] <= x).double().mean().item()
        assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / draws)


def test_straight_through_has_the_gradient_of_the_mixture():
    torch.manual_seed(0)
    soft, hard = GumbelQuantizer(8, 3, False), GumbelQuantizer(8, 3, True)
    hard.load_state_dict(soft.state_dict())
    logits, toward = torch.randn(2, 5, 8), torch.randn(2, 5, 3)
    gradients = []
    for quantizer in (soft, hard):
        x = logits.clone().requires_grad_()
        torch.manual_seed(1)
        (quantizer(x, 0.7).vectors * toward).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_kl_and_diversity_against_torch_distributions():
    torch.manual_seed(0)
    logits = 3 * torch.randn(4, 6, 50, dtype=torch.float64)
    uniform = torch.distributions.Categorical(logits=torch.zeros(50, dtype=torch.float64))
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=logits), uniform)
    torch.testing.assert_close(uniform_kl(logits.log_softmax(-1)), expected, rtol=1e-12, atol=0)
    quantized = GumbelQuantizer(50, 4, False)(logits.float(), 1.0)
    torch.testing.assert_close(quantized.kl.double(), expected.mean(), rtol=1e-5, atol=0)
    mean = torch.distributions.Categorical(probs=logits.softmax(-1).mean((0, 1)))
    expected_diversity = torch.distributions.kl_divergence(mean, uniform)
    torch.testing.assert_close(quantized.diversity.double(), expected_diversity, rtol=1e-4, atol=0)
    assert uniform_kl(torch.zeros(7).log_softmax(-1)).item() == pytest.approx(0, abs=1e-6)


def test_loss_is_reconstruction_plus_weighted_terms():
    """DALL-E divides by the image's values: a position's KL counts weight / 192 (arXiv 2102.12092, appendix A.2)."""
    plain, diverse = model(), model(diversity_weight=3.0)
    totals = []
    for dvae, weight in ((plain, 0.0), (plain, 6.6), (diverse, 0.0)):
        torch.manual_seed(1)
        totals.append(dvae(pictures(), 1.0, weight))
    base, kl, diversity = totals
    assert (kl.total - base.total).item() == pytest.approx(6.6 / 192 * base.kl.item(), rel=1e-3)
    assert (diversity.total - base.total).item() == pytest.approx(3.0 / 192 * base.diversity.item(), rel=1e-2)


def test_logit_laplace_is_the_density_of_a_transformed_laplace():
    """-log f(x), f the density of sigmoid(Laplace(location, scale)), by torch's change of variables, in float64."""
    torch.manual_seed(0)
    pixels, output = torch.rand(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    laplace = torch.distributions.Laplace(output[:, :3], output[:, 3:].exp())
    transformed = torch.distributions.TransformedDistribution(laplace, torch.distributions.SigmoidTransform())
    expected = -transformed.log_prob(0.1 + 0.8 * pixels).mean()
    torch.testing.assert_close(logit_laplace_loss(output, pixels), expected, rtol=1e-10, atol=1e-10)


def test_perplexity():
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([9, 0])).item() == pytest.approx(1)
    counts = torch.tensor([1, 2, 3, 4, 0])
    entropy = torch.distributions.Categorical(probs=counts.double()).entropy()
    assert perplexity(counts).item() == pytest.approx(entropy.exp().item(), rel=1e-12)


def test_schedules():
    """DALL-E: temperature 1 to 1/16 in 150,000 updates, KL weight 0 to 6.6 in 5,000, each half a cosine."""
    assert [cosine_ramp(step, 150_000, 1.0, 1 / 16) for step in (0, 75_000, 150_000, 10**7)] == pytest.approx(
        [1.0, 17 / 32, 1 / 16, 1 / 16]
    )
    assert [cosine_ramp(step, 5_000, 0.0, 6.6) for step in (0, 2_500, 5_000)] == pytest.approx([0.0, 3.3, 6.6])
    assert cosine_ramp(1_250, 5_000, 0.0, 1.0) == pytest.approx(math.sin(math.pi / 8) ** 2)
    assert cosine_ramp(0, 0, 0.0, 6.6) == 6.6


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_codes_at_positions_are_those_of_the_grid_and_decode(quantizer):
    dvae, images = model(quantizer), pictures()
    dvae(images, 1.0, 0.0)  # vq's codebook starts here
    dvae.eval()
    grid = dvae.code_grid(images)
    assert grid.shape == (4, 4, 4)
    assert grid.dtype == torch.int64
    assert 0 <= grid.min() <= grid.max() < dvae.num_codes
    assert len(grid.unique()) > 2
    masked_ids = torch.stack([torch.randperm(16)[:7].sort().values for _ in images])
    assert dvae.encode(images, masked_ids).equal(grid.flatten(1).gather(1, masked_ids))
    assert dvae(images, 1.0, 0.0).codes.equal(grid.flatten(1))
    decoded = dvae.decode_codes(grid)
    assert decoded.shape == (4, 3, 32, 32)
    assert 0 <= decoded.min() <= decoded.max() <= 1


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_code_stands_for_the_vector_nearest_in_its_quantizer(quantizer):
    """vectors(codes(x)) of a code's own vector gives the code back, but for Gumbel, whose inputs are logits."""
    dvae = model(quantizer).eval()
    codes = torch.arange(dvae.num_codes)[None]
    if quantizer == "gumbel":
        logits = torch.nn.functional.one_hot(codes, dvae.num_codes).float()
        assert dvae.quantizer.codes(logits).equal(codes)
        assert dvae.quantizer.vectors(codes)[0].equal(dvae.quantizer.codebook)
        return
    if quantizer == "vq":
        dvae.quantizer.library.codebook.normal_()
    vectors = dvae.quantizer.vectors(codes)
    assert len(vectors[0].unique(dim=0)) == dvae.num_codes
    # fsq bounds its inputs by a tanh; a level at the end of the range is reached from far outside only.
    inputs = vectors if quantizer == "vq" else 6 * vectors.sign() * vectors.abs().pow(4) + vectors
    assert dvae.quantizer.codes(inputs).equal(codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_works_in_the_type_of_the_weights(dtype):
    for quantizer in QUANTIZERS:
        dvae, images = model(quantizer), pictures()
        dvae(images, 1.0, 0.0)
        codes = dvae.eval().to(dtype).code_grid(images)
        assert dvae.decode_codes(codes).dtype == torch.float32


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_loaded_tokenizer_gives_the_same_codes_and_pictures(quantizer, tmp_path):
    dvae, images = model(quantizer, loss="squared_error"), pictures()
    dvae(images, 1.0, 0.0)
    path = tmp_path / "tokenizer.safetensors"
    state = {name: tensor.contiguous() for name, tensor in dvae.state_dict().items()}
    write_safetensors(path, state, dvae_facts(dvae.config, {"step": 7}))
    loaded = load_dvae(str(path))
    dvae.eval()
    assert loaded.config == dvae.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    codes = dvae.code_grid(images)
    assert loaded.code_grid(images).equal(codes)
    assert loaded.decode_codes(codes).equal(dvae.decode_codes(codes))


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors: there is no such file"):
        load_dvae(str(tmp_path / "none.safetensors"))
    path = tmp_path / "other.safetensors"
    path.write_text("<html>")
    with pytest.raises(UserError, match=r"other\.safetensors: not a safetensors file"):
        load_dvae(str(path))
    save_file({"a": torch.zeros(1)}, path, {"cae_fast": json.dumps({"kind": "dalle"})})
    with pytest.raises(UserError, match="its kind is dalle"):
        load_dvae(str(path))
    write_safetensors(path, {"a": torch.zeros(1)}, dvae_facts(config(), {}))
    with pytest.raises(UserError, match="does not fit its own header"):
        load_dvae(str(path))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARY, None)
    for quantizer in ("fsq", "vq"):
        with pytest.raises(UserError, match=r"pip install 'cae-fast\[tokenizer\]'"):
            DiscreteVAE(config(quantizer))


def test_images_of_an_unfit_side_are_refused():
    with pytest.raises(ValueError, match="multiples of 8"):
        model().features(pictures(1, 36))


@pytest.mark.parametrize("quantizer", ["gumbel", "fsq"])
@pytest.mark.parametrize("loss", ["squared_error", "logit_laplace"])
def test_flops_are_those_torch_counts(quantizer, loss):
    dvae = model(quantizer, loss=loss)
    parts = dvae_flops(dvae.config, 32)
    images = pictures(1)
    with FlopCounterMode(display=False) as counter:
        dvae.head(dvae.features(images).flatten(2).mT)
    assert counter.get_total_flops() == parts["encoder"] + parts["head"]
    with FlopCounterMode(display=False) as counter:
        dvae(images, 1.0, 0.0).total.backward()
    assert counter.get_total_flops() == training_flops(dvae.config)


@pytest.mark.parametrize(("size", "encoding", "training"), [("small", 3.93, 45.7), ("large", 17.83, 185.8)])
def test_flops_of_the_published_sizes(size, encoding, training):
    """The figures that configs/tokenizer/dvae_imagenet1k.yaml states."""
    shape = resolve_tokenizer(TokenizerConfig(size=size))
    parts = dvae_flops(shape, 112)
    assert (parts["encoder"] + parts["head"]) / 1e9 == pytest.approx(encoding, abs=0.01)
    assert training_flops(shape) / 1e9 == pytest.approx(training, abs=0.1)


def photograph_crops(count, side):
    """Square crops of 64 to 199 px of the bundled photographs, uint8 (B, 3, S, S)."""
    random = np.random.default_rng(0)
    photographs = [Image.open(path).convert("RGB") for path in sorted(bundled_path("photographs").glob("*.jpg"))]
    crops = []
    for number in range(count):
        image, size = photographs[number % len(photographs)], int(random.integers(64, 200))
        left, top = (int(random.integers(0, extent - size + 1)) for extent in image.size)
        crop = image.resize((side, side), box=(left, top, left + size, top + size))
        crops.append(torch.from_numpy(np.array(crop)).movedim(-1, 0))
    return torch.stack(crops)


def test_gumbel_training_reconstructs_from_codes():
    """512 codes, 400 steps on crops of photographs: the hard codes explain most of the variance of the pixels."""
    images = photograph_crops(256, 16)
    settings = {"num_codes": 512, "code_dim": None, "width": 24, "num_blocks": 0, "diversity_weight": 2.0}
    dvae = model(loss="squared_error", **settings)
    optimizer = torch.optim.AdamW(dvae.parameters(), 3e-3)
    for step in range(400):
        torch.manual_seed(step)
        batch = images[torch.randperm(256)[:32]]
        dvae(batch, cosine_ramp(step, 300, 1.0, 1 / 4), 0.0).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    dvae.eval()
    codes = dvae.code_grid(images)
    pixels = images / 255
    error = (dvae.decode_codes(codes) - pixels).square().mean()
    assert error < 0.5 * pixels.var()
    assert perplexity(codes.flatten().bincount(minlength=512)) > 20
