"""What a benchmark's numbers belong to: the machine, the versions and the command."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("cae_fast", "kernels/cae_kernels", "benchmarks")
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "numpy", "triton", "nvidia-dali-cuda130")


def provenance() -> dict[str, Any]:
    return {
        "command": " ".join(sys.argv),
        "revision": revision(),
        "source": source(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@functools.cache
def source() -> str:
    """Of what is measured and what measures it: a digest of the Python files, which needs no git and knows of edits."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in MEASURED for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def revision() -> str | None:
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    except FileNotFoundError:  # a machine without git
        return None
    return git.stdout.strip() or None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
