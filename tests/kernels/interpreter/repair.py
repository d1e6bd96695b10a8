"""Repairs Triton's interpreter (3.6 to 3.9) and turns it into a checker of memory accesses.

The interpreter as it comes keeps bfloat16 as bit patterns and computes on those, truncates float32 to bfloat16, reads 0
in masked-off lanes that were given no `other`, follows any pointer, and skips device asserts. After `install()`:
  - bfloat16 arithmetic, comparisons and dots happen in float32, results are rounded to nearest even, as on a GPU;
    reductions and scans of bfloat16 are refused (as float32 they are the same on every version and more accurate),
    float32 dots round their operands to TF32 unless input_precision says otherwise;
  - masked-off lanes without `other` hold NaN, or the extreme of an integer type: on a GPU they hold anything;
  - an access outside every tensor argument (between the rows of a strided view too) raises OutOfBounds;
  - a program that stores where another one has stored, or loads what another one has stored, raises Race;
  - atomics, which make sums depend on the order of programs, raise NotDeterministic;
  - tl.device_assert asserts, and the libdevice functions in `_LIBDEVICE` compute.
`watch()` records which bytes were stored, `reachable(...)` names tensors that kernels reach through pointer tables.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from memory_checks import NotDeterministic, OutOfBounds, Race, Unwritten, Watch, check_memory, reachable, watch

__all__ = ["NotDeterministic", "OutOfBounds", "Race", "Unwritten", "Watch", "install", "reachable", "watch"]

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
PRECISIONS = ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6")


def install() -> None:
    """Repair the interpreter of this process, once."""
    if getattr(interpreter, "_repaired", False):
        return
    interpreter._repaired = True
    _unwrap_exceptions()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(
        builder.options, allowed_dot_input_precisions=PRECISIONS, debug=True, sanitize_overflow=False
    )
    _repair_bfloat16()
    _repair_dot_and_reduction()
    _repair_assert_and_index()
    _repair_libdevice()
    check_memory()


def _unwrap_exceptions() -> None:
    """Exceptions in kernels arrive as they are, instead of as the text of an InterpreterError."""
    triton.knobs.compilation.front_end_debugging = True
    call = interpreter.InterpretedFunction.__call__

    def unwrapped(self, *arguments, **named):
        try:
            return call(self, *arguments, **named)
        except interpreter.InterpreterError as error:
            raise error.__cause__ or error from None

    interpreter.InterpretedFunction.__call__ = unwrapped


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, uint16, of float32 values rounded to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + ((bits >> 16 & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(values))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to nearest even with 10 bits of mantissa; infinities and NaN stay."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + ((bits >> 13 & 1) + np.uint32(0xFFF))) & np.uint32(0xFFFFE000)
    return np.where((bits & 0x7F800000) == 0x7F800000, bits, rounded).view(np.float32)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _values(handle: Any) -> np.ndarray:
    return from_bfloat16(handle.data) if _is_bfloat16(handle) else handle.data


def _rounded(values: np.ndarray) -> Any:
    return Handle(to_bfloat16(values), tl.bfloat16)


def _repair_bfloat16() -> None:
    convert_float, cast_impl = interpreter._convert_float, Builder.cast_impl
    binary_op, unary_op, ternary_op, create_fma = (
        Builder.binary_op,
        Builder.unary_op,
        Builder.ternary_op,
        Builder.create_fma,
    )

    def convert(values, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16 and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return to_bfloat16(values)
        if source == tl.bfloat16 and target == tl.float32:
            return from_bfloat16(values).reshape(np.shape(values))
        return convert_float(values, source, target, rounding)

    def cast(self, handle, target):
        if _is_bfloat16(handle):
            wide = Handle(from_bfloat16(handle.data), tl.float32)
            return handle if target.scalar == tl.bfloat16 else cast_impl(self, wide, target)
        if target.scalar == tl.bfloat16:
            return _rounded(handle.data.astype(np.float32))
        return cast_impl(self, handle, target)

    def binary(self, left, right, operation):
        if _is_bfloat16(left) or _is_bfloat16(right):
            out = operation(_values(left), _values(right))
            return Handle(out, tl.int1) if out.dtype == np.bool_ else _rounded(out)
        result = binary_op(self, left, right, operation)
        return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    def unary(self, handle, operation):
        return _rounded(operation(_values(handle))) if _is_bfloat16(handle) else unary_op(self, handle, operation)

    def ternary(self, first, second, third, operation):
        if operation is np.where or not any(map(_is_bfloat16, (first, second, third))):
            return ternary_op(self, first, second, third, operation)
        return _rounded(operation(_values(first), _values(second), _values(third)))

    def fma(self, x, y, z):
        if not _is_bfloat16(z):
            return create_fma(self, x, y, z)
        return _rounded(_values(x).astype(np.float64) * _values(y) + _values(z))

    interpreter._convert_float = convert
    Builder.cast_impl, Builder.binary_op, Builder.unary_op = cast, binary, unary
    Builder.ternary_op, Builder.create_fma = ternary, fma
    Builder.get_bf16 = lambda self, value: _rounded(np.array([value], dtype=np.float32))


def _repair_dot_and_reduction() -> None:
    create_dot = Builder.create_dot
    operation = interpreter.ReduceScanOpInterface
    check_tensor = operation.check_tensor

    def check(self, tensors):
        check_tensor(self, tensors)
        assert all(tensor.dtype != tl.bfloat16 for tensor in tensors), "reduce or scan float32, not bfloat16"

    def dot(self, a, b, accumulator, precision, max_num_imprecise_acc):
        if _is_bfloat16(a) or _is_bfloat16(b):
            a, b = Handle(_values(a), tl.float32), Handle(_values(b), tl.float32)
        elif a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            a, b = Handle(to_tf32(a.data), tl.float32), Handle(to_tf32(b.data), tl.float32)
        return create_dot(self, a, b, accumulator, precision, max_num_imprecise_acc)

    Builder.create_dot = dot
    operation.check_tensor = check


def _repair_assert_and_index() -> None:
    patch_tensor = interpreter._patch_lang_tensor

    def create_assert(self, condition, message):
        assert np.all(getattr(condition, "data", condition)), f"tl.device_assert: {message}"

    def patch(tensor, *rest):
        result = patch_tensor(tensor, *rest)
        # NumPy 2.4 refuses int(array of one element), which the index of Triton 3.6 calls.
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])
        return result

    Builder.create_assert = create_assert
    interpreter._patch_lang_tensor = patch


_LIBDEVICE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "erf": np.vectorize(math.erf, otypes=[np.float32]),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fast_expf": np.exp,
    "fast_tanhf": np.tanh,
    "log": np.log,
    "log1p": np.log1p,
    "rint": np.rint,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}


def _repair_libdevice() -> None:
    from triton.language.extra import libdevice

    def computing(function: Callable[[np.ndarray], np.ndarray]) -> Callable[..., tl.tensor]:
        def compute(x, **_):
            assert x.dtype in (tl.float32, tl.float64), f"libdevice has no function of {x.dtype}"
            data = x.handle.data
            return tl.core.tensor(Handle(function(data).astype(data.dtype), x.dtype), x.type)

        return compute

    for name, function in _LIBDEVICE.items():
        setattr(libdevice, name, computing(function))
