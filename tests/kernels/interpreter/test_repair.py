"""Kernels that are wrong in each of the ways that the repaired interpreter must catch, and bfloat16 arithmetic."""

import numpy as np
import pytest
import repair
import torch
import triton
import triton.language as tl
from checking import assert_close, errors
from triton.language.extra import libdevice

BFLOAT16 = torch.bfloat16


@triton.jit
def copy_kernel(source, out, n, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    if MASK_LOAD:
        values = tl.load(source + offsets, mask=inside, other=0.0)
    else:
        values = tl.load(source + offsets)
    if MASK_STORE:
        tl.store(out + offsets, values, mask=inside)
    else:
        tl.store(out + offsets, values)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, torch.int64, torch.uint8, torch.bool])
def test_a_correct_kernel_passes(dtype, written):
    source, out = torch.arange(13).to(dtype), torch.empty(13, dtype=dtype)
    copy_kernel[(2,)](source, out, 13, 8, True, True)
    written(out)
    assert torch.equal(out, source)


@pytest.mark.parametrize(("mask_load", "mask_store", "what"), [(False, True, "load"), (True, False, "store")])
def test_out_of_bounds_is_caught(mask_load, mask_store, what):
    memory = torch.zeros(2, 64)  # neighbours exist, so that nothing crashes by itself
    with pytest.raises(repair.OutOfBounds, match=rf"program 1: 3 of 8 lanes.*{what}.*which has 52"):
        copy_kernel[(2,)](memory[0, :13], memory[1, :13], 13, 8, mask_load, mask_store)


def test_out_of_bounds_before_the_start_is_caught():
    memory = torch.zeros(32)

    @triton.jit
    def kernel(source, out):
        tl.store(out, tl.load(source - 1))

    with pytest.raises(repair.OutOfBounds, match="first at byte -4 of 'source'"):
        kernel[(1,)](memory[8:16], memory[16:17])


def test_the_gaps_of_a_strided_view_are_out_of_bounds():
    memory, out = torch.zeros(4, 8), torch.zeros(32)
    with pytest.raises(repair.OutOfBounds, match="1 of 8 lanes"):
        copy_kernel[(1,)](memory[:, 1:], out, 8, 8, True, True)
    copy_kernel[(1,)](memory[:, 1:], out, 7, 8, True, True)


@triton.jit
def first_kernel(table, out):
    tl.store(out, tl.load(tl.load(table).to(tl.pointer_type(tl.float32))))


def test_pointer_tables_reach_only_the_named_tensors():
    target, out = torch.tensor([3.0]), torch.empty(1)
    table = torch.tensor([target.data_ptr()])
    with pytest.raises(repair.OutOfBounds):
        first_kernel[(1,)](table, out)
    with repair.reachable(target):
        first_kernel[(1,)](table, out)
    assert out.item() == 3.0
    with pytest.raises(repair.OutOfBounds):
        first_kernel[(1,)](table, out)


@triton.jit
def overlapping_kernel(out, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out + offsets, offsets)


def test_two_programs_storing_to_one_address_are_caught():
    out = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(repair.Race, match="program 1 stores to an address that program 0"):
        overlapping_kernel[(2,)](out, 15, 16)
    overlapping_kernel[(2,)](out, 16, 16)


@triton.jit
def two_outputs_kernel(first, second):
    if tl.program_id(0) == 0:
        tl.store(first, 1.0)
    else:
        tl.store(second, 1.0)


def test_stores_through_two_views_of_one_tensor_are_caught():
    out = torch.zeros(4)
    with pytest.raises(repair.Race):
        two_outputs_kernel[(2,)](out[1:], out[1:2])
    two_outputs_kernel[(2,)](out[1:], out[2:])


def test_loading_what_another_program_stored_is_caught():
    @triton.jit
    def kernel(x):
        program = tl.program_id(0)
        tl.store(x + program + 1, tl.load(x + program) + 1)

    with pytest.raises(repair.Race, match="program 1 loads from an address that program 0"):
        kernel[(2,)](torch.zeros(3))


def test_atomics_are_refused():
    @triton.jit
    def kernel(x):
        tl.atomic_add(x, 1.0)

    with pytest.raises(repair.NotDeterministic):
        kernel[(2,)](torch.zeros(1))


def test_unwritten_elements_are_caught(written):
    source, out = torch.arange(13.0), torch.empty(13)
    copy_kernel[(1,)](source, out, 13, 8, True, True)
    with pytest.raises(repair.Unwritten, match="output 0: 5 of 13"):
        written(out)
    copy_kernel[(2,)](source, out, 13, 8, True, True)
    written(out, out[3:])
    with pytest.raises(repair.Unwritten, match="output 1: 13 of 13"):
        written(out, source)


def test_allocations_are_poisoned():
    assert torch.empty(5).isnan().all()
    assert torch.ones(5, dtype=BFLOAT16).new_empty(5).isnan().all()
    assert (torch.empty_like(torch.zeros(5, dtype=torch.int64)) == torch.iinfo(torch.int64).max).all()


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16, torch.int32])
def test_lanes_without_other_are_poisoned(dtype):
    @triton.jit
    def kernel(source, out, n):
        offsets = tl.arange(0, 8)
        tl.store(out + offsets, tl.load(source + offsets, mask=offsets < n))

    out = torch.zeros(8, dtype=dtype)
    kernel[(1,)](torch.ones(5, dtype=dtype), out, 5)
    assert (out[:5] == 1).all()
    assert (out[5:] == torch.iinfo(dtype).min).all() if dtype is torch.int32 else out[5:].isnan().all()


