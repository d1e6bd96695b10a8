"""The baselines' optimizer step against the engine's own, over clipped, unclipped and skipped steps."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.speed.torch_adamw import TorchAdamW
from cae_fast.config import OptimConfig
from cae_fast.training.engine import Engine


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_update_as_the_engines(precision):
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    optim = OptimConfig(clip_grad_norm=1.0)
    ours, theirs = (Engine(copy.deepcopy(model), optim, precision, torch.device("cpu"), 1) for _ in range(2))
    theirs.step = TorchAdamW(theirs)
    for scale in (100.0, 0.01, float("nan"), 1.0):
        results = []
        for engine in (ours, theirs):
            torch.manual_seed(1)
            x = torch.randn(4, 7).to(engine.parameters[0].dtype)
            engine.backward(engine(x).square().mean() * scale)
            results.append(engine.step(1e-2))
        assert results[1].skipped == results[0].skipped == (scale != scale)
        norms = [result.grad_norm.nan_to_num().item() for result in results]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4 if precision == "float32" else 1e-2)
        assert all(p.grad is None for p in theirs.parameters)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), theirs.masters, strict=True))
    tolerance = 1e-5 if precision == "float32" else 1e-2
    for name in ("masters", "exp_avg", "exp_avg_sq", "weights"):
        for a, b in zip(getattr(theirs.adamw, name), getattr(ours.adamw, name), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance**2)
