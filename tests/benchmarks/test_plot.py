"""Tables and pictures from synthetic results: what is measured is shown under its device, what is not says so."""

import json

import pytest

from benchmarks import plot

README = "\n".join(
    f"{plot.BEGIN.format(name=n)}\nold\n{plot.END.format(name=n)}\n" for n in ("measured", "cpu", "proof", "static")
)
FACTS = {"driver": "580.1", "cuda": "13.0", "versions": {"torch": "2.11", "triton": "3.6.0"}, "revision": "abc123"}
FACTS |= {"command": "benchmarks/x.py", "time": "2026-01-02T00:00:00Z", "processor": "a CPU"}
H100 = "NVIDIA H100 80GB HBM3"


def step(model, variant, ms, **more):
    profile = {"parts": dict.fromkeys(plot.PARTS, ms / 10), "busy": ms / 2}
    row = {"model": model, "variant": variant, "batch": 256, "data": "synthetic", "step_ms": [ms] * 3}
    row |= {"images_per_second": 256e3 / ms, "mfu_model": 0.44, "mfu_all": 0.51, "peak_bytes": 41e9, "idle_ms": 1.5}
    return row | {"profile": profile} | more


def op_row(backend, forward, backward):
    row = {"op": "attention", "shape": "ViT-L", "backend": backend, "moved": [208e6, 363e6], "flops": [1e10, 2.5e10]}
    return row | {"forward_ms": [forward] * 3, "backward_ms": [backward] * 3, "error": 0.0}


@pytest.fixture
def draw(tmp_path):
    def run(*records):
        folder = tmp_path / "results" / "x"
        folder.mkdir(parents=True, exist_ok=True)
        for number, (suite, device, content) in enumerate(records):
            text = json.dumps(FACTS | {"suite": suite, "device": device} | content)
            (folder / f"{number}.json").write_text(text)
        (tmp_path / "README.md").write_text(README)
        assert plot.main(["--results", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md")]) == 0
        return (tmp_path / "README.md").read_text()

    return run


def cells(text, start):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_nothing_measured(draw):
    text = draw()
    assert "on a GPU: not measured" in text
    assert "On a CPU: not measured" in text
    assert "Counts: not measured" in text
    assert "old" not in text


def test_steps_of_a_gpu(draw, tmp_path):
    rows = [step("ViT-L", "ours", 185.0), step("ViT-L", "original", 555.0), {"model": "ViT-L", "variant": "compiled"}]
    rows[-1] |= {"batch": 256, "data": "synthetic", "failed": "took longer than 110 s"}
    text = draw(("train_step", H100, {"rows": rows}))
    assert cells(text, "ViT-L ours")[1:6] == ["256", "185.0", "1384", "44.0% / 51.0%", "41.0"]
    assert cells(text, "ViT-L original")[6] == "3.00x"
    assert cells(text, "ViT-L compiled")[1] == "not measured"
    assert cells(text, "ViT-H ours")[1] == "not measured"
    assert "Loss parity of the fused path: not measured" in text
    picture = tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "steps.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(results/nvidia-h100-80gb-hbm3/steps.png)" in text


def test_two_files_of_steps_are_one_table(draw):
    first = ("train_step", H100, {"rows": [step("ViT-L", "ours", 200.0)], "time": "2026-01-01T00:00:00Z"})
    second = ("train_step", H100, {"rows": [step("ViT-L", "ours", 185.0), step("ViT-H", "ours", 212.0)]})
    text = draw(second, first)
    assert cells(text, "ViT-L ours")[2] == "185.0"  # the newer one
    assert cells(text, "ViT-H ours")[2] == "212.0"


def test_ops_of_a_gpu(draw, tmp_path):
    content = {"ceilings": {"copy": 3e12, "product": 8e14}}
    content["rows"] = [op_row("reference", 0.2, 0.6), op_row("triton", 0.1, 0.3)]
    content["rows"].append({**op_row("xformers", 1, 1), "failed": "error 1e+00; not timed"})
    text = draw(("ops", H100, content))
    rows = [line for line in text.splitlines() if line.startswith("| attention |")]
    assert "| triton | 100 | 300 | 48% | 48% | 2.00x |" in rows[1]
    assert "failed" in rows[2]
    assert "1e+00" not in rows[2]
    assert (tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "roofline.png").exists()


def test_rates_of_a_card(draw):
    assert "Rates of this card: not measured" in draw(
        ("ops", H100, {"ceilings": {"copy": 3e12, "product": 8e14}, "rows": []})
    )
    text = draw(("peaks", H100, {"rates": {"linears": 583e12, "cube": 798e12, "copy": 2.95e12}, "rows": []}))
    assert "own shapes: linears 583 TFLOP/s, cube 798 TFLOP/s, copy 2.95 TB/s (" in text


def test_other_shapes_of_ops_are_added(draw):
    first = {"ceilings": {"copy": 3e12, "product": 8e14}, "rows": [op_row("reference", 0.2, 0.6)]}
    other = [op_row("reference", 0.4, 0.4) | {"shape": "ViT-H"}, op_row("triton", 0.2, 0.2) | {"shape": "ViT-H"}]
    second = {"ceilings": {"copy": 2e12, "product": 8e14}, "rows": other, "time": "2026-01-03T00:00:00Z"}
    text = draw(("ops", H100, second | {"command": "benchmarks/y.py"}), ("ops", H100, first))
    rows = [line for line in text.splitlines() if line.startswith("| attention |")]
    assert len(rows) == 3, rows
    assert "(`benchmarks/x.py; benchmarks/y.py`" in text
    assert "| attention | ViT-L | reference | 200 | 600 | 24% | 24% | 1.00x |" in rows  # of its own run's bandwidth
    assert "| attention | ViT-H | triton | 200 | 200 | 71% | 71% | 2.00x |" in rows


def test_proof_of_learning(draw, tmp_path):
    assert "random weights: not measured" in draw()
    folder = tmp_path / "results" / "proof_of_learning"
    folder.mkdir()
    seeds = {str(seed): {"knn": 70.0 + seed, "decoded": 0.5} for seed in range(3)}
    made = {"revision": "abc", "versions": {"torch": "2.15"}}
    record = {"steps": {"fashion": 1500}, "results": {"fashion": {"cae": seeds}}, "provenance": made}
    (folder / "results.json").write_text(json.dumps(record))
    text = draw()
    assert "| fashion | cae | 71.0 (70.0..72.0) |" in text
    assert (folder / "probes.png").read_bytes().startswith(b"\x89PNG")
    assert "(results/proof_of_learning/probes.png)" in text


def test_a_cpu_is_never_shown_as_a_gpu(draw):
    tiny = [step("tiny", "ours", 20.0, mfu_model=None, mfu_all=None, peak_bytes=None)]
    parity = {"kernels_ran": False, "deviations": {"plain bf16": 0.1, "fused bf16": 0.1}, "passed": True}
    text = draw(("train_step", "cpu", {"rows": tiny}), ("loss_parity", "cpu", parity))
    measured, rest = text.split(plot.END.format(name="measured"))
    assert "not measured" in measured
    assert "20.0" not in measured
    assert cells(rest, "ours")[1:] == ["20.0", "1.00x"]


def test_missing_markers(tmp_path):
    (tmp_path / "README.md").write_text("# no markers")
    with pytest.raises(ValueError, match="measured"):
        plot.main(["--results", str(tmp_path), "--readme", str(tmp_path / "README.md")])
