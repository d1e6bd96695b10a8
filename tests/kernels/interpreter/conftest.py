"""Tests of the Triton kernels in Triton's interpreter, which has to be chosen before Triton is imported.

Run them by TRITON_INTERPRET=1 pytest tests/kernels/interpreter; the normal suite does so, one process per file, in
tests/kernels/test_in_interpreter.py. Test files here may `from checking import ...` and `from repair import ...`.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.insert(0, str(Path(__file__).parent))
    import repair

    repair.install()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def written():
    """written(out, ...) asserts that kernels of this test have stored every element of the tensors."""
    with repair.watch() as watching:
        yield watching


@pytest.fixture(autouse=True)
def _poisoned_allocations():
    """torch.empty and its like hold NaN (the largest value for integers) instead of whatever was there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
