"""Twelve AdamW steps of the engine against the original's, and schedule values (float32, CPU)."""

import numpy as np
import pytest
import torch

from cae_fast.config import OptimConfig
from cae_fast.training.engine import Engine
from cae_fast.training.optim import decays, layer_decay_scales, layer_id, learning_rate, scheduled_lr, trainable
from golden_model import golden_model, ours, split_mask


def original_batch(step: int):
    """The inputs of golden step `step`, drawn as the golden data's description says."""
    random = np.random.RandomState(1000 + step)
    images = torch.from_numpy(random.standard_normal((3, 3, 96, 96))).float()
    mask = torch.zeros(3, 36, dtype=torch.bool)
    for row in mask:
        row[torch.from_numpy(random.permutation(36)[:18])] = True
    labels = torch.from_numpy(random.randint(0, 128, 54)).view(3, 18)
    return images, *split_mask(mask), labels


@pytest.fixture(scope="module")
def trained(golden):
    tensors = golden("cae_tiny.safetensors")
    engine = Engine(golden_model(tensors), OptimConfig(clip_grad_norm=3.0), "float32", torch.device("cpu"), 1)
    log = []
    for step, expected in enumerate(golden("cae_tiny_12steps.json")["log"]["f32"]):
        losses = engine(*original_batch(step))
        engine.backward(losses.total)
        result = engine.step(expected["lr"])
        log.append((losses, result))
    return engine, log


def test_losses_and_gradient_norms(trained, golden):
    for (losses, result), expected in zip(trained[1], golden("cae_tiny_12steps.json")["log"]["f32"], strict=True):
        assert float(losses.total) == pytest.approx(expected["loss"], rel=1e-5)
        assert float(losses.main) == pytest.approx(expected["loss_main"], rel=1e-5)
        assert 2 * float(losses.alignment) == pytest.approx(expected["loss_align"], rel=1e-5)
        assert float(result.grad_norm) == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_parameters_after_twelve_steps(trained, golden):
    final = ours(golden("cae_tiny_12steps.safetensors"), "final.")
    for name, parameter in trained[0].module.named_parameters():
        # Its gradient is zero but for rounding, which Adam blows up to full steps.
        if not name.endswith("norm_k.bias"):
            error = (parameter - final[name]).norm() / final[name].norm()
            assert error < 1e-5, name


def test_decay_groups_are_the_originals(golden):
    groups = golden("cae_tiny_12steps.json")["groups"]
    model = golden_model(golden("cae_tiny.safetensors"))
    for group in groups:
        names = ours({f"x.{name}": torch.zeros(()) for name in group["names"]}, "x.").keys()
        ours_in_group = {n for n, p in trainable(model) if decays(n, p) == (group["weight_decay"] > 0)}
        assert ours_in_group == set(names)


def test_learning_rates(golden):
    optim = OptimConfig()
    for step, expected in golden("init_and_schedule.json")["pretrain_lr_300e_625it"].items():
        assert scheduled_lr(int(step), 625, optim) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    for step, row in enumerate(golden("cae_tiny_12steps.json")["log"]["f32"]):
        assert learning_rate(step, 4, 12, 1.5e-3, 1e-5) == pytest.approx(row["lr"], rel=1e-9)


def test_layer_decay(golden):
    expected = golden("init_and_schedule.json")["layer_decay_0.65_12"]
    assert layer_decay_scales(0.65, 12) == pytest.approx(expected, rel=1e-12)
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.11.mlp.fc2.bias"]
    assert [layer_id(name, 12) for name in (*names, "norm.weight", "head.weight")] == [0, 0, 0, 1, 12, 13, 13]