def test_device_asserts_assert():
    @triton.jit
    def kernel(x, n):
        offsets = tl.arange(0, 4)
        tl.device_assert(tl.load(x + offsets) < n, "an index is too large")

    kernel[(1,)](torch.arange(4), 4)
    with pytest.raises(AssertionError, match="an index is too large"):
        kernel[(1,)](torch.arange(4), 3)


@triton.jit
def arithmetic_kernel(x, y, out, n, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < n
    a = tl.load(x + offsets, mask=inside, other=1.0)
    b = tl.load(y + offsets, mask=inside, other=1.0)
    if OPERATION == "add":
        c = a + b
    elif OPERATION == "subtract":
        c = a - b
    elif OPERATION == "multiply":
        c = a * b
    elif OPERATION == "divide":
        c = (a / b).to(tl.bfloat16)
    elif OPERATION == "negate":
        c = -a
    elif OPERATION == "abs":
        c = tl.abs(a)
    elif OPERATION == "maximum":
        c = tl.maximum(a, b)
    elif OPERATION == "less":
        c = (a < b).to(tl.bfloat16)
    elif OPERATION == "where":
        c = tl.where(a < b, a, b)
    elif OPERATION == "constant":
        c = a * tl.full((BLOCK,), 0.1, tl.bfloat16)
    elif OPERATION == "cumsum":
        c = tl.cumsum(a.to(tl.float32), 0).to(tl.bfloat16)
    else:
        c = (a.to(tl.float32) + 1e-3).to(tl.bfloat16)
    tl.store(out + offsets, c, mask=inside)


TRUTH = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "negate": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "maximum": torch.maximum,
    "less": lambda a, b: (a < b).to(BFLOAT16),
    "where": torch.minimum,
    "constant": lambda a, b: a * torch.tensor(0.1, dtype=BFLOAT16),
    "cumsum": lambda a, b: a.float().cumsum(0).bfloat16(),
    "round": lambda a, b: (a.float() + 1e-3).bfloat16(),
}


@pytest.mark.parametrize("operation", TRUTH)
def test_bfloat16_arithmetic_is_that_of_torch(operation):
    x, y, out = torch.randn(500).bfloat16(), torch.randn(500).bfloat16(), torch.empty(500, dtype=BFLOAT16)
    x[3] = y[3]
    arithmetic_kernel[(1,)](x, y, out, 500, operation, 512)
    assert torch.equal(out, TRUTH[operation](x, y))


def test_rounding_is_to_nearest_even_for_every_kind_of_value():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    edges = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00008000, 1], dtype=np.uint32)
    values = np.concatenate((bits, edges)).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    np.testing.assert_array_equal(repair.to_bfloat16(values).view(np.int16), expected)


@triton.jit
def dot_kernel(x, y, out, PRECISION: tl.constexpr):
    rows, columns = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(x + rows * 16 + columns), tl.load(y + rows * 16 + columns)
    tl.store(out + rows * 16 + columns, tl.dot(a, b, input_precision=PRECISION))


def test_bfloat16_dot_is_computed_from_the_values():
    x, y, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    dot_kernel[(1,)](x, y, out, "tf32")
    assert_close(out, x.double() @ y.double(), 1e-6, 1e-6)


def test_float32_dot_is_tf32_unless_told_otherwise():
    x, y, out = torch.randn(16, 16), torch.randn(16, 16), torch.empty(16, 16)
    expected = x.double() @ y.double()
    dot_kernel[(1,)](x, y, out, "tf32")
    assert 1e-4 < errors(out, expected)[0] < 1e-3
    dot_kernel[(1,)](x, y, out, "ieee")
    assert_close(out, expected, 1e-6, 1e-6)


@triton.jit
def sum_kernel(x, out, CAST: tl.constexpr, N: tl.constexpr):
    values = tl.load(x + tl.arange(0, N))
    tl.store(out, tl.sum(values.to(CAST), 0).to(tl.float32))


def test_bfloat16_reductions_are_refused():
    x, out = torch.randn(256).bfloat16(), torch.empty(())
    sum_kernel[(1,)](x, out, tl.float32, 256)
    assert out.item() == pytest.approx(x.double().sum().item(), rel=1e-5)
    with pytest.raises(AssertionError, match="reduce or scan float32"):
        sum_kernel[(1,)](x, out, tl.bfloat16, 256)


def test_libdevice_computes():
    @triton.jit
    def kernel(x, out):
        offsets = tl.arange(0, 64)
        values = tl.load(x + offsets)
        tl.store(out + offsets, libdevice.erf(values) + libdevice.tanh(values))

    kernel.fn.__globals__["libdevice"] = libdevice
    x, out = torch.randn(64), torch.empty(64)
    kernel[(1,)](x, out)
    assert_close(out, x.double().erf() + x.double().tanh(), 1e-6, 1e-6)


def test_tensors_work_as_loop_bounds():
    @triton.jit
    def kernel(n, out):
        total = 0
        for i in range(tl.program_id(0), tl.load(n), tl.num_programs(0)):
            total += i
        tl.store(out + tl.program_id(0), total)

    out = torch.zeros(2, dtype=torch.int32)
    kernel[(2,)](torch.tensor([5]), out)
    assert out.tolist() == [6, 4]


def test_errors_fail_on_a_nan_and_on_a_wrong_element():
    expected = torch.ones(100, dtype=torch.float64)
    actual = expected.clone()
    assert errors(actual, expected) == (0.0, 0.0)
    actual[7] = 1.5
    assert errors(actual, expected) == pytest.approx((0.05, 0.25))
    with pytest.raises(AssertionError, match="worst"):
        assert_close(actual, expected, 0.1, 0.1)
    actual[7] = float("nan")
    with pytest.raises(AssertionError, match="Frobenius"):
        assert_close(actual, expected, 1.0, 1.0)
