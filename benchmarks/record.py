"""Results on disk: one JSON file for each suite, with what its numbers belong to and every raw sample."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

L2_BYTES = 50 * 2**20  # of an H100; more than that between two uses of a tensor, and it comes from memory again


def device_name() -> str:
    """As results are filed: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def folder_name(device: str) -> str:
    """Of benchmarks/results: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def driver() -> str | None:
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None


def record(suite: str, **results: Any) -> dict[str, Any]:
    """Results of a suite with what they belong to."""
    facts = {"suite": suite, "device": device_name(), "driver": driver(), "cuda": torch.version.cuda}
    return facts | provenance() | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | results


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
