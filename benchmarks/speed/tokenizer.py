"""Cost of encoding with DALL-E's encoder (random weights, published size), one improvement after the other.

  python -m benchmarks.speed.tokenizer --batch 256            # on a GPU
  python -m benchmarks.speed.tokenizer --batch 4 --steps 3    # on a CPU, without float16: it is emulated there

Columns: ms for the batch (median), images/s, GFLOP per image, GB that convolutions and last layer read and write for
the batch, peak memory in GB above the weights (CUDA only), and the share of codes that equals those of the first row.

B batch, T side of the images, N positions, Nm masked.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import earlier_rows, record, save
from cae_fast.models.dalle import DalleEncoder, DalleTokenizer, map_pixels
from cae_kernels.dispatch import backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--grid", type=int, default=14, help="14: 112 px (default); 16: 128 px, ViT-H/14")
    parser.add_argument("--width", type=int, default=256, help="of the first group; DALL-E's: 256")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument("--json", type=Path, help="write raw samples here, after every row")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    size = 8 * args.grid
    images = torch.randint(256, (args.batch, 3, size, size), dtype=torch.uint8, device=device)  # (B, 3, T, T)
    order = torch.rand(args.batch, args.grid**2, device=device).argsort(1)
    masked_ids = order[:, : args.grid**2 // 2].sort(1).values  # (B, Nm)
    encoder = DalleEncoder(args.width).eval().requires_grad_(False).to(device)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, batch {args.batch}, {size} px")
    print(f"{'':38s}{'ms':>9s}{'img/s':>9s}{'GFLOP':>8s}{'GB':>8s}{'peak':>8s}{'agree':>9s}")

    settings = {"batch": args.batch, "grid": args.grid, "width": args.width}
    rows = earlier_rows(args.json, ("name",), **settings)
    first = None
    for label, run in variants(encoder, device, args.compile):
        if (label,) in rows and not args.again and first is not None:
            continue
        row, codes = measure(run, images, masked_ids, args.steps)
        first = codes if first is None else first  # measured in every run: the others' codes are held against it
        row["agree"] = (codes == first).float().mean().item()

        text = f"{label:38s}{row['ms']:9.2f}{row['images_per_second']:9.0f}{row['gflop']:8.2f}{row['gb']:8.2f}"
        peak = "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
        print(f"{text}{peak:>8s}{row['agree']:9.3%}", flush=True)
        rows[(label,)] = {"name": label} | row
        if args.json:
            save(args.json, record("tokenizer", **settings, rows=list(rows.values())))


Encode = Callable[[Tensor, Tensor], Tensor]


def variants(encoder: DalleEncoder, device: torch.device, compile: bool) -> list[tuple[str, Encode]]:
    """(name, function of images and masked_ids), each with one thing more than the one before.

    `+ fused ...` is there where the kernel of bias_relu runs; in the rows before, torch makes these passes one by one.
    """

    def all_logits(dtype: torch.dtype, memory_format: torch.memory_format) -> Encode:
        model = copied(encoder).to(dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]

        def run(images: Tensor, masked_ids: Tensor) -> Tensor:
            pixels = map_pixels(images).to(dtype, memory_format=memory_format)
            return model(pixels).argmax(1).flatten(1).gather(1, masked_ids)

        return run

    rows = [("float32, all logits", all_logits(torch.float32, torch.contiguous_format))]
    best = torch.float32
    if device.type == "cuda":
        best = torch.float16
        rows.append(("float16", all_logits(best, torch.contiguous_format)))
    rows.append((f"{str(best).removeprefix('torch.')}, channels_last", all_logits(best, torch.channels_last)))
    rows.append(("+ last layer at masked positions only", DalleTokenizer(copied(encoder), None, device).encode))
    rows = [(label, with_torch_passes(run)) for label, run in rows]

    if backend("bias_relu", encoder.input.weight) == "triton":
        rows.append(("+ fused bias, ReLU, residual, pooling", DalleTokenizer(copied(encoder), None, device).encode))
    if compile:
        tokenizer = DalleTokenizer(copied(encoder), None, device)
        rows.append(("+ torch.compile", torch.compile(tokenizer.encode)))
    return rows


def with_torch_passes(run: Encode) -> Encode:
    setting = f"{os.environ.get('CAE_KERNELS', '')},bias_relu=reference"

    def plain(images: Tensor, masked_ids: Tensor) -> Tensor:
        with mock.patch.dict(os.environ, CAE_KERNELS=setting):
            return run(images, masked_ids)

    return plain


def copied(encoder: DalleEncoder) -> DalleEncoder:
    other = DalleEncoder(encoder.input.out_channels).to(encoder.input.weight.device)
    other.load_state_dict(encoder.state_dict())
    return other.eval().requires_grad_(False)


@torch.no_grad()
def measure(run: Encode, images: Tensor, masked_ids: Tensor, steps: int) -> tuple[dict[str, Any], Tensor]:
    codes = run(images, masked_ids)  # also compiles
    cuda = images.device.type == "cuda"
    seconds, peak = [], None

    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(steps):
        began = time.perf_counter()
        run(images, masked_ids)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if cuda:
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9

    # In a run of its own, not timed: counting takes time.
    with FlopCounterMode(display=False) as counter, ConvolutionBytes() as moved:
        run(images, masked_ids)

    typical = statistics.median(seconds)
    row = {"ms": typical * 1e3, "images_per_second": len(images) / typical, "peak_gb": peak}
    row["samples_ms"] = [second * 1e3 for second in seconds]
    return row | {"gflop": counter.get_total_flops() / len(images) / 1e9, "gb": moved.total / 1e9}, codes


class ConvolutionBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of inputs, weights and outputs of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm):
            self.total += sum(x.nbytes for x in (*args, out) if isinstance(x, Tensor))
        return out


if __name__ == "__main__":
    main()
