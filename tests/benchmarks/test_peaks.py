"""Rates of a card: whether the shapes are a step's own, and the sums over them; and going on where a file ended."""

import json

import pytest
import torch

from benchmarks import record
from benchmarks.speed import ops, peaks
from cae_fast.models.dalle import DalleEncoder, DalleTokenizer

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", ["ViT-L", "ViT-H"])
def test_convolutions_are_the_tokenizers(model):
    """Against the tokenizer's own count, which has the last layer besides."""
    batch, patches, _, _, _, width = peaks.MODELS[model]
    found = sum(s.count * s.flops for s in peaks.shapes(model) if s.kind == "convolution")
    with torch.device("meta"):
        tokenizer = DalleTokenizer(DalleEncoder(width), None, "meta")
    last = 2 * tokenizer.encoder.output.weight.numel() * (patches // 2)
    assert found == batch * (tokenizer.encode_flops(round(patches**0.5), patches // 2) - last)


@pytest.mark.parametrize("model", ["ViT-L", "ViT-H"])
def test_products_are_the_encoders_and_the_heads(model):
    """24 n D^2 for each block and image, in the encoder and its target pass, and twice that backward in the encoder."""
    batch, patches, width, depth, codes, _ = peaks.MODELS[model]
    assert (batch, patches, width) == ops.SHAPES[model][:3]
    blocks = 24 * (patches // 2 + 1) * width**2 * depth
    head = 2 * (patches // 2) * width * codes
    found = sum(s.count * s.flops for s in peaks.shapes(model) if s.kind == "linear")
    assert found == batch * (4 * blocks + 3 * head)


def test_each_call_makes_what_its_name_says():
    """Against autograd: the gradients of a linear layer have these shapes, whatever is measured has them too."""
    for shape in peaks.shapes("tiny"):
        run, inputs = peaks.operands(shape, CPU)
        if shape.kind == "convolution":
            batch, _, after, _, side = shape.size
            assert run(*inputs).shape == (batch, after, side, side)
            continue
        rows, out, features = shape.size
        expected = {"forward": (rows, out), "d-input": (rows, features), "d-weight": (out, features)}
        assert run(*inputs).shape == expected[shape.direction]


def test_rates_are_of_the_whole_step():
    def row(kind, model, count, flops, ms):
        return {"kind": kind, "model": model, "count": count, "flops": flops, "ms": [ms] * 3}

    rows = [row("linear", "A", 3, 2e9, 1.0), row("linear", "B", 1, 4e9, 2.0), row("convolution", "A", 2, 1e9, 5.0)]
    rows.append({"kind": "copy", "model": "", "bytes_per_second": 7.0})
    found = peaks.rates(rows)
    assert found["linears"] == pytest.approx(10e9 / 5e-3)
    assert found["linears B"] == pytest.approx(2e12)
    assert found["convolutions"] == found["convolutions A"] == pytest.approx(2e9 / 10e-3)
    assert found["copy"] == 7.0
    assert "cube" not in found


def test_a_run_that_was_ended_goes_on(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(shape, device, seconds):
        measured.append(shape.key)
        if len(measured) == 5:
            raise KeyboardInterrupt
        return peaks.asdict(shape) | {"flops": shape.flops, "ms": [1.0]}

    monkeypatch.setattr(peaks, "measure", measure)
    monkeypatch.setattr(peaks, "copy_bandwidth", lambda device, seconds: 1e12)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    options = ["--models", "tiny", "--json", str(tmp_path / "peaks.json")]
    with pytest.raises(KeyboardInterrupt):
        peaks.main(options)
    assert peaks.main(options) == 0
    assert "has 5 rows" in capsys.readouterr().out
    assert len(set(measured)) == len(measured) - 1  # only the one that was cut short comes twice
    assert json.loads((tmp_path / "peaks.json").read_text())["rates"]["copy"] == 1e12
    before = len(measured)
    peaks.main([*options, "--again"])
    assert len(measured) == 2 * (before - 1) + 1


def test_records_of_another_source_or_device_do_not_count(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    record.save(path, record.record("x", steps=3, rows=[]))
    assert record.earlier(path, steps=3)["suite"] == "x"
    assert record.earlier(path, steps=4) is None
    assert record.earlier(tmp_path / "none.json") is None
    for name in ("source", "device_name"):
        with monkeypatch.context() as context:
            context.setattr(record, name, lambda: "another")
            assert record.earlier(path) is None


def test_a_lost_device_is_left_behind(tmp_path, monkeypatch):
    """ops.py starts itself anew after a backend that lost the GPU, and then keeps that row as failed."""
    monkeypatch.setattr(ops, "backends", lambda op, device: ["reference", "bad", "after"])
    monkeypatch.setattr(ops, "count_flops", lambda case: [0, 0])
    measured, lost = [], []

    def measure(case, name, truth, device, seconds):
        measured.append(name)
        row = {"op": case.op, "shape": case.shape, "backend": name, "moved": case.moved}
        return row | {"failed": "illegal address"}

    def start_again():
        lost.append(measured[-1])
        monkeypatch.setenv(record.KEEP_FAILED, "1")
        raise SystemExit

    monkeypatch.setattr(ops, "measure", measure)
    monkeypatch.setattr(ops, "device_lost", lambda: measured[-1] == "bad")
    monkeypatch.setattr(ops, "start_again", start_again)
    for name in ("copy_bandwidth", "product_rate"):
        monkeypatch.setattr(ops, name, lambda device, seconds: 1e12)
    options = ["-k", "squared_error", "--shapes", "tiny", "--json", str(tmp_path / "ops.json")]
    with pytest.raises(SystemExit):
        ops.main(options)
    assert ops.main(options) == 1
    assert (measured, lost) == (["reference", "bad", "after"], ["bad"])
    assert [row["backend"] for row in json.loads((tmp_path / "ops.json").read_text())["rows"]] == measured
