"""run_gpu.sh: what it needs, with packages blocked; its calls, with an interpreter that only writes them down."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
BLOCK = """import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def run_without(names, tmp_path, call, **environment):
    """The script with the real interpreter, which cannot import these packages."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(names=names))
    settings = {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "out"), **environment}
    settings = {"WHEELS": str(tmp_path / "none"), **settings}
    return subprocess.run([SCRIPT, call], env=os.environ | settings, capture_output=True, text=True)


@pytest.mark.parametrize("call", ["A", "--cpu-rehearsal"])
def test_missing_packages_are_named_in_one_line(tmp_path, call):
    names = ("omegaconf", "simplejpeg", "rich", "deepspeed", "nvidia", "xformers", "liger_kernel")
    done = run_without(names, tmp_path, call)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("run_gpu.sh: missing omegaconf, simplejpeg, rich; ")
    assert "benchmarks/carry_wheels.sh fills .whl/" in line
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_data_needs_dali_too(tmp_path):
    done = run_without(("simplejpeg", "nvidia"), tmp_path, "E")
    assert done.returncode == 2
    assert "missing simplejpeg, nvidia.dali; " in done.stderr
    assert "carry_wheels.sh --dali fills" in done.stderr


def test_wheels_that_were_carried_are_installed(tmp_path):
    """A wheel whose package is another of the same name as the missing one would be."""
    wheels = tmp_path / "wheels"
    source = tmp_path / "package"
    (source / "absent_package").mkdir(parents=True)
    (source / "absent_package" / "__init__.py").touch()
    (source / "setup.py").write_text(
        "from setuptools import setup; setup(name='absent-package', version='1', packages=['absent_package'])"
    )
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    made = subprocess.run([*build, "-w", wheels, source], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs setuptools, to build a wheel: {made.stderr.strip()[-200:]}")
    script = (tmp_path / "benchmarks" / "run_gpu.sh", SCRIPT.read_text().replace("omegaconf", "absent_package"))
    script[0].parent.mkdir()
    script[0].write_text(script[1])
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    for folder, missing in (("none", True), ("wheels", False)):
        settings = environment | {"WHEELS": str(tmp_path / folder)}
        done = subprocess.run(["bash", script[0], "A"], env=settings, capture_output=True, text=True)
        assert ("missing absent_package" in done.stderr) == missing, done.stderr


@pytest.fixture
def run(tmp_path):
    def start(*options, device="nvidia-h100-80gb-hbm3", failing="nothing", **environment):
        python = tmp_path / "python"
        python.write_text(f"""#!/usr/bin/env bash
if [ "$1" = -c ]; then
  [[ $2 == *find_spec* ]] || echo {device}
  exit
fi
echo "$@" >> {tmp_path}/calls
[[ $2 == *{failing}* ]] && exit 7
exit 0
""")
        python.chmod(0o755)
        settings = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out"), **environment}
        done = subprocess.run([SCRIPT, *options], env=settings, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, calls

    return start


def names(calls):
    return [re.fullmatch(r"-m benchmarks\.\w+\.(\w+) .*", call)[1] for call in calls]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("A", ["peaks", "correctness"]),
        ("B", ["ops"] * 3),
        ("C", ["train_step"] * 4),
        ("D", ["loss_parity", "tokenizer", "train_step"]),
        ("E", ["correctness", "masks", "data_loading", "train_step"]),
        ("quick", ["peaks", "correctness", "train_step", "ops"]),
    ],
)
def test_suites_of_a_call(run, call, expected, tmp_path):
    done, calls = run(call)
    assert done.returncode == 0, done.stderr
    assert names(calls) == expected
    assert all(f"--json {tmp_path}/out/" in line for line in calls)
    assert not any("--again" in line for line in calls)


def test_measuring_anew(run):
    _, calls = run("B", "--again")
    assert all(" --again " in line for line in calls)


def test_every_suite_is_rehearsed(run):
    _, calls = run("--cpu-rehearsal", device="cpu")
    rehearsed = set(names(calls))
    (rehearsal,) = re.findall(r"  --cpu-rehearsal\)\n    bench.*?;;", SCRIPT.read_text(), re.DOTALL)
    modules = re.findall(r"bench \w+ \d+ \w+\.(\w+)", SCRIPT.read_text().replace(rehearsal, ""))
    assert set(modules) == rehearsed


def test_every_test_that_needs_a_gpu_is_in_a_call(run):
    run("A")
    _, calls = run("E")
    given = [path for line in calls if "correctness " in line for path in line.partition(" -- ")[2].split()]
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    marked = [path.relative_to(ROOT) for path in marked if "benchmarks" not in path.parts]
    assert len(marked) > 10
    for path in marked:
        assert any(path.is_relative_to(folder) for folder in given), path


def test_a_failure_is_reported_and_stops_nothing(run):
    done, calls = run("D", failing="loss_parity")
    assert done.returncode == 1
    assert names(calls)[-1] == "train_step"
    assert "FAILED: loss_parity (status 7)" in done.stdout


def test_a_gpu_is_needed_for_numbers_of_a_gpu(run):
    done, calls = run("quick", device="cpu")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert not calls


@pytest.mark.parametrize("options", [("fast",), (), ("A", "--fast")])
def test_unknown_options(run, options):
    done, calls = run(*options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not calls
