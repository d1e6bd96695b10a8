"""Initialization, positions and sizes of the models."""

import pytest
import torch

from cae_fast.config import ModelConfig, UserError
from cae_fast.models.cae import SIZES, ContextAutoencoder, resolve_model
from cae_fast.models.vit import drop_path_rates, sincos_position_embedding
from golden_model import our_name


def closed_form(width: int, depth: int, patch: int) -> int:
    """Parameters counted by hand where decoder and encoder are equally wide: V = 8192, four blocks each."""
    block = 12 * width**2 + 14 * width
    regressor_block = 12 * width**2 + 18 * width
    ends = 3 * patch**2 * width + 3 * width + 3 * 2 * width + 8192 * (width + 1)
    return (depth + 4) * block + 4 * regressor_block + ends


PARAMETERS = {
    "base": 148_681_472,  # the paper: 148.68 M
    "large_dec768": 366_938_112,  # the original code's script for L: 366.9 M
    "large": closed_form(1024, 24, 16),
    "huge": closed_form(1280, 32, 14),
}


@pytest.mark.parametrize(("name", "grid", "width"), [("pos_embed_64_6x6", 6, 64), ("pos_embed_vitb_14x14", 14, 768)])
def test_positions(golden, name, grid, width):
    ours = sincos_position_embedding(grid, grid, width)
    torch.testing.assert_close(ours[None], golden("pos_embed.safetensors")[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", PARAMETERS)
def test_trainable_parameters(size):
    with torch.device("meta"):
        model = ContextAutoencoder(ModelConfig(size=size), 8192, predict_codes=True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == PARAMETERS[size]
    assert closed_form(768, 12, 16) == PARAMETERS["base"]


def test_initialization_statistics(golden):
    """Shape, order, mean, std and range of every ViT-B parameter at the start."""
    stats = {our_name(k): v for k, v in golden("init_and_schedule.json")["init_stats_vit_b"].items()}
    stats = {k: v for k, v in stats.items() if not k.startswith("alignment_encoder.")}
    model = ContextAutoencoder(ModelConfig(size="base"), 8192, predict_codes=True)
    ours = model.state_dict()
    assert ours.keys() == stats.keys()
    for name, expected in stats.items():
        value = ours[name].flatten().double()
        assert value.numel() == torch.Size(expected["shape"]).numel(), name
        std = value.std(correction=0)
        # Sampling error of mean and standard deviation, with room for five sigma.
        slack = 5 * expected["std"] / value.numel() ** 0.5 + 1e-7
        assert abs(value.mean() - expected["mean"]) < 2 * slack, name
        assert abs(std - expected["std"]) < 2 * slack + 1e-6, name
        reach = 0.1 * max(abs(expected["min"]), abs(expected["max"])) + 1e-6
        assert expected["min"] - reach <= value.min(), name
        assert value.max() <= expected["max"] + reach, name


def test_drop_path_rates(golden):
    facts = golden("init_and_schedule.json")
    assert drop_path_rates(0.1, 12) == pytest.approx(facts["dpr_encoder_12"], abs=1e-9)
    assert drop_path_rates(0.1, 4) == pytest.approx(facts["dpr_4"], abs=1e-9)
    with torch.device("meta"):
        model = ContextAutoencoder(ModelConfig(size="base"), 8192, True)
    rates = model.branch_rates()
    expected = [*facts["dpr_encoder_12"] * 2, *facts["dpr_4"] * 2]
    assert rates[::2] == rates[1::2] == pytest.approx(expected)


def tiny(**changes) -> ContextAutoencoder:
    return ContextAutoencoder(ModelConfig(size="tiny", image_size=16, **changes), 48, predict_codes=False)


def inputs(batch=2):
    ids = torch.arange(16).expand(batch, -1)
    return torch.randn(batch, 3, 16, 16), ids[:, ::2].contiguous(), ids[:, 1::2].contiguous(), torch.randn(batch, 8, 48)


@pytest.mark.parametrize("depth", [1, 2, 4, 5])
@pytest.mark.parametrize("changes", [{}, {"decoder_embed_dim": 64}, {"num_heads": 5}, {"decoder_depth": 0}])
def test_ablations_train_every_parameter(depth, changes):
    model = tiny(**{"regressor_depth": depth, "decoder_depth": depth} | changes)
    model(*inputs()).total.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_no_alignment_is_the_prediction_loss_alone():
    model = tiny()
    with_alignment = model(*inputs())
    model.alignment_weight = 0.0
    torch.manual_seed(0)
    batch = inputs()
    alone = model(*batch)
    model.alignment_weight = 2.0
    both = model(*batch)
    assert alone.total == alone.main == both.main
    torch.testing.assert_close(both.total, both.main + 2 * both.alignment)
    assert with_alignment.alignment > 0 == alone.alignment


def test_targets_carry_no_gradient():
    """Masked patches reach the loss only through the detached targets: their pixels get no gradient."""
    model = tiny()
    images, visible_ids, masked_ids, targets = inputs()
    images.requires_grad_()
    model(images, visible_ids, masked_ids, targets).total.backward()
    patches = images.grad.reshape(2, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, -1)
    assert (patches[:, 1::2] == 0).all()
    assert (patches[:, ::2].abs().sum(-1) > 0).all()


def test_drop_path_drops_whole_samples_and_rescales():
    """With every branch of sample 0 dropped, its encoder output is the norm of its embedded tokens."""
    model = tiny(drop_path_rate=0.5)
    images, visible_ids, _, _ = inputs()
    tokens, _ = model.encoder.tokens(images, visible_ids, None)
    keep = torch.tensor([[0.0, 2.0]]).expand(2 * len(model.encoder.blocks), -1)
    out = model.encoder.encode(tokens, keep)
    torch.testing.assert_close(out[0], model.encoder.norm(tokens[0]))
    doubled = tiny(drop_path_rate=0.5)
    doubled.load_state_dict(model.state_dict())
    for name, p in doubled.named_parameters():
        if "gamma" in name:
            p.data *= 2
    torch.testing.assert_close(out[1], doubled.encoder.encode(tokens)[1], atol=1e-5, rtol=1e-5)


def test_encoder_sees_only_visible_patches():
    model = tiny()
    images, visible_ids, masked_ids, _ = inputs()
    changed = images.clone().reshape(2, 3, 4, 4, 4, 4)
    for b in range(2):
        for i in masked_ids[b].tolist():
            changed[b, :, i // 4, :, i % 4] = 7.0
    a = model.predict(images, visible_ids, masked_ids)
    b = model.predict(changed.reshape_as(images), visible_ids, masked_ids)
    assert torch.equal(a, b)


def test_rescale_init():
    torch.manual_seed(3)
    plain = tiny()
    torch.manual_seed(3)
    scaled = tiny(rescale_init=True)
    for level in range(4):
        for name in ("attn.proj", "mlp.fc2"):
            a = plain.get_submodule(f"encoder.blocks.{level}.{name}").weight
            b = scaled.get_submodule(f"encoder.blocks.{level}.{name}").weight
            torch.testing.assert_close(b * (2 * (level + 1)) ** 0.5, a)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": "giant"}, "model.size"),
        ({"image_size": 225}, "model.image_size=224"),
        ({"depth": 0}, "model.depth"),
        ({"embed_dim": 770}, "model.embed_dim"),
        ({"drop_path_rate": 1.0}, "model.drop_path_rate"),
        ({"regressor_depth": 0}, "model.regressor_depth"),
        ({"num_heads": 1000}, "heads"),
    ],
)
def test_impossible_models_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        resolve_model(ModelConfig(**changes))


@pytest.mark.parametrize("size", SIZES)
def test_head_width_of_the_paper(size):
    model = resolve_model(ModelConfig(size=size, image_size=112))
    assert model.embed_dim // model.num_heads == {"tiny": 32, "huge": 80}.get(size, 64)
