"""Triton where it is installed; without it, kernels can still be defined (never launched), so every op imports."""

import importlib
import os
from typing import Any

# Triton 3.9 warns that its default will change; kernels whose bits must not depend on it say enable_fp_fusion=False.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


class _Missing:
    """Stands for the module in decorators and annotations."""

    def __getattr__(self, name: str) -> "_Missing":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
    libdevice: Any = importlib.import_module("triton.language.extra.libdevice")
except ImportError:
    triton = tl = libdevice = _Missing()

HAVE_TRITON = not isinstance(triton, _Missing)
INTERPRETED = HAVE_TRITON and bool(triton.knobs.runtime.interpret)
