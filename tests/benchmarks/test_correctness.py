"""The recording of GPU tests with tests of its own: outcomes as they come, going on, hangs, crashes, nothing found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """import os, time, pytest
pytestmark = pytest.mark.gpu
def test_first(): pass
def test_second():
    assert not os.path.exists("broken")
@pytest.mark.skip(reason="needs nothing")
def test_third(): pass
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")

    def start(tests=TESTS, *options):
        (tmp_path / "test_it.py").write_text(tests)
        command = [sys.executable, "-m", "benchmarks.speed.correctness", "--json", "found.json", *options, "--", "."]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done, json.loads((tmp_path / "found.json").read_text())

    return start


def outcomes(found):
    return {name.partition("::")[2]: test["outcome"] for name, test in found["tests"].items()}


def test_failed_tests_run_again_and_passed_ones_do_not(run, tmp_path):
    (tmp_path / "broken").touch()
    done, found = run()
    assert done.returncode == 1
    assert outcomes(found) == {"test_first": "passed", "test_second": "failed", "test_third": "skipped"}
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["collected"] == 3
    (tmp_path / "broken").unlink()
    done, found = run()
    assert done.returncode == 0
    assert "1 tests passed before" in done.stdout
    assert "1 passed, 1 skipped, 1 deselected" in done.stdout
    assert found["counts"] == {"passed": 2, "skipped": 1}


def test_a_crash_and_a_hang_cost_only_themselves(run):
    tests = TESTS.replace("test_first(): pass", "test_first(): os._exit(9)")
    tests = tests.replace('assert not os.path.exists("broken")', "time.sleep(600)")
    done, found = run(tests, "--limit", "3")
    assert done.returncode == 1
    assert outcomes(found) == {"test_first": "failed", "test_second": "failed", "test_third": "skipped"}
    messages = [test.get("message") for test in found["tests"].values()]
    assert messages[:2] == ["its process ended with status 9", "took longer than 3 s"]


def test_a_file_that_cannot_be_read_fails_but_stops_nothing(run, tmp_path):
    (tmp_path / "test_broken.py").write_text("import no_such_package")
    done, found = run()
    assert done.returncode == 1
    assert "no_such_package" in found["errors"]["test_broken.py"]
    assert found["counts"]["passed"] == 2


def test_nothing_found_is_a_failure(run):
    done, found = run("def test_other(): pass")
    assert done.returncode == 1
    assert found["collected"] == 0
    assert "0 found, 0 ran" in done.stdout


def test_each_outcome_is_there_before_the_next_test(run):
    look = "import json; assert 'test_it.py::test_first' in json.load(open('found.json'))['tests']"
    done, _ = run(TESTS.replace('assert not os.path.exists("broken")', look))
    assert done.returncode == 0, done.stdout
