"""The rule by which the fused path passes, and a short run of it all."""

import json

import pytest

from benchmarks.speed import loss_parity


def curves(fused, plain, steps=30):
    return {"float32": [[1.0] * steps], "plain bf16": [[1.0 + plain] * steps], "fused bf16": [[1.0 - fused] * steps]}


@pytest.mark.parametrize(
    ("fused", "plain", "status"), [(0.1, 0.1, 0), (0.109, 0.1, 0), (0.112, 0.1, 1), (0.0, 0.1, 0), (float("nan"), 1, 1)]
)
def test_verdict(fused, plain, status):
    assert loss_parity.verdict(loss_parity.deviations(curves(fused, plain))) == status


def test_deviation_is_the_largest_window_averaged_over_seeds():
    truth = [[0.0] * 30] * 2
    spike = [0.0] * 15 + [1.0] + [0.0] * 14
    paths = {"float32": truth, "plain bf16": [spike, [0.0] * 30], "fused bf16": [[0.0] * 25 + [2.0] * 5] * 2}
    assert loss_parity.deviations(paths) == pytest.approx({"plain bf16": 0.05, "fused bf16": 1.0})


def test_the_exit_status_follows_the_curves(monkeypatch, tmp_path):
    made = curves(0.3, 0.1)
    monkeypatch.setattr(loss_parity, "train_path", lambda path, seed, steps: made[path][0])
    assert loss_parity.main(["--json", str(tmp_path / "parity.json"), "--png", str(tmp_path / "parity.png")]) == 1
    saved = json.loads((tmp_path / "parity.json").read_text())
    assert saved["passed"] is False
    assert saved["curves"]["fused bf16"] == made["fused bf16"]
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_paths_start_alike_and_differ_in_precision():
    truth = loss_parity.train_path("float32", 0, 2)
    plain = loss_parity.train_path("plain bf16", 0, 2)
    assert plain[0] == pytest.approx(truth[0], rel=2e-2)
    assert plain != truth
    assert loss_parity.train_path("fused bf16", 0, 2) == plain  # on a CPU they are one
