"""cae_fast: fast pretraining of context autoencoders (CAE, arXiv 2202.03026)."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`cae_fast.load_encoder`, imported when it is used: `import cae_fast` alone does not import torch."""
    if name == "load_encoder":
        from cae_fast.models.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
