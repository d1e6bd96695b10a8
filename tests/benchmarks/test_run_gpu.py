"""run_gpu.sh with an interpreter that only writes down what it is asked to run."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "run_gpu.sh"


@pytest.fixture
def run(tmp_path):
    def start(option, device, failing="nothing"):
        python = tmp_path / "python"
        python.write_text(f"""#!/usr/bin/env bash
if [ "$1" = -c ]; then echo {device}; exit; fi
echo "$@" >> {tmp_path}/calls
[[ $1 == *{failing}* ]] && exit 7
exit 0
""")
        python.chmod(0o755)
        environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
        done = subprocess.run([SCRIPT, option], env=environment, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done, calls

    return start


def names(calls):
    return [call.split()[0].removeprefix("benchmarks/").removesuffix(".py") for call in calls]


def test_correctness_comes_first_and_each_suite_has_a_file(run, tmp_path):
    done, calls = run("--cpu-rehearsal", "cpu")
    assert done.returncode == 0, done.stderr
    assert names(calls) == ["correctness", "train_step", "loss_parity", "tokenizer", "ops"]
    assert all(f"--json {tmp_path}/out/" in call for call in calls)


def test_a_failure_is_reported_and_stops_nothing(run):
    done, calls = run("--cpu-rehearsal", "cpu", failing="loss_parity")
    assert done.returncode == 1
    assert names(calls)[-1] == "ops"
    assert "FAILED: loss_parity (status 7)" in done.stdout


def test_a_gpu_is_needed_for_numbers_of_a_gpu(run):
    done, calls = run("--quick", "cpu")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert not calls


def test_on_a_gpu(run):
    done, calls = run("--quick", "nvidia-h100-80gb-hbm3")
    assert done.returncode == 0
    assert names(calls) == ["correctness", "train_step", "ops"]


def test_what_the_first_run_has_no_time_for(run, tmp_path):
    done, calls = run("--rest", "nvidia-h100-80gb-hbm3")
    assert done.returncode == 0
    assert names(calls) == ["train_step", "ops", "ops", "train_step"]
    files = [call.split()[2] for call in calls]
    assert len(set(files)) == len(files)  # no suite overwrites another's file


def test_data_alone(run):
    done, calls = run("--data", "nvidia-h100-80gb-hbm3")
    assert done.returncode == 0
    assert names(calls) == ["correctness", "masks", "data_loading"]


def test_unknown_option(run):
    done, _ = run("--fast", "cpu")
    assert done.returncode == 2
    assert "--fast" in done.stderr
