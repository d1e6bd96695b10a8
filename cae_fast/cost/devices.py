"""What a GPU can do: the data sheet's peak, which MFU is a share of, and the rates that budgets and estimates assume.

FLOPs are 2 per multiply-add; bytes of a copy are those read and those written.
"""

import re
from dataclasses import dataclass, replace

# Dense bf16 matrix throughput in FLOP/s (NVIDIA's data sheets; half of the figures given "with sparsity").
# The first name found as a whole word in the device's name counts.
PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def device_peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of the CUDA device of this name; None when unknown or only a slice (MIG) of a device."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


@dataclass(frozen=True)
class Device:
    """Bytes, FLOP/s and byte/s of one GPU; nvlink and network: in one direction, as bought."""

    name: str
    memory: float
    linears: float
    """FLOP/s of linear layers in bf16 at a ViT's shapes, forward and backward."""
    convolutions: float
    """FLOP/s of a tokenizer's convolutions in fp16."""
    float32: float
    """FLOP/s of linear layers in float32, without TF32."""
    copy: float
    nvlink: float
    network: float
    source: str


# Not measured here: `benchmarks/speed/peaks.py` measures a card's own, and `cae-fast estimate --measured` takes them.
# linears: 61 % of the data sheet's peak. A published H100 figure for 65,536 x 1,024 x 1,024 in bf16 is 583 TFLOP/s; an
# 8192-cube reaches 798, but a step has no such product. convolutions: 45 %. copy: 78 % of the data sheet's 3.35 TB/s,
# as kernels that do more than copy reach. float32: 85 % of the data sheet's 67 TFLOP/s.
ASSUMED = "assumed, not measured: 61 %, 45 % and 78 % of the data sheet's"
H100 = Device(
    name="H100 SXM 80 GB",
    memory=85.5e9,
    linears=600e12,
    convolutions=450e12,
    float32=57e12,
    copy=2.6e12,
    nvlink=450e9,
    network=50e9,
    source=ASSUMED,
)
DEVICES = {
    "h100": H100,
    # The same chip with other memory: 4.8 TB/s.
    "h200": replace(H100, name="H200 SXM 141 GB", memory=150.7e9, copy=3.7e12),
    # 312 TFLOP/s, in float32 19.5, and 2.04 TB/s.
    "a100": Device(
        name="A100 SXM 80 GB",
        memory=85.9e9,
        linears=189e12,
        convolutions=142e12,
        float32=16.6e12,
        copy=1.58e12,
        nvlink=300e9,
        network=25e9,
        source=ASSUMED,
    ),
}
