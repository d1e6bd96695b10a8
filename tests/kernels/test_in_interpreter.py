"""Runs each file of tests/kernels/interpreter in a process of its own, with Triton's interpreter switched on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreter").glob("test_*.py"))
NOTHING_COLLECTED = 5


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton installed, for its interpreter")
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_in_interpreter(path, pytestconfig):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("CAE_KERNELS", None)
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env=environment, capture_output=True, text=True)
    assert done.returncode != NOTHING_COLLECTED, f"no test in {path}"
    assert done.returncode == 0, done.stdout + done.stderr
