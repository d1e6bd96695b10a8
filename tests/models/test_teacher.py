"""Frozen features as targets: against an independent forward pass, and in a run."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cae_fast.cli import main
from cae_fast.config import ModelConfig, TargetConfig, UserError
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.targets import make_targets
from cae_fast.models.teacher import load_teacher

WIDTH, DEPTH, HEADS, PATCH, GRID = 128, 2, 2, 4, 7


def timm_weights(layer_scale: bool) -> dict[str, torch.Tensor]:
    """Random weights under the names of timm's VisionTransformer, no bias and no position at zero."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, GRID**2 + 1, WIDTH), "head.weight": (10, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    norms = ["norm"] + [f"blocks.{i}.norm{j}" for i in range(DEPTH) for j in (1, 2)]
    shapes |= {f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")}
    for i in range(DEPTH):
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (out, into) in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = (out * WIDTH, into * WIDTH)
            shapes[f"blocks.{i}.{name}.bias"] = (out * WIDTH,)
        if layer_scale:
            shapes |= {f"blocks.{i}.ls{j}.gamma": (WIDTH,) for j in (1, 2)}
    return {name: 0.1 * torch.randn(shape) + 1.0 * name.endswith("norm.weight") for name, shape in shapes.items()}


def timm_forward(w: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """What timm's VisionTransformer.forward_features computes, in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x = F.conv2d(images.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat((w["cls_token"].expand(len(images), -1, -1), x.flatten(2).mT), 1) + w["pos_embed"]

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for block in (f"blocks.{i}" for i in range(DEPTH)):
        qkv = (
            linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        )
        attention = ((qkv[0] @ qkv[1].mT) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ qkv[2]
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{block}.attn.proj") * w.get(f"{block}.ls1.gamma", 1)
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2") * w.get(f"{block}.ls2.gamma", 1)
    return norm(x, "norm")


@pytest.mark.parametrize("layer_scale", [True, False])
def test_features_equal_an_independent_forward_pass(tmp_path, layer_scale):
    weights = timm_weights(layer_scale)
    save_file(weights, tmp_path / "vit.safetensors")
    teacher = load_teacher(str(tmp_path / "vit.safetensors"), GRID * PATCH, PATCH)
    images = torch.randn(3, 3, GRID * PATCH, GRID * PATCH)
    masked_ids = torch.stack([torch.randperm(GRID**2)[:20] for _ in range(3)])
    expected = timm_forward(weights, images)[:, 1:]
    expected = torch.stack([row[ids] for row, ids in zip(expected, masked_ids, strict=True)])
    torch.testing.assert_close(teacher.encode(images, masked_ids).double(), expected, rtol=1e-4, atol=1e-5)
    assert teacher.output_dim == WIDTH
    assert teacher.token_size(GRID) is None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        teacher.encode(images[:1], masked_ids[:1])
    assert teacher.encode_flops(GRID, 20) == counter.get_total_flops()


def test_the_loss_is_one_minus_the_cosine():
    """Against the definition in float64; the teacher's scale does not matter."""
    config = ModelConfig(size="tiny", image_size=16)
    model = ContextAutoencoder(config, 24, predict_codes=False, cosine_loss=True)
    images, order = torch.randn(2, 3, 16, 16), torch.arange(16).expand(2, -1)
    targets = torch.randn(2, 6, 24)
    loss = model(images, order[:, :10], order[:, 10:], targets).main
    predicted = model.predict(images, order[:, :10], order[:, 10:]).double()
    cosine = (predicted * targets).sum(-1) / (predicted.norm(dim=-1) * targets.double().norm(dim=-1))
    assert abs(loss.item() - (1 - cosine).mean().item()) < 1e-6
    assert abs(model(images, order[:, :10], order[:, 10:], 7 * targets).main.item() - loss.item()) < 1e-6


def test_pretrains_on_the_features_of_an_earlier_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        "model: {size: tiny, image_size: 28, embed_dim: 32, depth: 2, num_heads: 4, regressor_depth: 1}\n"
        "mask: {min_block: 4}\n"
        "data: {path: 'bundled:fashion-mnist/test', crop_scale: [0.5, 1.0], num_workers: 0}\n"
        "optim: {epochs: 4, warmup_epochs: 0}\n"
        "train: {global_batch_size: 40, precision: float32}\n"
        "log: {every_steps: 5, tensorboard: false}\n"
    )
    assert main(["pretrain", "small.yaml", "train.run_dir=runs/first", "train.max_steps=2"]) == 0
    teacher = "target.tokenizer=runs/first/encoder.safetensors"
    features = ["pretrain", "small.yaml", "train.run_dir=runs/second", "target.kind=features", teacher]
    assert main([*features, "train.max_steps=20", "model.depth=1"]) == 0
    second = tmp_path / "runs/second"
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss_main"] < 0.7 * lines[0]["loss_main"] < 1.4
    assert load_file(second / "model.safetensors")["decoder.head.weight"].shape[0] == 32
    assert not (second / "reconstructions.png").exists()
    assert load_teacher("runs/first/encoder.safetensors", 28, 4).model.blocks[0].attn.num_heads == 4
    assert main([*features, "model.image_size=32", "train.run_dir=runs/third"]) == 2
    assert "set model.image_size and model.patch_size to the teacher's" in capsys.readouterr().err


def test_other_files_are_refused(tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"target\.kind is features, but target\.tokenizer is empty"):
        make_targets(TargetConfig(kind="features"), 28, 4, cpu)
    with pytest.raises(UserError, match="there is no such file"):
        make_targets(TargetConfig(kind="features", tokenizer=str(tmp_path / "none")), 28, 4, cpu)
    path = tmp_path / "other.safetensors"
    for broken in ({}, {"cls_token"}, {"blocks.1.mlp.fc1.bias"}):
        weights = timm_weights(True)
        kept = {name: tensor for name, tensor in weights.items() if broken and name not in broken}
        save_file(kept or {"x": torch.zeros(1)}, path)
        with pytest.raises(UserError, match="not a vision transformer"):
            load_teacher(str(path), 28, 4)
    save_file(timm_weights(True) | {"reg_token": torch.zeros(1, 4, WIDTH)}, path)
    with pytest.raises(UserError, match="reg_token"):
        load_teacher(str(path), 28, 4)
