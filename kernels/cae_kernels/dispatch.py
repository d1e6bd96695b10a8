"""Which implementation of an op runs: one rule, readable reasons.

Triton kernels run on CUDA (and on a CPU in Triton's interpreter, TRITON_INTERPRET=1); the plain torch reference runs
everywhere else. CAE_KERNELS=op=backend,... forces a choice (`all=reference` for every op that has it); a forced
backend that cannot run raises ValueError with the reason.
"""

import importlib.util
import os
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from torch import Tensor

from .parts.triton_language import HAVE_TRITON, INTERPRETED

ATTENTION = ("triton", "reference", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "xformers")
BACKENDS: dict[str, tuple[str, ...]] = {
    "adamw": ("triton", "reference", "apex"),
    "attention": ATTENTION,
    "bias_relu": ("triton", "reference"),
    "block_mask": ("triton", "reference"),
    "cross_attention": ATTENTION,
    "drop_path": ("triton", "reference"),
    "gather_tokens": ("triton", "reference"),
    "layer_norm": ("triton", "reference", "liger", "apex"),
    "linear_argmax": ("triton", "reference"),
    "linear_cross_entropy": ("triton", "reference", "liger"),
    "linear_gelu": ("triton", "reference"),
    "random_mask": ("triton", "reference"),
    "residual_norm": ("triton", "reference"),
    "squared_error": ("triton", "reference"),
}
PACKAGES = {"xformers": "xformers", "liger": "liger_kernel", "apex": "apex"}
APEX_EXTENSIONS = {"adamw": "amp_C", "layer_norm": "fused_layer_norm_cuda"}

_choices: dict[tuple[str, str, str], str] = {}


def backend(op: str, tensor: Tensor) -> str:
    """The backend of `op` for tensors on this device. Raises ValueError for a forced one that cannot run.

    A graph of torch.compile keeps the choice of its first call.
    """
    return _chosen(op, tensor.device.type, os.environ.get("CAE_KERNELS", ""))


def _chosen(op: str, device_type: str, setting: str) -> str:
    key = (op, device_type, setting)
    chosen = _choices.get(key)
    if chosen is None:
        chosen = _choices[key] = _choose(op, device_type, setting)
    return chosen


# What torch.compiler.assume_constant_result sets; calling that would import the compiler, which takes a second.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(op: str, device_type: str, setting: str) -> str:
    forced = _forced(setting)
    wanted = forced.get(op, forced.get("all"))
    if wanted in BACKENDS[op]:
        reason = why_not(op, wanted, device_type)
        if reason:
            raise ValueError(f"CAE_KERNELS wants {op}={wanted}, which cannot run: {reason}")
        return wanted
    return "reference" if why_not(op, "triton", device_type) else "triton"


def _forced(setting: str) -> dict[str, str]:
    choices: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in setting.split(","))):
        op, _, name = part.partition("=")
        if op != "all" and op not in BACKENDS:
            raise ValueError(f"CAE_KERNELS has {part!r}: write op=backend; ops are all, {', '.join(BACKENDS)}")
        known = BACKENDS[op] if op != "all" else dict.fromkeys(name for names in BACKENDS.values() for name in names)
        if name not in known:
            raise ValueError(f"CAE_KERNELS has {part!r}: write op=backend; backends of {op} are {', '.join(known)}")
        choices[op] = name
    return choices


def why_not(op: str, name: str, device_type: str) -> str | None:
    """Why a backend of an op cannot run on a kind of device ("cuda", "cpu", ...), None where it can."""
    if name == "reference":
        return None
    if name == "triton":
        if not HAVE_TRITON:
            return "triton is not installed"
        return None if device_type == "cuda" or INTERPRETED else f"Triton kernels need a CUDA device, not {device_type}"
    missing = _missing_package(op, PACKAGES[name]) if name in PACKAGES else _missing_in_torch(name)
    if missing is None and device_type != "cuda":
        return f"it needs a CUDA device, not {device_type}"
    return missing


def _missing_in_torch(name: str) -> str | None:
    available = {
        "sdpa_flash": torch.backends.cuda.is_flash_attention_available,
        "sdpa_cudnn": torch.backends.cudnn.is_available,
        "sdpa_efficient": torch.backends.cuda.is_built,
    }
    return None if available[name]() else f"torch {torch.__version__} was built without it"


def _missing_package(op: str, package: str) -> str | None:
    spec = importlib.util.find_spec(package)
    if spec is None:
        return f"{package} is not installed"
    return _wrong_apex(op, spec) if package == "apex" else None


def _wrong_apex(op: str, spec: ModuleSpec) -> str | None:
    # Without importing it: PyPI's apex fails to import, and looking for a submodule would import it.
    if not any((Path(folder) / "normalization").is_dir() for folder in spec.submodule_search_locations or ()):
        try:
            installed = f"apex {metadata.version('apex')}"
        except metadata.PackageNotFoundError:
            installed = "apex"
        return f"the installed {installed} is PyPI's unrelated project; NVIDIA's apex is built from its source"
    extension = APEX_EXTENSIONS[op]
    if importlib.util.find_spec(extension) is None:
        return f"NVIDIA's apex was built without its CUDA extension {extension}"
    return None


def custom_ops_wanted() -> bool:
    """Under torch.compile ops must be registered ones; in eager a plain autograd.Function costs 10 to 20 us less."""
    return torch.compiler.is_compiling()
