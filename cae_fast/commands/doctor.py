"""What this machine has, which kernels run on it, and why the others do not."""

import argparse
import os
import platform
import shutil
import subprocess
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from cae_fast import __version__
from cae_fast.data import dali
from cae_kernels.dispatch import BACKENDS, backend, why_not

# What it is for, and the distributions that provide it.
PACKAGES = {
    "triton": ("kernels", ("triton", "triton-windows", "pytorch-triton")),
    "xformers": ("attention", ("xformers",)),
    "liger": ("cross-entropy, layer norm", ("liger-kernel",)),
    "apex": ("layer norm, AdamW", ("apex",)),
    "deepspeed": ("many GPUs", ("deepspeed",)),
    "dali": ("data", ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")),
    "timm": ("evaluation", ("timm",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    console.print(_pairs("this machine", _machine()))
    console.print(_pairs("packages", _packages()))
    console.print(_kernels(device))
    forced = os.environ.get("CAE_KERNELS")
    console.print(f"CAE_KERNELS={forced}" if forced else "CAE_KERNELS=op=backend,... chooses another backend.")
    return 0


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("cae-fast", __version__),
        ("python", platform.python_version()),
        ("system", f"{platform.system()} {platform.release()}, {os.cpu_count()} processors"),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none: this torch was built for the CPU"),
        ("driver", _driver()),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("devices", "no CUDA device; everything runs on the CPU")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{index}", f"{found.name}, {memory}, compute capability {found.major}.{found.minor}"))
    return rows


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none: nvidia-smi was not found"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "nvidia-smi gave no answer in 20 seconds"
    versions = done.stdout.split()
    if done.returncode == 0 and versions:
        return versions[0]
    return f"nvidia-smi failed: {done.stdout or done.stderr}".strip()


def _packages() -> list[tuple[str, str]]:
    rows = []
    for name, (purpose, distributions) in PACKAGES.items():
        version = _version(distributions) or f"not installed ({purpose})"
        wrong = _wrong(name)
        rows.append((name, f"{version}: {wrong}" if wrong and "not installed" not in version else version))
    return rows


def _wrong(name: str) -> str | None:
    if name == "apex":
        return why_not("adamw", "apex", "cuda")
    if name == "dali":
        return dali.why_not() or (None if torch.cuda.is_available() else "decodes on the CPU only, without a GPU")
    return None


def _version(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def _kernels(device: torch.device) -> Table:
    table = Table("op", "runs on", "why not the others", title=f"kernels on {device.type}", title_justify="left")
    for op in BACKENDS:
        table.add_row(op, *_choice(op, device))
    return table


def _choice(op: str, device: torch.device) -> tuple[str, str]:
    """The chosen backend of an op, and one line per reason against others, or how to choose them."""
    try:
        chosen = backend(op, torch.empty(0, device=device))
    except ValueError as error:
        return "nothing", str(error)
    reasons: dict[str, list[str]] = {}
    for name in BACKENDS[op]:
        if name != chosen:
            reason = why_not(op, name, device.type) or "can be chosen"
            reasons.setdefault(reason, []).append(name)
    return chosen, "\n".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
