"""The whole-step benchmark at its smallest size: every variant steps, is described and sorted into parts."""

import json
from dataclasses import replace

import pytest

from benchmarks.speed import train_step
from benchmarks.speed.step_parts import PARTS


def asked(folder, variant):
    return {
        "model": "tiny",
        "variant": variant,
        "batch": 4,
        "tokenizer": str(train_step.write_tokenizer(folder, "tiny")),
        "folder": str(folder),
        "data": None,
        "warmup": 1,
        "steps": 2,
        "largest": False,
    }


@pytest.mark.parametrize("variant", ["ours", "reference", "original"])
def test_a_variant(variant, tmp_path):
    row = json.loads(json.dumps(train_step.measure_variant(asked(tmp_path, variant))))
    assert len(row["step_ms"]) == 2
    assert set(row["profile"]["parts"]) == set(PARTS)
    for part in ("GEMM", "attention", "norm/elementwise", "tokenizer", "optimizer"):
        assert row["profile"]["parts"][part] > 0, part
    assert 5 < row["loss"] < 12  # about ln(512) + 2
    assert row["flops_all"] > row["flops_model"] > 0
    assert row["mfu_all"] is None
    assert row["images_per_second"] == pytest.approx(4e3 / sorted(row["step_ms"])[0], rel=1)


def test_real_images(tmp_path):
    row = train_step.measure_variant(asked(tmp_path, "ours") | {"data": "bundled:photographs"})
    assert len(row["step_ms"]) == 2
    assert 5 < row["loss"] < 12


def test_first_losses_agree_across_variants(tmp_path):
    """Before any update: the same weights, images, masks and codes, without drop path."""
    losses = []
    for variant in ("ours", "reference", "original"):
        job = train_step.make_job(asked(tmp_path, variant))
        job.drop_path_rates.zero_()
        job.model.shape = replace(job.model.shape, drop_path_rate=0.0)
        (metrics,) = list(train_step.make_steps(job, variant)(train_step.synthetic(job, 4, 1)))
        losses.append(float(metrics["loss"]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


def test_a_failed_variant_is_reported(tmp_path):
    row = train_step.in_own_process(asked(tmp_path, "ours") | {"tokenizer": "nowhere.safetensors"}, limit=120)
    assert "nowhere.safetensors" in row["failed"]
    assert "FAILED" in train_step.table_row(row)


def test_only_baselines_take_plain_torch(tmp_path, monkeypatch):
    """Which kernels and which optimizer a variant has, as its own process would be started."""
    seen = {}

    def start(command, env, **_):
        seen[json.loads(command[-1])["variant"]] = env.get("CAE_KERNELS")
        raise train_step.subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(train_step.subprocess, "run", start)
    monkeypatch.delenv("CAE_KERNELS", raising=False)
    for variant in train_step.VARIANTS:
        assert "longer than" in train_step.in_own_process(asked(tmp_path, variant), 1)["failed"]
    plain = {"compiled", "original", "reference"}
    assert seen == {variant: "all=reference" if variant in plain else None for variant in train_step.VARIANTS}


def test_rows_are_kept_and_not_measured_again(tmp_path, monkeypatch, capsys):
    calls = []

    def pretend(asked, limit):
        calls.append(asked["variant"])
        row = {key: asked[key] for key in ("model", "variant", "batch")} | {"data": "synthetic"}
        return row | ({"failed": "no"} if asked["variant"] == "original" else {"images_per_second": 1.0})

    monkeypatch.setattr(train_step, "in_own_process", pretend)
    monkeypatch.setattr(train_step, "table_row", str)
    options = ["--tiny", "--json", str(tmp_path / "steps.json"), "--variants"]
    assert train_step.main([*options, "ours", "original"]) == 1
    assert train_step.main([*options, "ours", "original", "reference"]) == 1  # the failed one is tried again
    assert calls == ["ours", "original", "original", "reference"]
    assert train_step.main([*options, "ours", "--again"]) == 0
    assert calls[4:] == ["ours"]
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["ours", "original", "reference"]
    monkeypatch.setattr("benchmarks.record.source", lambda: "another")
    train_step.main([*options, "ours"])
    assert calls[5:] == ["ours"]  # of another source: everything again


def test_largest_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        train_step.parse(["--largest"])
    assert "needs a CUDA GPU" in capsys.readouterr().err
