"""What a pretraining recipe takes on N GPUs: its FLOPs and bytes, and the assumptions that turn them into time.

FLOPs are 2 per multiply-add; memory, traffic and links in bytes and bytes/s; GB 1e9 bytes.
"""

import bisect
from dataclasses import dataclass

from cae_fast.config import UserError
from cae_fast.cost.devices import Device, device_peak_flops
from cae_fast.cost.memory import Activations, ModelState, model_state

GPUS_OF_A_NODE = 8
STAGES = (0, 1, 2, 3)
SERIAL = ("GEMM", "memory bandwidth", "communication")
NVLINK_SHARE, NETWORK_SHARE = 0.83, 0.66
HOST_MS = {0: 51 / 584, 1: 70 / 584, 2: 78 / 584, 3: 310 / 584}
"""For each parameter tensor and micro-batch: what Python and the engine take when the device takes nothing."""
DECODED_BY_A_CORE, WORKERS = 689, 12
OPTIMIZER_BYTES = 28 + 2
"""For each parameter: AdamW reads and writes, and the gradient's norm."""
CONTEXT_BYTES = 2_000_000_000
BUCKET_BYTES = 400_000_000
FRAGMENTATION = 1.05


@dataclass(frozen=True)
class Workload:
    """What a configuration costs whatever it runs on: FLOPs and bytes for each image, sizes, the recipe's length."""

    parameters: int
    tensors: int
    element: int
    model_flops: int
    targets_flops: int
    recomputed_flops: int
    """More with activation checkpointing."""
    traffic: int
    activations: Activations
    checkpointed: Activations
    working: int
    targets_weights: int
    targets_working: int
    targets_at_once: int
    inputs: int
    """Of two steps: the one in progress and the next."""
    global_batch: int
    micro_batch: int
    epochs: int
    steps: int
    data_rate: float


@dataclass(frozen=True)
class Estimate:
    """One row: bytes on one GPU, milliseconds of a step, and the whole recipe."""

    gpus: int
    stage: int
    micro_batch: int
    accumulation: int
    state: ModelState
    peak: tuple[float, float]
    """Without and with activation checkpointing, as `largest_micro_batch`."""
    largest_micro_batch: tuple[int, int]
    fits: bool
    parts_ms: dict[str, float]
    recompute_ms: float
    step_ms: float
    limit: str
    images_per_second: float
    mfu: float
    """The model's FLOPs, without its targets', over the data sheet's peak."""
    hours: float
    gpu_hours: float


def estimate(work: Workload, device: Device, gpus: int, stage: int) -> Estimate:
    """UserError where the global batch does not divide over the GPUs."""
    per_gpu = work.global_batch // gpus
    micro = max(1, min(work.micro_batch, per_gpu))
    if work.global_batch % (gpus * micro):
        raise UserError(
            f"--gpus={gpus}: train.global_batch_size {work.global_batch} is no multiple of {gpus} GPUs times "
            f"micro-batches of {micro}; set train.global_batch_size or train.micro_batch_size"
        )

    # What the device does one after the other, or the host or the data where they take longer.
    accumulation = per_gpu // micro
    parts = step_parts(work, device, gpus, stage, micro=micro, accumulation=accumulation)
    on_device = sum(parts[name] for name in SERIAL)
    step = max(on_device, parts["host"], parts["data"])
    limit = max(SERIAL if step == on_device else ("host", "data"), key=parts.__getitem__)
    images_per_second, hours = work.global_batch / step * 1e3, work.steps * step / 3.6e6

    # Each without and with activation checkpointing.
    plain, checkpointed = (peak_bytes(work, gpus, stage, micro, checkpointing=on) for on in (False, True))
    largest, largest_checkpointed = (
        largest_micro_batch(work, device, gpus, stage, checkpointing=on) for on in (False, True)
    )
    recompute = work.recomputed_flops / _linears(work, device) + work.traffic / 3 / device.copy

    peak = device_peak_flops(device.name)
    assert peak is not None, f"no data sheet of {device.name}"
    return Estimate(
        gpus=gpus,
        stage=stage,
        micro_batch=micro,
        accumulation=accumulation,
        state=model_state(work.parameters, stage, gpus, work.element),
        peak=(plain, checkpointed),
        largest_micro_batch=(largest, largest_checkpointed),
        fits=plain <= device.memory,
        parts_ms=parts,
        recompute_ms=1e3 * per_gpu * recompute,
        step_ms=step,
        limit=limit,
        images_per_second=images_per_second,
        mfu=work.model_flops * images_per_second / gpus / peak,
        hours=hours,
        gpu_hours=hours * gpus,
    )


def _linears(work: Workload, device: Device) -> float:
    return device.linears if work.element < 4 else device.float32


