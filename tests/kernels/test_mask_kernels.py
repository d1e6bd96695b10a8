"""What the mask kernels' bits depend on, seen in their code; the bits themselves are compared in the interpreter."""

import importlib.util
import os
import re

import pytest

from cae_kernels.random_mask import SETTINGS
from cae_kernels.report import collect
from cae_kernels.report.compile import compile_ptx


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton installed, for its compiler")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs TRITON_INTERPRET unset")
def test_every_operation_is_rounded_on_its_own():
    assert SETTINGS["enable_fp_fusion"] is False
    spec = collect("block_mask")[0]
    assert {name: SETTINGS[name] for name in spec.options} == spec.options
    code = compile_ptx(spec, 90)
    operations = {name for name in re.findall(r"^\s*(?:@%p\d+ )?([a-z0-9.]+)\s", code, re.MULTILINE) if ".f32" in name}
    assert {"mul.f32", "add.f32", "sub.f32"} <= {name.replace(".rn", "") for name in operations}
    assert {"sqrt.rn.f32", "div.rn.f32"} <= operations
    inexact = ("fma", "approx", "full", "ftz")
    # Rounding down (cvt.rmi) may flush denormals: it makes 0 of them anyway.
    assert not [name for name in operations if any(part in name for part in inexact) and not name.startswith("cvt.rmi")]
