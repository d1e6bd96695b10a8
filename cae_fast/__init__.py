"""cae_fast: fast pretraining of context autoencoders (CAE, arXiv 2202.03026)."""

__version__ = "0.1.0"