def step_parts(
    work: Workload, device: Device, gpus: int, stage: int, micro: int, accumulation: int
) -> dict[str, float]:
    """Milliseconds of one step: three that follow each other on the device, and two beside it."""
    images = micro * accumulation
    optimizer = OPTIMIZER_BYTES * work.parameters / (gpus if stage else 1)
    seconds = {
        "GEMM": images * (work.model_flops / _linears(work, device) + work.targets_flops / device.convolutions),
        "memory bandwidth": (images * work.traffic + optimizer) / device.copy,
        "communication": communication_seconds(work, device, gpus, stage, accumulation=accumulation),
        "host": accumulation * work.tensors * HOST_MS[stage] / 1e3,
        "data": images / work.data_rate,
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def communication_seconds(work: Workload, device: Device, gpus: int, stage: int, accumulation: int) -> float:
    """Passes over the weights' bytes, each (N - 1) / N of them through the slowest link of a ring.

    An all-reduce is two passes, gathering or scattering one. Stage 0: all-reduce; 1: and gathering the new weights;
    2: an all-reduce for each micro-batch; 3: for each micro-batch two gatherings and a scattering.
    """
    passes = {0: 2, 1: 3, 2: 2 * accumulation + 1, 3: 3 * accumulation}[stage]
    if gpus <= GPUS_OF_A_NODE:
        link = NVLINK_SHARE * device.nvlink
    else:  # a node's eight ports carry its eight rings
        link = NETWORK_SHARE * device.network * GPUS_OF_A_NODE
    return passes * work.parameters * work.element * (gpus - 1) / gpus / link


def peak_bytes(work: Workload, gpus: int, stage: int, micro: int, checkpointing: bool) -> float:
    """On one GPU: all gradients are taken to be there beside all activations, as with accumulation they are."""
    kept = work.checkpointed if checkpointing else work.activations
    state = model_state(work.parameters, stage, gpus, work.element).total
    if stage == 3:  # gathered for a pass: below DeepSpeed's limit of 1e9 live parameters, all of them
        state += work.parameters * work.element
    images = micro * (kept.per_image + work.working + work.inputs) + kept.fixed
    images += min(micro, work.targets_at_once) * work.targets_working
    buckets = BUCKET_BYTES if gpus > 1 else 0
    return state + work.targets_weights + CONTEXT_BYTES + buckets + FRAGMENTATION * images


def largest_micro_batch(work: Workload, device: Device, gpus: int, stage: int, checkpointing: bool) -> int:
    """0 where not even one image fits; at most 65,536."""

    def peak(micro: int) -> float:
        return peak_bytes(work, gpus, stage, micro, checkpointing=checkpointing)

    return bisect.bisect_right(range(1, 65_537), device.memory, key=peak)


def assumptions(work: Workload, device: Device) -> list[str]:
    """Everything the numbers rest on that is not a count of the model's, with its source."""
    steps = work.steps // work.epochs

    return [
        f"{device.name}: the model's products {_linears(work, device) / 1e12:.0f} TFLOP/s, its targets' "
        f"{device.convolutions / 1e12:.0f}, other ops {device.copy / 1e12:.2f} TB/s ({device.source}); "
        f"{device.memory / 1e9:.1f} GB",
        f"NVLink {device.nvlink / 1e9:.0f} GB/s, of which {NVLINK_SHARE:.0%} are reached; over {GPUS_OF_A_NODE} GPUs "
        f"InfiniBand, one port of {device.network / 1e9:.0f} GB/s for each GPU, {NETWORK_SHARE:.0%} (assumed)",
        "communication is not overlapped with computing (the worst case): ZeRO-0 all-reduces gradients, 1 and 2 gather "
        "weights too (counted in DeepSpeed 0.19.8), 3 gathers twice and scatters in each micro-batch (1910.02054)",
        "products, other ops and communication follow each other; products hide their own reading and writing; "
        "attention counts in both; passes between a tokenizer's convolutions are not counted",
        f"host: {', '.join(f'{ms:.2f}' for ms in HOST_MS.values())} ms for each parameter tensor and micro-batch with "
        "ZeRO 0, 1, 2, 3 (DeepSpeed 0.19.8 on a CPU, tiny tensors; CUDA graphs would avoid most of it)",
        f"data: {work.data_rate:,.0f} images/s reach each GPU (default: {DECODED_BY_A_CORE} decoded by each of "
        f"{WORKERS} cores, measured on one core; --data-rate)",
        f"{steps:,} steps an epoch, {work.epochs} epochs (--images, optim.epochs); no time for checkpoints",
        "activations: what the Triton ops save (counted); attention in float32 or over 129 tokens runs in torch and "
        "is counted alike; checkpointing keeps the inputs of every block",
        f"besides: {CONTEXT_BYTES / 1e9:.0f} GB for CUDA, cuBLAS and NCCL, {BUCKET_BYTES / 1e9:.1f} GB of buckets of "
        f"1e8 elements, {FRAGMENTATION - 1:.0%} fragmentation (assumed); all gradients beside all activations",
    ]
