"""What every Triton kernel becomes on a GPU, found without one: python -m cae_kernels.report."""

from .launches import collect
from .spec import Spec

__all__ = ["Spec", "collect"]
