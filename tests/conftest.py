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


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
