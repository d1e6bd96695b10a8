import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Read one golden file: golden("cae_tiny.safetensors") or golden("flops.json")."""

    def read(name: str):
        path = GOLDEN / name
        return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)

    return read


@pytest.fixture(scope="session")
def timm():
    """The independent truth about vision transformers and their files."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter with a torchvision of another build than torch's
        pytest.skip(f"needs timm, with a torchvision made for this torch: {error}")
    return timm


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
