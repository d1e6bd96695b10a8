"""The rates of this card that floors, budgets and `cae-fast estimate --measured` are held against.

    python -m benchmarks.speed.peaks --json peaks.json       # a GPU: ViT-L at batch 256, ViT-H at batch 128
    python -m benchmarks.speed.peaks --models tiny           # a CPU: float32, tiny shapes

  linear       bfloat16 products of the encoder's linear layers and the head: forward, d-input and d-weight, each in
               the layout of the step's own call
  convolution  every convolution of DALL-E's encoder in float16, channels_last, cudnn.benchmark on
  cube         8192 x 8192 x 8192, which no step has: what is usually published
  copy         bytes read and written per second by a plain copy

Each time is the median of replays of a CUDA graph, over inputs rotated past the L2 cache. `rates`: FLOP/s of a step's
products and of a tokenizer's convolutions, every shape as often as the encoder and its target pass have it, and byte/s.
"""

# B batch, M rows, N out features, K in features, S side.

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import earlier_rows, record, save, settled
from benchmarks.speed.timing import copies_past_cache, copy_bandwidth, graphed, time_ms
from cae_fast.models.dalle import NUM_GROUPS, DalleEncoder


class Model(NamedTuple):
    batch: int
    patches: int
    width: int
    depth: int
    codes: int = 8192
    tokenizer_width: int = 256


MODELS = {
    "ViT-L": Model(batch=256, patches=196, width=1024, depth=24),
    "ViT-H": Model(batch=128, patches=256, width=1280, depth=32),
    "tiny": Model(batch=2, patches=16, width=96, depth=2, codes=512, tokenizer_width=8),
}
CUBE = {"cuda": 8192, "cpu": 256}


@dataclass(frozen=True)
class Shape:
    """One product or convolution; size: M, N, K, or B, in, out, kernel, S. count: how often a step makes it."""

    kind: str
    model: str
    layer: str
    direction: str
    size: tuple[int, ...]
    count: int

    @property
    def key(self) -> tuple[str, ...]:
        return self.kind, self.model, self.layer, self.direction

    @property
    def flops(self) -> int:
        if self.kind == "convolution":
            batch, before, after, kernel, side = self.size
            return 2 * batch * before * after * kernel**2 * side**2
        return 2 * math.prod(self.size)


