"""Arithmetic of the estimates against numbers worked out by hand."""

from dataclasses import replace

import pytest

from cae_fast.config import UserError
from cae_fast.cost.devices import DEVICES, Device, device_peak_flops
from cae_fast.cost.estimation import Workload, assumptions, estimate, peak_bytes
from cae_fast.cost.memory import Activations

DEVICE = Device(
    "H100",
    memory=80e9,
    linears=0.85e15,
    convolutions=0.58e15,
    float32=0.85e14,
    copy=0.85e12,
    nvlink=100e9,
    network=50e9,
    source="invented",
)
WORK = Workload(
    parameters=1_000_000_000,
    tensors=292,
    element=2,
    model_flops=85 * 10**9,
    targets_flops=58 * 10**8,
    recomputed_flops=17 * 10**9,
    traffic=850 * 10**6,
    activations=Activations({"encoder": 90_000_000, "decoder": 10_000_000}, fixed=1_000_000),
    checkpointed=Activations({"encoder": 20_000_000}, fixed=1_000_000),
    working=20_000_000,
    targets_weights=500_000_000,
    targets_working=30_000_000,
    targets_at_once=64,
    inputs=10_000_000,
    global_batch=512,
    micro_batch=32,
    epochs=10,
    steps=36_000,
    data_rate=1000.0,
)


def test_a_step_by_hand():
    """8 GPUs, ZeRO-1, 32 images twice on each."""
    row = estimate(WORK, DEVICE, 8, 1)
    assert (row.micro_batch, row.accumulation) == (32, 2)
    assert row.parts_ms == pytest.approx(
        {
            "GEMM": 6.4 + 0.64,  # 64 x 85e9 / 0.85e15 and 64 x 5.8e9 / 0.58e15
            "memory bandwidth": 64 + 4.41176,  # 64 x 850e6 / 0.85e12 and 30e9 / 8 / 0.85e12
            "communication": 63.2530,  # 3 x 2e9 x 7/8 / 83e9
            "host": 70,  # 2 x 292 x 70 / 584
            "data": 64,
        },
        rel=1e-5,
    )
    step = 7.04 + 68.41176 + 63.2530
    assert row.step_ms == pytest.approx(step, rel=1e-5)
    assert row.limit == "memory bandwidth"
    assert row.images_per_second == pytest.approx(512 / step * 1e3, rel=1e-5)
    assert row.hours == pytest.approx(step / 100, rel=1e-5)  # 36,000 steps
    assert row.gpu_hours == pytest.approx(8 * step / 100, rel=1e-5)
    assert row.mfu == pytest.approx(85e9 * 64 / step * 1e3 / 989.4e12, rel=1e-5)
    assert row.recompute_ms == pytest.approx(64 * (17e9 / 0.85e15 + 850e6 / 3 / 0.85e12) * 1e3)


def test_memory_by_hand():
    """GB: states, tokenizer 0.5, CUDA 2, buckets 0.4, and 1.05 times 32 images of 0.16 (0.08) plus 0.001."""
    images, checkpointed = 1.05 * (32 * 0.16 + 0.001), 1.05 * (32 * 0.08 + 0.001)
    for stage, state in ((0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 2 + 16 / 8)):
        row = estimate(WORK, DEVICE, 8, stage)
        assert row.peak == pytest.approx(((state + 2.9 + images) * 1e9, (state + 2.9 + checkpointed) * 1e9))
        assert row.fits
    assert estimate(WORK, DEVICE, 1, 0).peak[0] == pytest.approx((16 + 2.5 + images) * 1e9)  # no buckets


def test_the_largest_micro_batch_is_the_last_that_fits():
    for checkpointing in (False, True):
        largest = estimate(WORK, DEVICE, 8, 1).largest_micro_batch[checkpointing]
        assert peak_bytes(WORK, 8, 1, largest, checkpointing) <= DEVICE.memory
        assert peak_bytes(WORK, 8, 1, largest + 1, checkpointing) > DEVICE.memory
    small = estimate(WORK, replace(DEVICE, memory=18e9), 8, 0)
    assert (small.largest_micro_batch[0], small.fits) == (0, False)


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 3), (2, 5), (3, 6)])
def test_communication_of_every_stage(stage, passes):
    """Two micro-batches on 8 GPUs; on 16, one micro-batch each, over InfiniBand."""
    assert estimate(WORK, DEVICE, 8, stage).parts_ms["communication"] == pytest.approx(passes * 2 * 7 / 8 / 83 * 1e3)
    once = {0: 2, 1: 3, 2: 3, 3: 3}[stage]
    across = estimate(WORK, DEVICE, 16, stage).parts_ms["communication"]
    assert across == pytest.approx(once * 2 * 15 / 16 / (0.66 * 50 * 8) * 1e3)
    assert estimate(replace(WORK, micro_batch=512), DEVICE, 1, stage).parts_ms["communication"] == 0


@pytest.mark.parametrize(
    ("change", "gpus", "limit"),
    [
        ({"model_flops": 10**13}, 8, "GEMM"),
        ({}, 8, "memory bandwidth"),
        ({"traffic": 10**6}, 8, "communication"),
        ({"data_rate": 10.0}, 8, "data"),
        ({"tensors": 10_000}, 8, "host"),
    ],
)
def test_what_binds(change, gpus, limit):
    row = estimate(replace(WORK, **change), DEVICE, gpus, 1)
    assert row.limit == limit
    if limit in ("data", "host"):
        assert row.step_ms == row.parts_ms[limit]


def test_float32_computes_slower():
    row = estimate(replace(WORK, element=4), DEVICE, 8, 1)
    assert row.parts_ms["GEMM"] == pytest.approx(64 + 0.64)  # the tokenizer stays in float16


@pytest.mark.parametrize("gpus", [3, 1024])
def test_a_batch_that_does_not_divide(gpus):
    with pytest.raises(UserError, match=f"--gpus={gpus}: train.global_batch_size 512"):
        estimate(WORK, DEVICE, gpus, 1)
    with pytest.raises(UserError, match="micro-batches of 48"):
        estimate(replace(WORK, micro_batch=48), DEVICE, 8, 1)


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_assumptions_name_their_numbers(device):
    text = "\n".join(assumptions(WORK, device))
    for number in (f"{device.linears / 1e12:.0f} TFLOP/s", f"{device.convolutions / 1e12:.0f},", device.source):
        assert number in text
    assert f"{device.copy / 1e12:.2f} TB/s" in text
    assert device.linears < device_peak_flops(device.name)
    for number in (f"NVLink {device.nvlink / 1e9:.0f} GB/s", "83%", "66%", "0.12", "1,000 images/s", "3,600 steps"):
        assert number in text
