"""Our model against numbers of the original implementation (float32, CPU)."""

import torch

from golden_model import golden_model, ours, split_mask


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.norm().clamp_min(1e-12))


def batch_of(tensors):
    mask = tensors["in.mask"].flatten(1).bool()
    visible_ids, masked_ids = split_mask(mask)
    labels = tensors["in.labels"].view(len(mask), -1).long()
    return tensors["in.image"], visible_ids, masked_ids, labels


def test_outputs(golden):
    tensors = golden("cae_tiny.safetensors")
    model = golden_model(tensors)
    images, visible_ids, masked_ids, _ = batch_of(tensors)
    visible, masked = model.encoder.tokens(images, visible_ids, masked_ids)
    encoded = model.encoder.encode(visible)
    latents = model.predict_latents(encoded[:, 1:], visible_ids, masked_ids)
    assert relative(encoded, tensors["out.enc_visible"]) < 1e-5
    assert relative(model.encoder.encode(masked)[:, 1:], tensors["out.latent_target"]) < 1e-5
    assert relative(latents, tensors["out.latent_predict"]) < 1e-5
    logits = model.predict(images, visible_ids, masked_ids).flatten(0, 1)
    assert relative(logits, tensors["out.logits"]) < 1e-5


def test_losses_and_every_gradient(golden):
    tensors = golden("cae_tiny.safetensors")
    model = golden_model(tensors)
    losses = model(*batch_of(tensors))
    losses.total.backward()
    assert relative(losses.total, tensors["out.loss"]) < 1e-5
    assert relative(losses.main, tensors["out.loss_main"]) < 1e-5
    assert relative(2 * losses.alignment, tensors["out.loss_align"]) < 1e-5
    assert relative(losses.accuracy, tensors["out.mlm_acc"]) < 1e-5
    expected = ours(tensors, "grad.")
    trained = dict(model.named_parameters())
    assert expected.keys() == trained.keys()
    for name, gradient in expected.items():
        # A bias in front of a softmax over keys has no gradient but rounding noise.
        if name.endswith("norm_k.bias"):
            assert trained[name].grad.abs().max() < 1e-6
        else:
            assert relative(trained[name].grad, gradient) < 1e-5, name
