"""cae-fast bench: which script runs with what, and its errors."""

import json

import pytest

import cae_fast
from cae_fast.cli import main

SCRIPT = """import json, os, sys, cae_kernels
made = [sys.argv[1:], os.path.dirname(cae_kernels.__file__)]
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps(made))
sys.exit(1)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "kernels" / "cae_kernels").mkdir(parents=True)
    (tmp_path / "kernels" / "cae_kernels" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "ops.py").write_text(SCRIPT)
    monkeypatch.setattr(cae_fast, "__file__", str(tmp_path / "cae_fast" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_options_and_status_are_the_scripts(checkout):
    assert main(["bench", "ops", "-k", "attention", "--json", "mine.json"]) == 1
    arguments, kernels = json.loads((checkout / "mine.json").read_text())
    assert arguments == ["-k", "attention", "--json", "mine.json"]
    assert kernels == str(checkout / "kernels" / "cae_kernels")  # of this checkout, whatever is installed


def test_results_are_saved_without_being_asked_for(checkout):
    main(["bench", "ops"])
    assert json.loads((checkout / "bench_ops.json").read_text())[0] == ["--json", "bench_ops.json"]


def test_without_a_checkout(checkout, capsys):
    assert main(["bench", "step"]) == 2
    error = capsys.readouterr().err
    assert str(checkout / "benchmarks" / "train_step.py") in error
    assert "source checkout" in error
    assert error.count("\n") == 1


def test_unknown_benchmark(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "speed"])
    assert stopped.value.code == 2
    assert "tokenizer" in capsys.readouterr().err
