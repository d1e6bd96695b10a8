"""Time every op's backends side by side, at the shapes of ViT-B, L and H; refuse to time what is not correct.

    python -m benchmarks.speed.ops                           # a GPU: bfloat16, real shapes; a CPU: float32, tiny shapes
    python -m benchmarks.speed.ops -k attention --json out.json
    python -m benchmarks.speed.ops --shapes ViT-L --batches 32 64 128 256

Each row is one backend of one op: median milliseconds of the forward and of the backward pass and half their spread
(10th to 90th percentile), bytes that must move over that time in GB/s and as a share of the copy bandwidth measured in
the same run, TFLOP/s of the reference's matrix products, the ratio to the plain torch reference; then what share the
least possible time (the longer of bytes at copy bandwidth and FLOPs at the rate of a linear layer's product, both
measured in the same run) has in both passes, and peak memory. On a GPU passes are replayed as CUDA graphs (or the row
says why not), with inputs rotated past the L2 cache. A backend that leaves the GPU unusable is recorded as failed, and
a new process goes on behind it. `pytest benchmarks/speed/bench_ops.py` shows the same through pytest-benchmark.
"""

# B batch, N patches, n tokens, D width, H heads, C head width, V codes.

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import device_lost, earlier_rows, record, save, settled, start_again
from benchmarks.speed.timing import copies_past_cache, copy_bandwidth, graphed, middle, product_rate, time_ms
from cae_kernels import (
    attention,
    bias_relu,
    bias_residual_relu,
    cross_attention,
    gather_tokens,
    layer_norm,
    linear_argmax,
    linear_cross_entropy,
    linear_gelu,
    norm_qkv,
    residual_norm,
    residual_norm_qkv,
    squared_error,
)
from cae_kernels.dispatch import BACKENDS, why_not

functorch_config.donated_buffer = False  # or a compiled backward pass could be timed once only

EPS = 1e-6
KEY = ("op", "shape", "backend")
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative Frobenius distance from plain torch in the same type
# batch, patches, width, heads
SHAPES = {
    "ViT-B": (256, 196, 768, 12),
    "ViT-L": (256, 196, 1024, 16),
    "ViT-H": (128, 256, 1280, 16),
    "tiny": (8, 16, 96, 3),
}


@dataclass
class Case:
    """One call: `run` on `inputs`; gradients of the float ones unless `forward_only`. `moved`: bytes that must move."""

    op: str
    shape: str
    run: Callable[..., Any]
    inputs: list[Tensor]
    moved: tuple[int, int]
    forward_only: bool = False


