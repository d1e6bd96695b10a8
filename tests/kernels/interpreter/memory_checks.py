"""Checks of every load and store in Triton's interpreter; `repair.install()` switches them on.

Bounds are those of the tensor arguments of a launch, byte by byte; writers are remembered per byte of their storages.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


class OutOfBounds(AssertionError):
    """A lane that is not masked off lies outside every tensor argument."""


class Race(AssertionError):
    """The result depends on which of two programs comes first."""


class NotDeterministic(AssertionError):
    """An atomic operation."""


class Unwritten(AssertionError):
    """An element of an output that no kernel stored."""


class _Extent:
    """The bytes of a tensor argument."""

    def __init__(self, name: str, tensor: Tensor):
        self.name, size = name, tensor.element_size()
        offsets = np.zeros(1, dtype=np.int64)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(length) * stride).reshape(-1)
        self.start = tensor.data_ptr()
        self.end = self.start + (int(offsets.max(initial=-1)) + 1) * size
        self.inside: np.ndarray | None = None
        if (self.end - self.start) != tensor.numel() * size:  # a view with holes
            self.inside = np.zeros(self.end - self.start, dtype=bool)
            self.inside[(offsets[:, None] * size + np.arange(size)).reshape(-1)] = True

    def holds(self, addresses: np.ndarray, size: int) -> np.ndarray:
        held = (addresses >= self.start) & (addresses + size <= self.end)
        if self.inside is not None and held.any():
            first = addresses[held] - self.start
            held[held] = self.inside[first] & self.inside[first + size - 1]
        return held


class _Writers:
    """For every byte of a storage, the program that stored it, plus one; 0 where none has."""

    def __init__(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.start, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.of_byte = np.zeros(storage.nbytes(), dtype=np.int32)


class _Launch:
    """The memory that one launch may access, and what its programs have stored so far."""

    def __init__(self, tensors: list[tuple[str, Tensor]]):
        self.program = 0
        self.tensors = tensors
        self.extents = [_Extent(name, tensor) for name, tensor in tensors if tensor.numel()]
        self.writers = {
            tensor.untyped_storage().data_ptr(): _Writers(tensor) for _, tensor in tensors if tensor.numel()
        }

    def check(self, addresses: np.ndarray, size: int, what: str) -> None:
        inside = np.zeros(addresses.shape, dtype=bool)
        for extent in self.extents:
            inside |= extent.holds(addresses, size)
        if inside.all():
            return
        first = int(addresses[~inside][0])
        text = f"{what} of {size} bytes at address {first}"
        if self.extents:
            near = min(self.extents, key=lambda extent: min(abs(first - extent.start), abs(first - extent.end)))
            text = f"{what}, first at byte {first - near.start} of '{near.name}', which has {near.end - near.start}"
        raise OutOfBounds(f"program {self.program}: {(~inside).sum()} of {inside.size} lanes out of bounds: {text}")

    def note(self, addresses: np.ndarray, size: int, *, store: bool) -> None:
        for writers in self.writers.values():
            selected = addresses[(addresses >= writers.start) & (addresses < writers.end)] - writers.start
            seen = writers.of_byte[selected]
            others = seen[(seen != 0) & (seen != self.program + 1)]
            if others.size:
                verb = "stores to" if store else "loads from"
                raise Race(f"program {self.program} {verb} an address that program {others[0] - 1} has stored to")
            if store:
                for byte in range(size):
                    writers.of_byte[selected + byte] = self.program + 1


class Watch:
    """Which bytes the launches since its start have stored. Holds on to the tensors, so that no address is reused."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, np.ndarray]] = []
        self.tensors: list[Tensor] = []

    def add(self, launch: _Launch) -> None:
        self.tensors += [tensor for _, tensor in launch.tensors]
        self.stored += [(writers.start, writers.of_byte != 0) for writers in launch.writers.values()]

    def __call__(self, *outputs: Tensor) -> None:
        """Assert that every element of the outputs was stored by a kernel."""
        for number, tensor in enumerate(outputs):
            offsets = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
            offsets = offsets.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).flatten().numpy()
            done = np.zeros(offsets.shape, dtype=bool)
            for start, bytes_stored in self.stored:
                if start == tensor.untyped_storage().data_ptr():
                    done |= bytes_stored[offsets * tensor.element_size()]
            if not done.all():
                raise Unwritten(f"output {number}: {(~done).sum()} of {done.size} elements were never stored")


