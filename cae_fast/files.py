"""Files: written whole or not at all, whatever ends the process; weights read without executing anything in them."""

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cae_fast import __version__
from cae_fast.config import UserError

log = logging.getLogger(__name__)
DIGEST = "cae_fast_sha256"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to, which takes its place, flushed to the disk, when the block ends well.

    A crash leaves the old file or the new one; what a killed process leaves is `remove_leftovers`' to delete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, not the process id: in containers that is often the same, also on another machine.
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.tmp")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        os.chmod(temporary, mode)  # safetensors makes private files; others may want to read a checkpoint
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, survive a power loss."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(*folders: Path) -> None:
    """Delete what killed processes left half written."""
    for leftover in (path for folder in folders for path in folder.glob(".*.tmp")):
        leftover.unlink()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors, with `facts` (JSON) and a digest of the tensors in the header."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "cae_fast": json.dumps(facts), DIGEST: digest(whole)}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata)
        except SafetensorError as error:  # the disk's errors come in this one's clothes
            raise OSError(f"{path}: {printable(str(error))}") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def append(path: Path, text: str) -> None:
    """Add all of the text to a file, or nothing."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def survive_disk(what: str, function: Callable[..., object], *args: object) -> None:
    """function(*args); where the disk refuses, what it would have written is lost, with a warning."""
    try:
        function(*args)
    except OSError as error:
        log.warning("%s: could not be written: %s", what, error)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What our header says ({} in other files) and the tensors.

    Raises UserError where it is no safetensors file, a damaged one of ours, or one of a newer version than this.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
        facts = read_facts(path, metadata)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if DIGEST in metadata and metadata[DIGEST] != digest(tensors):
        raise UserError(f"{path}: damaged: its weights are not those that were written")
    return facts, tensors


def read_header(path: Path) -> dict[str, Any]:
    """What our header says, {} in other files; the weights are not read. UserError as `read_weights`."""
    with opened(path) as file:
        return read_facts(path, file.metadata() or {})


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. UserError where it is none, or cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a safetensors file ({printable(str(error))})") from error


def read_facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The facts in a header. UserError where they are no object, or of a newer version of cae_fast."""
    facts = json.loads(metadata.get("cae_fast", "{}"))
    if not isinstance(facts, dict):
        raise UserError(f"{path}: its header is none of cae_fast's")
    written, own = (re.findall(r"\d+", str(version)) for version in (facts.get("version", "0"), __version__))
    if [int(number) for number in written[:3]] > [int(number) for number in own[:3]]:
        raise UserError(f"{path} was written by cae_fast {facts['version']}, newer than this {__version__}: update it")
    return facts


def printable(text: str, limit: int = 300) -> str:
    """One line of a foreign text, without control characters."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:limit]
