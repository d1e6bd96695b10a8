"""The engine: skipped steps, master weights, accumulation, clipping, and no host synchronization."""

import copy

import pytest
import torch

from cae_fast.config import ModelConfig, OptimConfig
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.training.engine import Engine
from host_reads import NoHostReads

CPU = torch.device("cpu")


def make_engine(precision="float32", accumulation=1, clip=3.0, seed=0) -> Engine:
    torch.manual_seed(seed)
    config = ModelConfig(size="tiny", image_size=16, embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.0)
    model = ContextAutoencoder(config, 48, predict_codes=False)
    return Engine(model, OptimConfig(clip_grad_norm=clip), precision, CPU, accumulation)


def batch(size=4, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    ids = torch.arange(16).expand(size, -1)
    images = torch.randn(size, 3, 16, 16, generator=random).to(dtype)
    return images, ids[:, ::2].contiguous(), ids[:, 1::2].contiguous(), torch.randn(size, 8, 48, generator=random)


def run(engine: Engine, inputs, lr=1e-3):
    losses = engine(*inputs)
    engine.backward(losses.total)
    return losses, engine.step(lr)


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.state().items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing(precision, poison):
    engine = make_engine(precision)
    dtype = next(engine.module.parameters()).dtype
    run(engine, batch(dtype=dtype))
    before, weights = snapshot(engine), copy.deepcopy(engine.module.state_dict())
    images, *rest = batch(seed=1, dtype=dtype)
    images[2, 0, 3, 3] = poison
    _, result = run(engine, (images, *rest))
    assert result.skipped == 1
    after = snapshot(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, engine.module.state_dict()[name]) for name, value in weights.items())
    _, result = run(engine, batch(seed=2, dtype=dtype))
    assert result.skipped == 0
    assert torch.isfinite(result.grad_norm)
    assert not torch.equal(snapshot(engine)["param/mask_token"], before["param/mask_token"])
    # The skipped step was not counted: bias corrections go on where they were.
    assert engine.state()["step"] == 2


def test_bfloat16_keeps_small_updates_in_float32_masters():
    """At a rate where single updates vanish in bfloat16, the masters move and the weights are their rounding."""
    engine = make_engine("bfloat16")
    start = snapshot(engine)["param/encoder.blocks.0.attn.qkv.weight"]
    for step in range(3):
        run(engine, batch(seed=step, dtype=torch.bfloat16), lr=1e-6)
    state = engine.state()
    moved = state["param/encoder.blocks.0.attn.qkv.weight"] - start
    assert 0 < moved.abs().max() < 1e-5
    for name, parameter in engine.module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, state[f"param/{name}"].bfloat16()), name


def test_bfloat16_follows_float32():
    reference, engine = make_engine("float32"), make_engine("bfloat16")
    for step in range(10):
        exact, _ = run(reference, batch(seed=step))
        rounded, _ = run(engine, batch(seed=step, dtype=torch.bfloat16))
        assert float(rounded.total) == pytest.approx(float(exact.total), rel=2e-2)


def test_accumulation_is_the_larger_batch():
    whole, halves = make_engine(), make_engine(accumulation=2)
    for step in range(3):
        inputs = batch(size=8, seed=step)
        _, expected = run(whole, inputs)
        for part in zip(*(value.split(4) for value in inputs), strict=True):
            halves.backward(halves(*part).total)
        result = halves.step(1e-3)
        torch.testing.assert_close(result.grad_norm, expected.grad_norm, rtol=1e-5, atol=0)
    for (name, a), b in zip(whole.module.named_parameters(), halves.module.parameters(), strict=True):
        if not name.endswith("norm_k.bias"):  # zero gradient but for rounding
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-6, name


def test_clipping_is_torchs():
    """The update of one clipped step equals torch's clip_grad_norm_ followed by AdamW on a copy."""
    engine = make_engine(clip=0.5)
    model = copy.deepcopy(engine.module)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    for step in range(3):
        _, result = run(engine, batch(seed=step))
        optimizer.zero_grad()
        model(*batch(seed=step)).total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5
        torch.testing.assert_close(result.grad_norm, norm, rtol=1e-6, atol=0)
        optimizer.step()
    for (name, a), b in zip(engine.module.named_parameters(), model.parameters(), strict=True):
        if not name.endswith("norm_k.bias"):
            assert (a - b).norm() <= 1e-5 * a.norm() + 1e-6, name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_state_continues_bit_for_bit(precision):
    engine, dtype = make_engine(precision), torch.bfloat16 if precision == "bfloat16" else torch.float32
    for step in range(2):
        run(engine, batch(seed=step, dtype=dtype))
    other = make_engine(precision, seed=9)
    other.load_state(snapshot(engine))
    for step in range(2, 4):
        run(engine, batch(seed=step, dtype=dtype))
        run(other, batch(seed=step, dtype=dtype))
    ours, theirs = engine.state(), other.state()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_never_waits_for_the_device(precision):
    engine, dtype = make_engine(precision), torch.bfloat16 if precision == "bfloat16" else torch.float32
    keep = torch.ones(2 * (2 + 2 + 4 + 4), 4)
    run(engine, batch(dtype=dtype))
    with NoHostReads():
        losses = engine(*batch(seed=1, dtype=dtype), keep)
        engine.backward(losses.total)
        engine.step(1e-3)