@dataclass
class Sizes:
    """A model's sizes, and random tensors of them."""

    name: str
    device: torch.device
    dtype: torch.dtype
    other_batch: int = 0
    """Instead of the shape's own; part of the name of a case."""

    def __post_init__(self) -> None:
        self.batch, self.patches, self.width, self.heads = SHAPES[self.name]
        self.label = f"{self.name} B={self.other_batch}" if self.other_batch else self.name
        self.batch = self.other_batch or self.batch

        self.half = self.patches // 2
        self.tokens, self.head = self.half + 1, self.width // self.heads
        self.codes = 8192 if self.name != "tiny" else 512
        self.element = torch.finfo(self.dtype).bits // 8
        self.stream = self.element * self.batch * self.tokens * self.width  # bytes of the encoder's tokens
        self.masked_stream = self.element * self.batch * self.half * self.width

        ids = torch.rand(self.batch, self.patches, device=self.device).argsort(1)
        self.visible_ids = ids[:, : self.half].sort(1).values
        self.masked_ids = ids[:, self.half :].sort(1).values

    def make(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def rows(self, count: int) -> Tensor:
        return self.make(self.batch, count, self.width)

    def vectors(self, count: int) -> list[Tensor]:
        return [self.make(self.width) for _ in range(count)]

    def case(self, op: str, run: Callable[..., Any], inputs: list[Tensor], *moved: int, kind: str = "") -> Case:
        return Case(
            op=op,
            shape=f"{self.label} {kind}".strip(),
            run=run,
            inputs=inputs,
            moved=(moved[0], moved[-1]),
            forward_only=len(moved) == 1,
        )


def cases(sizes: Sizes) -> Iterator[Case]:
    yield from attention_cases(sizes)
    yield from norm_cases(sizes)
    yield from token_cases(sizes)
    yield from product_cases(sizes)
    yield from convolution_cases(sizes)


def attention_cases(s: Sizes) -> Iterator[Case]:
    scale = s.head**-0.5
    qkv = [s.make(s.batch, s.tokens, 3, s.heads, s.head)]
    yield s.case("attention", lambda qkv: attention(qkv, scale), qkv, 4 * s.stream, 7 * s.stream)
    yield s.case(
        "cross_attention",
        lambda q, k1, v1, k2, v2: cross_attention(q, (k1, v1), (k2, v2), scale),
        [s.make(s.batch, s.half, s.heads, s.head) for _ in range(5)],
        *(6 * s.masked_stream, 11 * s.masked_stream),
    )


def norm_cases(s: Sizes) -> Iterator[Case]:
    table = s.make(s.patches, s.width)
    norm = [s.rows(s.tokens), *s.vectors(2)]
    yield s.case("layer_norm", lambda x, w, b: layer_norm(x, w, b, EPS), norm, 2 * s.stream, 3 * s.stream)

    yield s.case(
        "residual_norm",
        lambda x, y, g, w, b: residual_norm(x, y, g, None, norm=(w, b), eps=EPS),
        [s.rows(s.tokens), s.rows(s.tokens), *s.vectors(3)],
        *(4 * s.stream, 6 * s.stream),
    )

    # The regressor's: of masked patches queries, keys and values at once; of visible ones keys and values.
    yield s.case(
        "residual_norm",
        lambda x, y, g, *w: residual_norm_qkv(
            x, y, g, None, pos_embed=table, ids=s.masked_ids, norm_q=w[:2], norm_k=w[2:4], norm_v=w[4:], eps=EPS
        ),
        [s.rows(s.half), s.rows(s.half), *s.vectors(7)],
        *(6 * s.masked_stream, 8 * s.masked_stream),
        kind="qkv",
    )

    yield s.case(
        "residual_norm",
        lambda x, *w: norm_qkv(x, table, s.visible_ids, norm_q=None, norm_k=w[:2], norm_v=w[2:], eps=EPS)[1:],
        [s.rows(s.half), *s.vectors(4)],
        *(3 * s.masked_stream, 4 * s.masked_stream),
        kind="kv",
    )


def token_cases(s: Sizes) -> Iterator[Case]:
    positions, target = s.make(s.patches + 1, s.width), s.rows(s.half)
    yield s.case(
        "gather_tokens",
        lambda patches, cls: gather_tokens(patches, s.visible_ids, s.masked_ids, cls, pos_embed=positions),
        [s.rows(s.patches), s.make(1, 1, s.width)],
        *(4 * s.stream, 3 * s.masked_stream),
    )
    prediction = [s.rows(s.half)]
    moved = 2 * s.masked_stream, 3 * s.masked_stream
    yield s.case("squared_error", lambda x: squared_error(x, target), prediction, *moved)


def product_cases(s: Sizes) -> Iterator[Case]:
    rows, hidden = s.batch * s.half, 4 * s.width
    first = [s.rows(s.tokens), s.make(hidden, s.width) * s.width**-0.5, s.make(hidden)]
    yield s.case("linear_gelu", linear_gelu, first, 5 * s.stream, 14 * s.stream)
    target = torch.randint(s.codes, (rows,), device=s.device)
    yield s.case(
        "linear_cross_entropy",
        lambda x, w, b: linear_cross_entropy(x, w, b, target)[0],
        [s.make(rows, s.width), s.make(s.codes, s.width) * s.width**-0.5, s.make(s.codes)],
        *(2 * s.element * rows * s.codes, 2 * s.masked_stream),
    )
    head = [s.make(rows, 2048), s.make(s.codes, 2048), s.make(s.codes)]
    yield s.case("linear_argmax", linear_argmax, head, s.element * (rows + s.codes) * 2048)


def convolution_cases(s: Sizes) -> Iterator[Case]:
    """Between the convolutions of the tokenizer's first group, channels_last; x is overwritten."""
    side, width = 8 * math.isqrt(s.patches), 256 if s.name != "tiny" else 32

    def maps(channels: int) -> Tensor:
        return s.make(s.batch, side, side, channels).permute(0, 3, 1, 2)  # (B, C, side, side)

    hidden = [maps(width // 4), s.make(width // 4)]
    yield s.case("bias_relu", bias_relu, hidden, 2 * hidden[0].nbytes)
    block = [maps(width), s.make(width), maps(width)]
    yield s.case("bias_relu", bias_residual_relu, block, 4 * block[0].nbytes, kind="residual")
    pooled = partial(bias_residual_relu, pool=True)
    yield s.case("bias_relu", pooled, block, 5 * block[0].nbytes // 2, kind="pooled")


def backends(op: str, device: torch.device) -> list[str]:
    usable = [name for name in BACKENDS[op] if why_not(op, name, device.type) is None]
    return ["reference", "compiled", *(name for name in usable if name != "reference")]


def choose(op: str, name: str) -> None:
    """`compiled` is torch.compile of the reference."""
    os.environ["CAE_KERNELS"] = f"{op}={'reference' if name == 'compiled' else name}"


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of nested tuples, without Nones."""
    if isinstance(outputs, tuple):
        return [tensor for part in outputs for tensor in flat(part)]
    return [] if outputs is None else [outputs]


def outputs_and_gradients(case: Case, run: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    outputs = flat(run(*inputs))
    if case.forward_only:
        return outputs
    trained = [out for out in outputs if out.requires_grad]
    weights = [torch.linspace(0.5, 1.5, out.shape[-1] if out.ndim else 1, device=out.device) for out in trained]
    loss = torch.stack([(out.float() * weight).sum() for out, weight in zip(trained, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The worst relative Frobenius error; for integers the share that differs."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        if not a.is_floating_point():
            worst = max(worst, (a != b).float().mean().item())
            continue
        worst = max(worst, ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)).item())
    return worst


Passes = list[Callable[[], Any]]


def checked(case: Case, name: str, truth: list[Tensor], device: torch.device) -> tuple[float, Passes, Passes]:
    """The error of a backend, and its forward and backward passes on each copy of the inputs.

    Raises ArithmeticError where the error is over the limit: a time of a wrong result means nothing.
    """
    choose(case.op, name)
    run = torch.compile(case.run) if name == "compiled" else case.run
    inputs = [tensor.detach().clone().requires_grad_(not case.forward_only) for tensor in case.inputs]
    wrong = error(outputs_and_gradients(case, run, inputs), truth)
    if not wrong <= LIMITS[case.inputs[0].dtype]:
        raise ArithmeticError(f"error {wrong:.1e}; not timed")

    forwards: Passes = []
    backwards: Passes = []
    for copy in range(copies_past_cache(inputs, device)):
        own = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs] if copy else inputs
        forwards.append(partial(run, *own))
        if not case.forward_only:
            outputs = [out for out in flat(run(*own)) if out.requires_grad]
            upstream = [torch.randn_like(out) for out in outputs]
            backwards.append(partial(torch.autograd.grad, outputs, own, upstream, retain_graph=True, allow_unused=True))
    return wrong, forwards, backwards


def measure(case: Case, name: str, truth: list[Tensor], device: torch.device, seconds: float) -> dict:
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "backend": name, "moved": case.moved}
    try:
        row["error"], forwards, backwards = checked(case, name, truth, device)
        if device.type == "cuda":
            row["peak_bytes"] = peak_bytes(forwards, backwards)
        for key, passes in (("forward", forwards), ("backward", backwards)):
            if passes:
                runs, row[f"{key}_timed"] = graphed(passes, device)
                row[f"{key}_ms"] = time_ms(runs, device, seconds)
    except Exception as failure:  # whatever a library raises; the other backends are measured all the same
        row["failed"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    return row


def peak_bytes(forwards: Passes, backwards: Passes) -> int:
    """Memory that both passes take above their inputs."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = forwards[0]()
    if backwards:
        backwards[0]()
    del held
    return torch.cuda.max_memory_allocated() - before


def count_flops(case: Case) -> list[int]:
    """FLOPs of the reference's matrix products, forward and backward."""
    inputs = [tensor.detach().clone().requires_grad_(not case.forward_only) for tensor in case.inputs]
    with FlopCounterMode(display=False) as counter:
        outputs = [out for out in flat(case.run(*inputs)) if out.requires_grad]
        forward = counter.get_total_flops()
        if outputs:
            torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs], allow_unused=True)
    return [forward, counter.get_total_flops() - forward]


def table_row(row: dict, reference: dict, ceilings: dict[str, float]) -> str:
    start = f"{row['op']:20s} {row['shape']:19s} {row['backend']:15s}"
    if "failed" in row:
        return f"{start} FAILED: {row['failed']}"

    cells = [f"error {row['error']:.0e}"]
    total = 0.0
    for key, moved, flops in zip(("forward", "backward"), row["moved"], row["flops"], strict=True):
        if f"{key}_ms" not in row:
            continue
        median, spread = middle(row[f"{key}_ms"])
        total += median
        ratio = middle(reference[f"{key}_ms"])[0] / median if f"{key}_ms" in reference else float("nan")
        rate = moved / median * 1e3
        eager = "" if row[f"{key}_timed"] == reference.get(f"{key}_timed") else f" {row[f'{key}_timed']}"
        cells.append(
            f"{key} {median:8.3f} ms +-{spread:3.0%}{eager} {rate / 1e9:5.0f} GB/s {rate / ceilings['copy']:4.0%} "
            f"of copy {flops / median / 1e9:4.0f} TFLOP/s {ratio:5.2f}x"
        )

    cells.append(f"floor {floor_ms(row, ceilings) / total:4.0%}")
    if "peak_bytes" in row:
        cells.append(f"{row['peak_bytes'] / 1e6:.0f} MB")
    return f"{start} {'  '.join(cells)}"


def floor_ms(row: dict, ceilings: dict[str, float]) -> float:
    """The least time of the passes that were timed: of their bytes or of their FLOPs, whichever is longer."""
    passes = [i for i, key in enumerate(("forward_ms", "backward_ms")) if key in row]
    moved, flops = (sum(row[key][i] for i in passes) for key in ("moved", "flops"))
    return max(moved / ceilings["copy"], flops / ceilings["product"]) * 1e3


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only ops with this in their name")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), help="default: all but tiny; on a CPU tiny")
    parser.add_argument("--batches", nargs="+", type=int, help="default: each shape's own")
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing per number")
    parser.add_argument("--json", type=Path, help="write raw samples here, after every row, beside those there")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    args = parser.parse_args(argv)
    if args.batches and min(args.batches) < 1:
        parser.error(f"--batches has {min(args.batches)}: give numbers above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are captured where the forward passes ran
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = args.shapes or (["ViT-B", "ViT-L", "ViT-H"] if device.type == "cuda" else ["tiny"])

    # What every row is held against, measured in the same run.
    ceilings = {"copy": copy_bandwidth(device, args.seconds), "product": product_rate(device, args.seconds)}
    print(
        f"{dtype}, copy {ceilings['copy'] / 1e9:.0f} GB/s, product {ceilings['product'] / 1e12:.2f} TFLOP/s; "
        "ratios are to the plain torch reference"
    )

    rows = earlier_rows(args.json, KEY)
    for shape, batch in product(shapes, args.batches or [0]):
        torch.manual_seed(0)
        for case in cases(Sizes(shape, device, dtype, batch)):
            names = backends(case.op, device) if args.k in case.op else []
            wanted = [name for name in names if args.again or not settled(rows, (case.op, case.shape, name))]
            for row in compare(case, wanted, device, args.seconds, ceilings=ceilings):
                rows[case.op, case.shape, row["backend"]] = row
                print(table_row(row, rows.get((case.op, case.shape, "reference"), row), ceilings), flush=True)
                if args.json:
                    save(args.json, record("ops", dtype=str(dtype), ceilings=ceilings, rows=list(rows.values())))
                if "failed" in row and args.json and device_lost():
                    start_again()
    return 1 if any("failed" in row for row in rows.values()) else 0


def compare(
    case: Case, names: list[str], device: torch.device, seconds: float, ceilings: dict[str, float]
) -> Iterator[dict]:
    """A row for each of these backends of a case."""
    if not names:
        return
    choose(case.op, "reference")
    leaves = [tensor.detach().clone().requires_grad_(not case.forward_only) for tensor in case.inputs]
    truth = outputs_and_gradients(case, case.run, leaves)
    flops = count_flops(case)
    for name in names:
        torch.compiler.reset()
        yield measure(case, name, truth, device, seconds=seconds) | {"flops": flops, "ceilings": ceilings}


if __name__ == "__main__":
    sys.exit(main())
