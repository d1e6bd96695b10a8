"""`cae_fast.load_encoder`: features, blocks and other image sizes against timm and formulas."""

import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

import cae_fast
from cae_fast.config import ModelConfig, UserError
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.encoder import resize_positions
from cae_fast.models.vit import sincos_position_embedding
from cae_fast.training.checkpoint import save_model
from running import ROOT

CONFIG = ModelConfig(size="tiny", image_size=24, regressor_depth=1, decoder_depth=1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    torch.manual_seed(3)
    model = ContextAutoencoder(CONFIG, 48, predict_codes=False)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("run")
    save_model(folder, model.state_dict(), {"config": {"model": asdict(CONFIG)}})
    return folder


@pytest.fixture
def timm_encoder(run_dir, timm):
    def create(image_size: int):
        shape = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, "init_values": 1.0, "num_classes": 0}
        file = {"file": str(run_dir / "encoder.safetensors"), "num_classes": 0}
        options = {"pretrained": True, "pretrained_cfg_overlay": file, "img_size": image_size}
        return timm.create_model("vit_base_patch16_224", **options, **shape).eval()

    return create


@pytest.mark.parametrize("file", ["encoder.safetensors", "model.safetensors"])
@pytest.mark.parametrize("image_size", [None, 24, 40, 12])
def test_features_equal_timms_at_every_size(run_dir, timm_encoder, file, image_size):
    """The header names a size only, no number of heads."""
    encoder = cae_fast.load_encoder(run_dir / file, image_size)
    side = image_size or 24
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        features = encoder.forward_features(images)
        torch.testing.assert_close(features, timm_encoder(side).forward_features(images), atol=1e-5, rtol=1e-5)
        assert encoder(images).equal(features)
    assert features.shape == (2, (side // 4) ** 2 + 1, 96)
    assert not encoder.training


@pytest.mark.parametrize("n", [1, 3, [0, 2], (2, 0, -1)])
@pytest.mark.parametrize("reshape", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_intermediate_layers_equal_timms(run_dir, timm_encoder, n, reshape, prefix, norm):
    images = torch.randn(2, 3, 24, 24)
    options = {"reshape": reshape, "return_prefix_tokens": prefix, "norm": norm}
    with torch.no_grad():
        ours = cae_fast.load_encoder(run_dir / "encoder.safetensors").get_intermediate_layers(images, n, **options)
        timms = timm_encoder(24).get_intermediate_layers(images, n, **options)
    assert len(ours) == len(timms) == (n if isinstance(n, int) else len(n))
    for mine, theirs in zip(ours, timms, strict=True):
        for a, b in zip(mine if prefix else [mine], theirs if prefix else [theirs], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_intermediate_layers_are_the_blocks_outputs(run_dir):
    encoder, images = cae_fast.load_encoder(run_dir / "encoder.safetensors"), torch.randn(2, 3, 24, 24)
    seen = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    with torch.no_grad():
        layers = encoder.get_intermediate_layers(images, 4, return_prefix_tokens=True)
        grids = encoder.get_intermediate_layers(images, [1], reshape=True)
    assert all(torch.cat((first, patches), 1).equal(x) for (patches, first), x in zip(layers, seen[:4], strict=True))
    assert grids[0][1, :, 2, 5].equal(seen[5][1, 1 + 2 * 6 + 5])  # row 2, column 5 of a grid of 6


def test_the_last_layer_normalized_is_forward_features(run_dir):
    encoder, images = cae_fast.load_encoder(run_dir / "encoder.safetensors"), torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        ((patches, class_token),) = encoder.get_intermediate_layers(images, return_prefix_tokens=True, norm=True)
        torch.testing.assert_close(torch.cat((class_token, patches), 1), encoder.forward_features(images))


def test_gradients_reach_every_parameter(run_dir):
    encoder = cae_fast.load_encoder(run_dir / "encoder.safetensors")
    encoder.forward_features(torch.randn(2, 3, 24, 24)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert not encoder.pos_embed.requires_grad


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 32), (14, 7), (6, 5)])
def test_resized_positions_are_timms(timm, old, new):
    learned = torch.randn(1, old**2 + 1, 20)
    resized = resize_positions(learned, new)
    torch.testing.assert_close(resized, timm.layers.resample_abs_pos_embed(learned, [new, new]), atol=1e-6, rtol=0)
    assert resized[:, 0].equal(learned[:, 0])


@pytest.mark.parametrize("new", [24, 32])
def test_resized_sincos_are_sines_between_the_known_rows(new):
    """Row i of the new grid is row (i + 1/2) old / new - 1/2 of the old one, away from the border's replicated row.

    Recomputed for the larger grid instead, most rows would be none that the encoder has seen.
    """
    old, width = 14, 64
    resized = resize_positions(sincos_position_embedding(old, old, width)[None], new)[0, 1:]
    place = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
    angle = place[:, None] * 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    line = torch.cat((angle.sin(), angle.cos()), 1)  # (new, D/2)
    rows, columns = resized.double().view(new, new, 2, width // 2).unbind(2)
    inner = slice(new // 7, -(new // 7))
    assert (rows[inner] - line[inner, None]).abs().max() < 0.05
    assert (columns[:, inner] - line[None, inner]).abs().max() < 0.05
    recomputed = sincos_position_embedding(new, new, width)[1:].double().view(new, new, 2, width // 2)[:, :, 0]
    assert (recomputed[inner] - line[inner, None]).abs().max() > 1


def test_mistakes_are_named(run_dir, tmp_path):
    path = run_dir / "encoder.safetensors"
    encoder = cae_fast.load_encoder(path)
    with pytest.raises(UserError, match="images are 32x24 px, the encoder's 24x24"):
        encoder.forward_features(torch.zeros(1, 3, 32, 24))
    with pytest.raises(UserError, match="images are 28x28 px"):
        encoder.get_intermediate_layers(torch.zeros(1, 3, 28, 28))
    for n in (0, 5, [4], [-5]):
        with pytest.raises(UserError, match="the encoder has 4 blocks"):
            encoder.get_intermediate_layers(torch.zeros(1, 3, 24, 24), n)
    for size in (30, 0, -4):
        with pytest.raises(UserError, match=f"image_size is {size}: set a multiple of the patch size, 4"):
            cae_fast.load_encoder(path, size)
    with pytest.raises(UserError, match="there is no such file"):
        cae_fast.load_encoder(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a vision transformer in timm's names or ours"):
        cae_fast.load_encoder(tmp_path / "x.safetensors")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = cae_fast.no_such_thing


def test_importing_the_package_does_not_import_torch():
    code = (
        "import sys, cae_fast; assert 'torch' not in sys.modules; cae_fast.load_encoder; assert 'torch' in sys.modules"
    )
    path = f"{ROOT}:{ROOT / 'kernels'}"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})
