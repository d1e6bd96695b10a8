"""Results on disk: one JSON file for each suite, with what its numbers belong to and every raw sample.

A suite that was ended goes on: what its file has of the same source and device is not measured again.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cae_fast.files import write_text

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("cae_fast", "kernels/cae_kernels", "benchmarks")
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "numpy", "triton", "nvidia-dali-cuda130")
L2_BYTES = 50 * 2**20  # of an H100; more than that between two uses of a tensor, and it comes from memory again


def device_name() -> str:
    """As results are filed: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def folder_name(device: str) -> str:
    """Of benchmarks/results: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@functools.cache
def driver() -> str | None:
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None


def provenance() -> dict[str, Any]:
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
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


def record(suite: str, **results: Any) -> dict[str, Any]:
    """Results of a suite with what they belong to."""
    facts = {"suite": suite, "device": device_name(), "driver": driver(), "cuda": torch.version.cuda}
    return facts | provenance() | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | results


def save(path: Path, results: dict[str, Any]) -> None:
    write_text(path, json.dumps(results, indent=1) + "\n")


def earlier(path: Path | None, **settings: Any) -> dict[str, Any] | None:
    """The record in this file, where it is of this device, this source and these settings; else None."""
    if path is None or not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"device": device_name(), "source": source()} | settings
    return found if all(found.get(name) == value for name, value in wanted.items()) else None


Rows = dict[tuple[Any, ...], dict[str, Any]]
KEEP_FAILED = "CAE_FAST_KEEP_FAILED"


def earlier_rows(path: Path | None, key: tuple[str, ...], **settings: Any) -> Rows:
    """Rows of an earlier record by these of their values."""
    found = earlier(path, **settings)
    rows = {tuple(row[name] for name in key): row for row in found["rows"]} if found else {}
    if rows:
        print(f"{path} has {len(rows)} rows of this source and device; --again measures them again", flush=True)
    return rows


def settled(rows: Rows, key: tuple[Any, ...]) -> bool:
    """Whether this row is there; one that failed is to be tried again."""
    return key in rows and ("failed" not in rows[key] or KEEP_FAILED in os.environ)


def device_lost() -> bool:
    """Whether an error (an illegal address) has made the GPU useless to this process."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def start_again() -> None:
    """Replace this process by one that keeps all rows, failed ones too, and goes on behind them."""
    sys.stdout.flush()
    arguments = [argument for argument in sys.orig_argv[1:] if argument != "--again"]
    os.execve(sys.executable, [sys.executable, *arguments], os.environ | {KEEP_FAILED: "1"})
