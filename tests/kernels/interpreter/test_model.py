"""A tiny CAE through every Triton kernel of its forward and backward pass, against the golden numbers."""

import importlib

import pytest
import torch

from cae_fast.config import ModelConfig
from cae_fast.models.cae import ContextAutoencoder
from cae_kernels import drop_path_scales
from cae_kernels.dispatch import backend
from golden_model import golden_model, ours, split_mask

OPS = [
    *("attention", "cross_attention", "gather_tokens", "layer_norm"),
    *("linear_cross_entropy", "linear_gelu", "residual_norm", "squared_error"),
]


def launched(monkeypatch) -> set[str]:
    """Names of the ops whose kernels run from here on."""
    from triton.runtime import interpreter

    names: set[str] = set()
    call = interpreter.GridExecutor.__call__

    def record(self, *args, **kwargs):
        names.add(self.fn.__module__.removeprefix("cae_kernels."))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    return names


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm().clamp_min(1e-12))


def batch_of(tensors):
    mask = tensors["in.mask"].flatten(1)
    return tensors["in.image"], *split_mask(mask), tensors["in.labels"].view(len(mask), -1)


def test_golden_losses_and_gradients(golden, monkeypatch):
    for op in OPS:
        assert backend(op, torch.zeros(1)) == "triton"
    tensors = golden("cae_tiny.safetensors")
    model = golden_model(tensors)
    modules = launched(monkeypatch)
    losses = model(*batch_of(tensors))
    losses.total.backward()
    assert relative(losses.total, tensors["out.loss"]) < 1e-5
    assert relative(losses.main, tensors["out.loss_main"]) < 1e-5
    assert relative(2 * losses.alignment, tensors["out.loss_align"]) < 1e-5
    for name, expected in ours(tensors, "grad.").items():
        actual = model.get_parameter(name).grad
        if name.endswith("norm_k.bias"):  # zero but for rounding
            assert actual.abs().max() < 1e-6
        else:
            assert relative(actual, expected) < 1e-4, name
    kernels = {importlib.import_module(f"cae_kernels.{name}").__name__ for name in modules}
    assert len(kernels) >= 7, f"kernels of {sorted(kernels)} only"


@pytest.mark.parametrize("changes", [{}, {"decoder_embed_dim": 48, "decoder_num_heads": 2}])
def test_drop_path_and_bfloat16_follow_the_reference(monkeypatch, changes):
    """Pixels as targets, dropped branches, another decoder width: kernels in bfloat16 against plain float32."""
    config = ModelConfig(size="tiny", image_size=16, embed_dim=64, depth=2, num_heads=2, drop_path_rate=0.3, **changes)
    model = ContextAutoencoder(config, 48, predict_codes=False)
    keep = drop_path_scales(1, torch.arange(3), torch.tensor(model.branch_rates()))
    assert (keep == 0).any()
    ids = torch.arange(16).expand(3, -1)
    images, targets = torch.randn(3, 3, 16, 16), torch.randn(3, 8, 48)
    inputs = ids[:, ::2].contiguous(), ids[:, 1::2].contiguous()

    def gradients(
        dtype: torch.dtype, kernels: str, checkpointed: bool = False
    ) -> tuple[float, dict[str, torch.Tensor]]:
        monkeypatch.setenv("CAE_KERNELS", kernels)
        copy = ContextAutoencoder(config, 48, predict_codes=False).to(dtype)
        copy.checkpoint_blocks(checkpointed)
        copy.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()})
        losses = copy(images.to(dtype), *inputs, targets, keep)
        losses.total.backward()
        return float(losses.total.detach()), {n: p.grad.double() for n, p in copy.named_parameters()}

    exact_loss, exact = gradients(torch.float32, "all=reference")
    fused_loss, fused = gradients(torch.float32, "")
    assert fused_loss == pytest.approx(exact_loss, rel=1e-5)
    again_loss, again = gradients(torch.float32, "", checkpointed=True)
    assert again_loss == fused_loss
    assert all(again[name].equal(fused[name]) for name in fused)
    plain_loss, plain = gradients(torch.bfloat16, "all=reference")
    bfloat16_loss, rounded = gradients(torch.bfloat16, "")
    assert bfloat16_loss == pytest.approx(exact_loss, rel=2e-2)
    assert plain_loss == pytest.approx(exact_loss, rel=2e-2)

    def distance(to: dict[str, torch.Tensor]) -> float:
        return float(sum((to[n] - exact[n]).square().sum() for n in exact) ** 0.5)

    total = float(sum(g.square().sum() for g in exact.values()) ** 0.5)
    assert distance(fused) < 1e-5 * total
    assert distance(rounded) < max(1.1 * distance(plain), 1e-2 * total)