def shapes(model: str) -> Iterator[Shape]:
    batch, patches, width, depth, codes, tokenizer_width = MODELS[model]

    # Of the encoder, with visible patches and the class token, and the decoder's head.
    rows = batch * (patches // 2 + 1)
    layers = {"qkv": (3 * width, width), "proj": (width, width), "fc1": (4 * width, width), "fc2": (width, 4 * width)}
    linears = [(name, (rows, *size), depth) for name, size in layers.items()]
    linears.append(("head", (batch * (patches // 2), codes, width), 1))
    for name, size, count in linears:
        forward = count if name == "head" else 2 * count  # the target pass has no backward pass
        for direction, times in (("forward", forward), ("d-input", count), ("d-weight", count)):
            yield Shape("linear", model, name, direction, size=size, count=times)

    side = 8 * math.isqrt(patches)
    for (before, after, kernel, level), count in convolutions(tokenizer_width).items():
        size = batch, before, after, kernel, side >> level
        layer = f"{before} to {after}, {kernel}x{kernel}"
        yield Shape("convolution", model, layer, f"{side >> level} px", size=size, count=count)


def convolutions(width: int) -> Counter[tuple[int, int, int, int]]:
    """How often DALL-E's encoder has (in, out, kernel, halvings of the side before); without its last layer."""
    with torch.device("meta"):
        encoder = DalleEncoder(width)
    assert len(encoder.groups) == NUM_GROUPS
    found: Counter[tuple[int, int, int, int]] = Counter()
    for level, part in [(0, encoder.input), *enumerate(encoder.groups)]:
        for conv in part.modules():
            if isinstance(conv, nn.Conv2d):
                found[conv.in_channels, conv.out_channels, conv.kernel_size[0], level] += 1
    return found


def operands(shape: Shape, device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The call, and random inputs for it."""
    cuda = device.type == "cuda"

    def make(*size: int) -> Tensor:
        types = torch.float16 if shape.kind == "convolution" else torch.bfloat16
        return torch.randn(*size, device=device).to(types if cuda else torch.float32)

    if shape.kind == "convolution":
        batch, before, after, kernel, side = shape.size
        x = make(batch, before, side, side).to(memory_format=torch.channels_last)
        w = make(after, before, kernel, kernel).to(memory_format=torch.channels_last)
        return partial(F.conv2d, padding=kernel // 2), [x, w]

    rows, out, features = shape.size
    if shape.direction == "forward":
        return lambda x, w: x @ w.t(), [make(rows, features), make(out, features)]
    if shape.direction == "d-input":
        return torch.mm, [make(rows, out), make(out, features)]
    return lambda d, x: d.t() @ x, [make(rows, out), make(rows, features)]


def measure(shape: Shape, device: torch.device, seconds: float) -> dict[str, Any]:
    run, inputs = operands(shape, device)
    copies = [inputs]
    copies += [[x.clone() for x in inputs] for _ in range(copies_past_cache(inputs, device) - 1)]
    runs, timed = graphed([partial(run, *own) for own in copies], device)
    milliseconds = time_ms(runs, device, seconds)
    return asdict(shape) | {"flops": shape.flops, "ms": milliseconds, "timed": timed}


def rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """FLOP/s of each kind that was measured, and byte/s of "copy"."""

    def rate(kind: str, model: str | None = None) -> float | None:
        own = [row for row in rows if row["kind"] == kind and model in (None, row["model"])]
        milliseconds = sum(row["count"] * statistics.median(row["ms"]) for row in own)
        return sum(row["count"] * row["flops"] for row in own) / milliseconds * 1e3 if own else None

    found = {"linears": rate("linear"), "convolutions": rate("convolution"), "cube": rate("cube")}
    for model in dict.fromkeys(row["model"] for row in rows if row["model"]):
        found |= {f"linears {model}": rate("linear", model), f"convolutions {model}": rate("convolution", model)}
    found["copy"] = next((row["bytes_per_second"] for row in rows if row["kind"] == "copy"), None)
    return {name: value for name, value in found.items() if value is not None}


def table_row(row: dict[str, Any]) -> str:
    if row["kind"] == "copy":
        return f"copy {row['bytes_per_second'] / 1e12:.3f} TB/s"
    median = statistics.median(row["ms"])
    name = f"{row['kind']:11s} {row['model']:6s} {row['layer']:18s} {row['direction']:9s}"
    size = " x ".join(map(str, row["size"]))
    return f"{name} {size:26s} x{row['count']:<3d} {median:8.3f} ms {row['flops'] / median / 1e9:6.1f} TFLOP/s"


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["ViT-L", "ViT-H"] if cuda else ["tiny"])
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing per shape")
    parser.add_argument("--json", type=Path, help="write raw samples here, after every shape")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.benchmark = True
    if cuda:
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are captured where the calls ran
    torch.manual_seed(0)

    cube = Shape("cube", "", "cube", "forward", size=(CUBE[device.type],) * 3, count=1)
    copy = Shape("copy", "", "copy", "", size=(), count=1)
    rows = earlier_rows(args.json, ("kind", "model", "layer", "direction"))
    for shape in [copy, cube, *(each for model in args.models for each in shapes(model))]:
        if settled(rows, shape.key) and not args.again:
            continue
        if shape.kind == "copy":
            rows[shape.key] = asdict(shape) | {"bytes_per_second": copy_bandwidth(device, args.seconds)}
        else:
            rows[shape.key] = measure(shape, device, args.seconds)
        print(table_row(rows[shape.key]), flush=True)
        if args.json:
            done = list(rows.values())
            save(args.json, record("peaks", rates=rates(done), rows=done))

    for name, value in rates(list(rows.values())).items():
        print(f"{name}: {value / 1e12:.2f} {'TB/s' if name == 'copy' else 'TFLOP/s'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
