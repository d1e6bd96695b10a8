"""Read tensors from other people's torch.save files, pickled modules included, without running code from them.

torch.load cannot do it: with weights_only it refuses pickled modules of the format before torch 1.6, without it the
file may call what it likes. Here the unpickler finds nothing but the records below, whatever a file asks for; tensors
are made from the records and the raw bytes afterwards.

Both formats hold one pickle of the object, in which a storage is a persistent id ("storage", type, key, device, count):
- since torch 1.6: a zip archive with NAME/data.pkl and the bytes of each storage in NAME/data/KEY;
- before: pickles of a magic number, a protocol number, system facts, the object and the list of storage keys, and then
  for each key its count (int64) and bytes.
"""

import itertools
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from cae_fast.config import UserError
from cae_fast.models.pickle_limits import MAX_DEPTH, check_pickle

ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SKIPPED = ("argparse.Namespace", "collections.", "pathlib.", "numpy.", "_codecs.encode", "mmengine.")
STATES = ("state_dict", "model", "module")
SHARING = 4
"""Bytes of all tensors over the file's: weights under two names are stored once."""
MAX_MODULES = 100_000
STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Refused(pickle.UnpicklingError):
    """The file asks for something that is neither a tensor nor a container; the text is its name."""


class StorageRecord(NamedTuple):
    dtype: torch.dtype
    key: str
    num_values: int


class TensorRecord(NamedTuple):
    storage: StorageRecord
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class ModuleRecord:
    """Stands for an instance of any admitted module class; the unpickler fills its `__dict__`."""


class SkippedRecord:
    """Stands for a checkpoint's settings, paths and logs: takes whatever it is made of and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "SkippedRecord":
        return super().__new__(cls)

    def append(self, *_: Any) -> None:
        """Also what the unpickler calls for several items, for items with keys and for a state."""

    extend = __setitem__ = __setstate__ = append


class Maker:
    """A function for the unpickler. A file may set attributes of what it names, a function's defaults among them:
    this has none."""

    __slots__ = ()


class TensorMaker(Maker):
    __slots__ = ()

    def __call__(self, storage: StorageRecord, offset: int, size: Any, stride: Any, *_: Any) -> TensorRecord:
        return TensorRecord(storage, offset, size, stride)


class ParameterMaker(Maker):
    __slots__ = ()

    def __call__(self, data: TensorRecord, *_: Any) -> TensorRecord:
        return data


class DeviceMaker(Maker):
    __slots__ = ()

    def __call__(self, *name: Any) -> tuple[Any, ...]:
        return name


class _RecordUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], module_prefixes: tuple[str, ...]):
        super().__init__(file)
        self.module_prefixes = module_prefixes
        self.storages: dict[str, StorageRecord] = {}
        self.admitted: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "__builtin__.set": set,  # protocol 2, as torch writes, has the names of Python 2
            "builtins.set": set,
            "torch.Size": tuple,
            "torch.device": DeviceMaker(),
            "torch._utils._rebuild_tensor": TensorMaker(),
            "torch._utils._rebuild_tensor_v2": TensorMaker(),
            "torch._utils._rebuild_parameter": ParameterMaker(),
        }
        self.admitted |= {f"torch.{name}": dtype for name, dtype in STORAGE_TYPES.items()}

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in self.admitted:
            return self.admitted[full_name]
        if full_name.startswith(self.module_prefixes):
            # A class of its own each time: what a file does to it reaches nothing else.
            return type("ModuleRecord", (ModuleRecord,), {})
        if full_name.startswith(SKIPPED):
            return type("SkippedRecord", (SkippedRecord,), {})
        raise Refused(full_name.encode("unicode_escape").decode())  # it will be printed

    def persistent_load(self, pid: Any) -> Any:
        kind, *facts = pid
        if kind == "module":  # a class and its source code, in the older format
            return facts[0]
        if kind != "storage" or not isinstance(facts[0], torch.dtype) or any(facts[4:]):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        storage = StorageRecord(facts[0], str(facts[1]), int(facts[3]))
        self.storages[storage.key] = storage
        return storage


def read_state(path: Path, module_prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Names and tensors of a saved module, of its state dict, or of a checkpoint that holds one under one of STATES.

    module_prefixes: beginnings of the full names of classes that are admitted (as records; none is imported). Classes
    of settings and logs (SKIPPED) are passed over. Raises UserError, with the reason in one line, for a file that is
    missing, empty, no file of torch.save, truncated, or that asks for anything but these, tensors and containers.
    """
    head = _head_of_torch_file(path)
    try:
        return (_read_zip if head.startswith(ZIP_START) else _read_legacy)(path, module_prefixes)
    except UserError:
        raise
    except Refused as refused:
        raise UserError(f"{path} asks for {refused}, which weights do not need: refused, nothing was run") from refused
    except Exception as error:  # a damaged pickle can raise anything
        text = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is truncated or damaged ({type(error).__name__}: {text}): get it again") from error


