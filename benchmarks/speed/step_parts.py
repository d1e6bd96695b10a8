"""Where the time of a step goes: a profiler trace (Chrome format) sorted into parts.

A GPU kernel belongs to the annotation ("inputs", "tokenizer", "optimizer") that it ran in; otherwise to the first rule
that finds its pattern in "launching op, kernel name". Without GPU kernels, the same rules sort the self time of the
CPU's ops. Streams overlap, so parts can add up to more than the time in which the device was busy.
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

PARTS = ("GEMM", "attention", "norm/elementwise", "tokenizer", "losses", "optimizer")
ANNOTATIONS = {"inputs": "tokenizer", "tokenizer": "tokenizer", "optimizer": "optimizer"}
RULES = tuple(
    (part, re.compile(pattern, re.IGNORECASE))
    for part, pattern in (
        ("losses", r"log_?softmax|nll_loss|cross_entropy|squared_error|mse_loss"),
        ("optimizer", r"adamw|multi_tensor|_foreach_|lpnorm"),
        ("attention", r"attention|flash|fmha|sdpa|scaled_dot_product|\bbmm|baddbmm|softmax"),
        ("GEMM", r"gemm|nvjet|cutlass|xmma|splitk|cublas|conv(?!ert)|aten::(addmm|mm|linear|matmul)\b|mkldnn"),
    )
)


def part_of(text: str) -> str:
    """The part of "launching op, kernel name"."""
    return next((part for part, pattern in RULES if pattern.search(text)), "norm/elementwise")


def step_parts(trace: dict[str, Any], steps: int) -> dict[str, Any]:
    """Milliseconds of a step: {"parts": {part: ms}, "busy": ms of the device, "kernels": launches, "largest": [...]}.

    largest: the twelve names that take the longest, as (name, part, ms, launches).
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    pieces = kernel_pieces(events) or cpu_pieces(events)
    parts = dict.fromkeys(PARTS, 0.0)
    names: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, part, microseconds in ((name, part, duration) for name, part, _, duration in pieces):
        parts[part] += microseconds / 1e3 / steps
        names[name, part].append(microseconds / 1e3 / steps)

    spans = [(start, start + duration) for _, _, start, duration in pieces]
    largest = sorted(names.items(), key=lambda item: -sum(item[1]))[:12]
    return {
        "parts": parts,
        "busy": covered(spans) / 1e3 / steps,
        "kernels": len(pieces) / steps,
        "largest": [(name, part, sum(each), len(each) / steps) for (name, part), each in largest],
    }


Piece = tuple[str, str, float, float]  # name, part, start and duration in microseconds


def kernel_pieces(events: list[dict[str, Any]]) -> list[Piece]:
    """What ran on the GPU; nothing in a trace of a CPU."""
    ops = {e["args"]["External id"]: e["name"] for e in events if e.get("cat") == "cpu_op" and has_id(e)}
    ranges = Ranges(e for e in events if e.get("cat") == "gpu_user_annotation")
    pieces = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launcher = ops.get(event["args"]["External id"], "") if has_id(event) else ""
            part = ranges.part_at(event) or part_of(f"{launcher}, {event['name']}")
            pieces.append((event["name"], part, float(event["ts"]), float(event["dur"])))
    return pieces


def has_id(event: dict[str, Any]) -> bool:
    return "External id" in event.get("args", {})


def cpu_pieces(events: list[dict[str, Any]]) -> list[Piece]:
    """The CPU's ops, each with the time that none of the ops inside it takes."""
    ranges = Ranges(e for e in events if e.get("cat") == "user_annotation")
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event.get("tid")].append(event)

    # Sorted by their start, the ops that are still open are those around the next one.
    pieces = []
    for ops in threads.values():
        inner = {id(op): 0.0 for op in ops}
        open_ops: list[dict[str, Any]] = []
        for op in sorted(ops, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
            while open_ops and end_of(open_ops[-1]) <= float(op["ts"]):
                open_ops.pop()
            if open_ops:
                inner[id(open_ops[-1])] += float(op["dur"])
            open_ops.append(op)
        for op in ops:
            own = max(float(op["dur"]) - inner[id(op)], 0.0)
            pieces.append((op["name"], ranges.part_at(op) or part_of(op["name"]), float(op["ts"]), own))
    return pieces


def end_of(event: dict[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])


class Ranges:
    """The annotated stretches of every stream (on a CPU: thread)."""

    def __init__(self, annotations: Iterable[dict[str, Any]]):
        self.found: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        for event in annotations:
            if event["name"] in ANNOTATIONS:
                self.found[event.get("tid")].append((float(event["ts"]), end_of(event), ANNOTATIONS[event["name"]]))
        for stretches in self.found.values():
            stretches.sort()

    def part_at(self, event: dict[str, Any]) -> str | None:
        stretches = self.found.get(event.get("tid"), [])
        before = bisect_right(stretches, (float(event["ts"]), float("inf"), ""))
        if before and float(event["ts"]) < stretches[before - 1][1]:
            return stretches[before - 1][2]
        return None


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total
