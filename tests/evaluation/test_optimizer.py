"""Optimizers of classifiers against hand-written formulas; layer ids; exact state."""

import pytest
import torch
from torch import nn

from cae_fast.config import ClassifyOptimConfig
from cae_fast.evaluation.attentive import AttentiveProbe
from cae_fast.evaluation.classifier import Classifier
from cae_fast.evaluation.finetune import FinetuneHead, add_relative_position_bias
from cae_fast.evaluation.linear import LinearProbe
from cae_fast.evaluation.optimizer import ClassifierOptimizer, parameter_groups
from cae_fast.models.vit import VisionTransformer, initialize
from cae_fast.training.optim import trainable

WIDTH, DEPTH, CLASSES = 16, 3, 5


def make_model(kind, dtype=torch.float32):
    torch.manual_seed(0)
    encoder = VisionTransformer(8, 4, WIDTH, DEPTH, 2, 0.1)
    initialize(encoder)
    if kind == "biased":
        add_relative_position_bias(encoder)
    encoder.to(dtype)
    heads = {"linear": lambda: LinearProbe(WIDTH, CLASSES), "attentive": lambda: AttentiveProbe(WIDTH, 2, CLASSES)}
    return Classifier(encoder, heads.get(kind, lambda: FinetuneHead(encoder, CLASSES).float())())


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for _, parameter in trainable(model):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return {name: parameter.grad.clone() for name, parameter in trainable(model)}


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lars_is_the_originals_formula(timm, weight_decay):
    """LARS as in MAE and the original: trust ratio for weights, plain momentum for biases; also without decay."""
    model = make_model("linear")
    optimizer = ClassifierOptimizer(model, ClassifyOptimConfig(weight_decay=weight_decay))
    weights = {name: parameter.detach().double().clone() for name, parameter in trainable(model)}
    momentum = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step, lr in enumerate((0.0, 6.4, 3.2, 6.4)):
        for name, gradient in gradients(model, step).items():
            update = gradient.double()
            if update.ndim > 1:
                update = update + weight_decay * weights[name]
                update = update * 0.001 * weights[name].norm() / update.norm()
            momentum[name] = 0.9 * momentum[name] + update
            weights[name] -= lr * momentum[name]
        optimizer.step(torch.tensor(1.0), lr)
    for name, parameter in trainable(model):
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-5, atol=1e-6)


def test_without_always_adapt_timms_lars_would_be_plain_sgd(timm):
    """The trap that the groups avoid: this fails when timm changes what weight_decay=0 means."""
    from timm.optim import Lars

    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.full((2, 2), 3.0)
    Lars([parameter], lr=1.0).step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), -2.0))


def test_attentive_is_nesterov_momentum():
    model = make_model("attentive")
    optimizer = ClassifierOptimizer(model, ClassifyOptimConfig())
    weights = {name: parameter.detach().double().clone() for name, parameter in trainable(model)}
    momentum = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step, lr in enumerate((0.4, 0.2, 0.1)):
        for name, gradient in gradients(model, step).items():
            momentum[name] = 0.9 * momentum[name] + gradient
            weights[name] -= lr * (gradient + 0.9 * momentum[name])
        optimizer.step(torch.tensor(1.0), lr)
    for name, parameter in trainable(model):
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-5, atol=1e-6)


def expected_layer(name):
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return 0 if name.startswith(("encoder.cls_token", "encoder.patch_embed")) else DEPTH + 1


def test_layer_decay_groups():
    model = make_model("biased")
    optim = ClassifyOptimConfig(layer_decay=0.5, weight_decay=0.05)
    named = dict(trainable(model))
    groups = parameter_groups(named, optim, DEPTH)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(named) == sum(len(group["params"]) for group in groups)
    for name, parameter in named.items():
        decayed = parameter.ndim > 1 and name != "encoder.cls_token"
        expected = 0.5 ** (DEPTH + 1 - expected_layer(name)), 0.05 if decayed else 0.0
        assert found[id(parameter)] == pytest.approx(expected), name
    assert found[id(named["head.norm.weight"])] == (1.0, 0.0)
    assert found[id(named["head.linear.weight"])] == (1.0, 0.05)
    assert found[id(named["encoder.blocks.2.attn.relative_position_bias_table"])] == (0.5, 0.05)
    assert found[id(named["encoder.cls_token"])] == (0.5**4, 0.0)