def _head_of_torch_file(path: Path) -> bytes:
    """Its first bytes. Raises UserError for what a failed download leaves: nothing, a web page, wget's log."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{path} is empty: get it again")
    if head.startswith((ZIP_START, PICKLE_START)):
        return head
    text = head.decode("utf-8", "replace").strip()
    first = text.splitlines()[0][:60] if text else ""
    if text.lower().startswith(("<!doctype", "<html", "<?xml")):
        raise UserError(f"{path} is a web page (it begins with {first!r}), not weights: get the file itself")
    if re.match(r"--\d{4}-\d\d-\d\d ", text):
        raise UserError(f"{path} is wget's log (it begins with {first!r}): the weights are in the file that it names")
    raise UserError(f"{path} is not a file of torch.save: it begins with {first!r}")


def _read_zip(path: Path, module_prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip archive without data.pkl: not a file of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine: save it again on another one")
        size = path.stat().st_size
        for entry in archive.infolist():
            # torch stores: what is compressed could unfold to any size.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                raise UserError(
                    f"{path}: {entry.filename[:80]!r} is compressed or larger than the file: not of torch.save"
                )
        with archive.open(pickles[0]) as file:
            check_pickle(file, size)
        with archive.open(pickles[0]) as file:
            content = _RecordUnpickler(file, module_prefixes).load()
        return _tensors(path, content, lambda key: archive.read(f"{folder}data/{key}"))


def _read_legacy(path: Path, module_prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        unpicklers = [_RecordUnpickler(file, module_prefixes) for _ in range(5)]
        for _ in unpicklers:
            check_pickle(file, path.stat().st_size)
        file.seek(0)
        magic, protocol, system, content, keys = (unpickler.load() for unpickler in unpicklers)
        if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not system["little_endian"]:
            raise UserError(f"{path} is a pickle, but not one of torch.save on a little-endian machine")

        known = unpicklers[3].storages
        storages: dict[str, bytes] = {}
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            if key not in known or known[key].num_values != count or count < 0:
                raise UserError(f"{path} is damaged: storage {key!r} has another size than its tensor")
            storages[key] = file.read(count * known[key].dtype.itemsize)
    return _tensors(path, content, storages.__getitem__)


def _tensors(path: Path, content: Any, read_storage: Callable[[str], bytes]) -> dict[str, Tensor]:
    storages: dict[str, Tensor] = {}
    tensors = {}
    left = SHARING * path.stat().st_size
    for name, (storage, offset, size, stride) in _named_tensors(path, content):
        # A tensor may repeat its storage, and many may share one: together they must not be what the file is not.
        left -= math.prod(size) * storage.dtype.itemsize
        if left < 0 or min((*size, *stride, offset), default=0) < 0:
            raise UserError(f"{path}: {name!r} is larger than what the file holds: refused")
        if storage.key not in storages:
            data = bytearray(read_storage(storage.key))
            if len(data) != storage.num_values * storage.dtype.itemsize:
                raise UserError(f"{path} is truncated: it ends within {name!r}; get it again")
            storages[storage.key] = torch.frombuffer(data, dtype=storage.dtype)
        tensors[name] = storages[storage.key].as_strided(size, stride, offset)
    return tensors


def _named_tensors(path: Path, content: Any) -> list[tuple[str, TensorRecord]]:
    if isinstance(content, ModuleRecord):
        return list(_module_tensors(content, "", itertools.count()))
    if isinstance(content, dict):
        content = next((content[name] for name in STATES if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(value, TensorRecord) for value in content.values()):
        raise UserError(f"{path} holds neither a module nor a dictionary of tensors")
    return list(content.items())


def _module_tensors(module: ModuleRecord, prefix: str, seen: Iterator[int]) -> Iterator[tuple[str, TensorRecord]]:
    """(dotted name, tensor) of a module's parameters and buffers, as its state_dict would have them.

    seen: counts modules; one in itself, or shared again and again, would have no end.
    """
    state = vars(module)
    if next(seen) > MAX_MODULES or prefix.count(".") > MAX_DEPTH:
        raise pickle.UnpicklingError("its modules are nested deeper, or are more, than weights need")
    for group in ("_parameters", "_buffers"):
        for name, tensor in state.get(group, {}).items():
            if isinstance(tensor, TensorRecord):
                yield prefix + name, tensor
    for name, child in state.get("_modules", {}).items():
        if isinstance(child, ModuleRecord):
            yield from _module_tensors(child, f"{prefix}{name}.", seen)