_launch: _Launch | None = None
_watches: list[Watch] = []
_reachable: list[tuple[str, Tensor]] = []


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Record the stores of the launches in this block: `with watch() as written: ...; written(out)`."""
    watching = Watch()
    _watches.append(watching)
    try:
        yield watching
    finally:
        _watches.remove(watching)


@contextlib.contextmanager
def reachable(*tensors: Tensor) -> Iterator[None]:
    """Let kernels in this block access tensors to which they get pointers in a table instead of as arguments."""
    added = [(f"reachable[{number}]", tensor) for number, tensor in enumerate(tensors)]
    _reachable.extend(added)
    try:
        yield
    finally:
        del _reachable[len(_reachable) - len(added) :]


def _tensors(name: str, argument: Any) -> list[tuple[str, Tensor]]:
    if isinstance(argument, tuple | list):
        return [found for i, part in enumerate(argument) for found in _tensors(f"{name}[{i}]", part)]
    if hasattr(argument, "block_shape"):  # a tensor descriptor
        return _tensors(name, argument.base)
    if not hasattr(argument, "data_ptr"):
        return []
    tensor = interpreter._unwrap_tensor(argument)
    assert tensor.device.type == "cpu", f"{name} is on {tensor.device}; its addresses can be checked on the CPU only"
    return [(name, tensor)]


def _active_lanes(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    """Addresses, int64, of the lanes that are not masked off, and the size of an element."""
    addresses, active = np.broadcast_arrays(pointers.data, mask.data if isinstance(mask, Handle) else mask)
    return addresses[active.astype(bool)].astype(np.int64), max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _poison(pointers: Any) -> Any:
    element = pointers.get_element_ty()
    kind = interpreter._get_np_dtype(element)
    if element == tl.bfloat16:
        value: Any = 0x7FC0
    elif kind.kind == "f":
        value = np.nan
    elif kind.kind == "b":
        value = True
    else:
        value = np.iinfo(kind).min if kind.kind == "i" else np.iinfo(kind).max
    return Handle(np.full(np.shape(pointers.data), value, dtype=kind), element)


def check_memory() -> None:
    load, store, set_grid_idx = Builder.create_masked_load, Builder.create_masked_store, Builder.set_grid_idx
    run = interpreter.GridExecutor.__call__

    def access(pointers, mask, what):
        assert _launch is not None, "a memory access outside a launch"
        addresses, size = _active_lanes(pointers, mask)
        _launch.check(addresses, size, what)
        _launch.note(addresses, size, store=what == "store")

    def checked_load(self, pointers, mask, other, *rest, **options):
        access(pointers, mask, "load")
        return load(self, pointers, mask, _poison(pointers) if other is None else other, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest, **options):
        access(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest, **options)

    def refuse_atomic(self, *arguments, **options):
        raise NotDeterministic("an atomic operation: its result may depend on the order of the programs")

    def note_program(self, x, y, z):
        assert _launch is not None
        _launch.program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        set_grid_idx(self, x, y, z)

    def checked_run(self, *arguments, **named):
        global _launch
        pairs = [*zip(self.arg_names, arguments, strict=False), *named.items()]
        tensors = [found for name, argument in pairs for found in _tensors(name, argument)]
        outer, _launch = _launch, _Launch(tensors + _reachable)
        try:
            with np.errstate(all="ignore"):
                run(self, *arguments, **named)
        finally:
            for watching in _watches:
                watching.add(_launch)
            _launch = outer

    Builder.create_masked_load, Builder.create_masked_store = checked_load, checked_store
    Builder.create_atomic_rmw = Builder.create_atomic_cas = refuse_atomic
    Builder.set_grid_idx = note_program
    interpreter.GridExecutor.__call__ = checked_run