def test_timms_groups_are_one_power_off_without_a_head(timm):
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", depth=DEPTH, num_classes=0)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale[id(model.blocks[DEPTH - 1].mlp.fc1.weight)] == 1.0  # ours and BEiT's: 0.5


def test_finetuning_is_adamw_with_clipping_in_float64():
    model = make_model("finetune")
    optim = ClassifyOptimConfig(layer_decay=0.5, weight_decay=0.05, clip_grad_norm=1.0)
    optimizer = ClassifierOptimizer(model, optim)
    weights = {name: parameter.detach().double().clone() for name, parameter in trainable(model)}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    for t, lr in enumerate((1e-3, 5e-3, 2e-3), start=1):
        grads = {name: gradient.double() for name, gradient in gradients(model, t).items()}
        norm = sum(float(gradient.square().sum()) for gradient in grads.values()) ** 0.5
        assert norm > 1.0
        for name, gradient in grads.items():
            gradient = gradient / norm
            rate = lr * 0.5 ** (DEPTH + 1 - expected_layer(name))
            if weights[name].ndim > 1 and name != "encoder.cls_token":
                weights[name] *= 1 - rate * 0.05
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            root = (second[name] / (1 - 0.999**t)).sqrt() + 1e-8
            weights[name] -= rate * first[name] / (1 - 0.9**t) / root
        result = optimizer.step(torch.tensor(1.0), lr)
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-5)
        assert result.skipped.item() == 0
    for name, parameter in trainable(model):
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=2e-4, atol=2e-6)


def test_bfloat16_weights_follow_float32_masters():
    model, exact = make_model("finetune", torch.bfloat16), make_model("finetune")
    for (_, rounded), (_, parameter) in zip(trainable(model), trainable(exact), strict=True):
        parameter.data.copy_(rounded.data)
    optim = ClassifyOptimConfig(weight_decay=0.05)
    optimizer, reference = ClassifierOptimizer(model, optim), ClassifierOptimizer(exact, optim)
    for step in range(5):
        for name, gradient in gradients(model, step).items():
            dict(exact.named_parameters())[name].grad = gradient.float()
        optimizer.step(torch.tensor(1.0), 1e-4)
        reference.step(torch.tensor(1.0), 1e-4)
    for name, master in optimizer.masters.items():
        assert master.dtype == torch.float32
        torch.testing.assert_close(master, reference.masters[name])
        assert optimizer.parameters[name].equal(master.to(optimizer.parameters[name].dtype))
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["linear", "attentive", "finetune"])
def test_state_continues_exactly(kind, request):
    if kind == "linear":
        request.getfixturevalue("timm")
    optim = ClassifyOptimConfig(weight_decay=0.01)
    models = [make_model(kind, torch.bfloat16) for _ in range(2)]
    optimizers = [ClassifierOptimizer(model, optim) for model in models]
    for step in range(6):
        if step == 3:
            models[1] = make_model(kind, torch.bfloat16)
            state = {name: tensor.clone() for name, tensor in optimizers[1].state_items()}
            optimizers[1] = ClassifierOptimizer(models[1], optim)
            optimizers[1].load_state(state)
        for model, optimizer in zip(models, optimizers, strict=True):
            gradients(model, step)
            optimizer.step(torch.tensor(1.0), 0.1)
    states = [dict(optimizer.state_items()) for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) > 2 * len(optimizers[0].masters) - 1
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_counts_as_zero(bad):
    model = make_model("attentive")
    optimizer = ClassifierOptimizer(model, ClassifyOptimConfig())
    before = {name: parameter.detach().clone() for name, parameter in trainable(model)}
    gradients(model, 0)
    model.head.query.grad[0, 0, 3] = bad
    images, norm = torch.randn(4, 3, 8, 8), model.head.norm
    model(images)
    assert optimizer.step(torch.tensor(1.0), 0.1).skipped.item() == 1
    assert norm.running_var.equal(torch.ones(WIDTH))
    assert all(parameter.equal(before[name]) for name, parameter in trainable(model))
    gradients(model, 1)
    model(images)
    assert optimizer.step(torch.tensor(1.0), 0.1).skipped.item() == 0
    assert not norm.running_var.equal(torch.ones(WIDTH))
    assert not any(parameter.equal(before[name]) for name, parameter in trainable(model))
