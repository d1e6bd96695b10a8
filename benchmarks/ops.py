"""Time every op's backends side by side, at the shapes of ViT-B, L and H; refuse to time what is not correct.

    python benchmarks/ops.py                           # a GPU: bfloat16, real shapes; a CPU: float32, tiny shapes
    python benchmarks/ops.py -k attention --json out.json

Each row is one backend of one op: median milliseconds of the forward and of the backward pass, bytes that must move
over that time as a share of the copy bandwidth measured in the same run, and the ratio to the plain torch reference.
"""

# B batch, N patches, n tokens, D width, H heads, C head width, V codes.

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from cae_kernels import (
    alignment_loss,
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
)
from cae_kernels.dispatch import BACKENDS, why_not

functorch_config.donated_buffer = False  # or a compiled backward pass could be timed once only

EPS = 1e-6
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

    def __post_init__(self) -> None:
        self.batch, self.patches, self.width, self.heads = SHAPES[self.name]
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
        return Case(op, f"{self.name} {kind}".strip(), run, inputs, (moved[0], moved[-1]), forward_only=len(moved) == 1)


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
        lambda x, y, g, w, b: residual_norm(x, y, g, None, (w, b), EPS),
        [s.rows(s.tokens), s.rows(s.tokens), *s.vectors(3)],
        *(4 * s.stream, 6 * s.stream),
    )
    yield s.case(
        "residual_norm",
        lambda x, y, g, *w: residual_norm_qkv(x, y, g, None, table, s.masked_ids, w[:2], w[2:4], w[4:], EPS),
        [s.rows(s.half), s.rows(s.half), *s.vectors(7)],
        *(6 * s.masked_stream, 8 * s.masked_stream),
        kind="qkv",
    )
    yield s.case(
        "residual_norm",
        lambda x, *w: norm_qkv(x, table, s.visible_ids, None, w[:2], w[2:], EPS)[1:],
        [s.rows(s.half), *s.vectors(4)],
        *(3 * s.masked_stream, 4 * s.masked_stream),
        kind="kv",
    )


def token_cases(s: Sizes) -> Iterator[Case]:
    positions, target = s.make(s.patches + 1, s.width), s.rows(s.half)
    yield s.case(
        "gather_tokens",
        lambda patches, cls: gather_tokens(patches, s.visible_ids, s.masked_ids, cls, positions),
        [s.rows(s.patches), s.make(1, 1, s.width)],
        *(4 * s.stream, 3 * s.masked_stream),
    )
    prediction = [s.rows(s.half)]
    moved = 2 * s.masked_stream, 3 * s.masked_stream
    yield s.case("alignment_loss", lambda x: alignment_loss(x, target), prediction, *moved)


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
    pooled = functools.partial(bias_residual_relu, pool=True)
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


def time_ms(run: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of single calls, after a warm-up; real shapes exceed any cache, so inputs need no rotation."""
    run()
    samples: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(samples) < 5:
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            run()
            samples.append((time.perf_counter() - start) * 1e3)
    return samples


def measure(case: Case, name: str, truth: list[Tensor], device: torch.device, seconds: float) -> dict:
    choose(case.op, name)
    run = torch.compile(case.run) if name == "compiled" else case.run
    inputs = [tensor.detach().clone().requires_grad_(not case.forward_only) for tensor in case.inputs]
    wrong = error(outputs_and_gradients(case, run, inputs), truth)
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "backend": name, "error": wrong}
    if not wrong <= LIMITS[case.inputs[0].dtype]:
        return row | {"failed": f"error {wrong:.1e}; not timed"}
    if case.forward_only:
        return row | {"forward_ms": time_ms(lambda: run(*inputs), device, seconds)}
    outputs = flat(run(*inputs))
    outputs = [out for out in outputs if out.requires_grad]
    upstream = [torch.randn_like(out) for out in outputs]

    def backward() -> None:
        torch.autograd.grad(outputs, inputs, upstream, retain_graph=True, allow_unused=True)

    return row | {
        "forward_ms": time_ms(lambda: run(*inputs), device, seconds),
        "backward_ms": time_ms(backward, device, seconds),
    }


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes read and written per second by a plain copy."""
    source = torch.empty(2**29 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(time_ms(lambda: target.copy_(source), device, seconds)) * 1e-3)


def table_row(case: Case, row: dict, reference: dict, bandwidth: float) -> str:
    start = f"{case.op:22s} {case.shape:10s} {row['backend']:15s}"
    if "failed" in row:
        return f"{start} FAILED: {row['failed']}"
    cells = [f"error {row['error']:.1e}"]
    for key, moved in (("forward_ms", case.moved[0]), ("backward_ms", case.moved[1])):
        if key in row:
            median = statistics.median(row[key])
            ratio = statistics.median(reference[key]) / median if key in reference else float("nan")
            share = moved / (median * 1e-3) / bandwidth
            cells.append(f"{key[:-3]} {median:9.3f} ms  {share:5.0%} of copy  {ratio:5.2f}x")
    return f"{start} {'   '.join(cells)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", help="only ops with this in their name")
    parser.add_argument(
        "--shapes", nargs="*", choices=list(SHAPES), help="default: all but tiny on a GPU, tiny on a CPU"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="of timing per number")
    parser.add_argument("--json", type=Path, help="write raw samples here")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = args.shapes or (["ViT-B", "ViT-L", "ViT-H"] if device.type == "cuda" else ["tiny"])
    bandwidth = copy_bandwidth(device, args.seconds)
    print(f"{dtype}, copy bandwidth {bandwidth / 1e9:.0f} GB/s; ratios are to the plain torch reference")
    rows = []
    for shape in shapes:
        torch.manual_seed(0)
        for case in cases(Sizes(shape, device, dtype)):
            if args.k not in case.op:
                continue
            choose(case.op, "reference")
            leaves = [tensor.detach().clone().requires_grad_(not case.forward_only) for tensor in case.inputs]
            truth = outputs_and_gradients(case, case.run, leaves)
            reference: dict = {}
            for name in backends(case.op, device):
                torch.compiler.reset()
                rows.append(measure(case, name, truth, device, args.seconds))
                reference = reference or rows[-1]
                print(table_row(case, rows[-1], reference, bandwidth), flush=True)
    if args.json:
        save(args.json, rows, bandwidth, device)
    return 1 if any("failed" in row for row in rows) else 0


def save(path: Path, rows: list[dict], bandwidth: float, device: torch.device) -> None:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "revision": git.stdout.strip() or None,
        "command": " ".join(sys.argv),
        "copy_bandwidth": bandwidth,
        "rows": rows,
    }
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(facts))
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
