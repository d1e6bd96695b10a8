"""Times of single calls, and the two ceilings they are held against.

On a GPU: device events around replays of a CUDA graph, so that launching costs nothing, over as many copies of the
inputs as the L2 cache cannot hold. On a CPU: the wall clock.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import L2_BYTES

MOST_COPIES = 8


def copies_past_cache(tensors: Sequence[Tensor], device: torch.device) -> int:
    """How many sets of these tensors to rotate, so that none is still in the cache when its turn comes again."""
    if device.type != "cuda":
        return 1
    size = sum(tensor.nbytes for tensor in tensors)
    return min(max(math.ceil(2 * L2_BYTES / max(size, 1)), 1), MOST_COPIES)


def time_ms(runs: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of a single call, the mean over `runs` (the same call on other copies of its inputs) a sample."""
    for run in runs:
        run()
    samples: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(samples) < 5:
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for run in runs:
                run()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last) / len(runs))
        else:
            start = time.perf_counter()
            for run in runs:
                run()
            samples.append((time.perf_counter() - start) * 1e3 / len(runs))
    return samples


def graphed(runs: Sequence[Callable[[], Any]], device: torch.device) -> tuple[list[Callable[[], Any]], str]:
    """The calls as CUDA graphs and "graph"; as they are and "eager" on a CPU or where a call cannot be captured."""
    if device.type != "cuda":
        return list(runs), "eager"
    for run in runs:
        for _ in range(2):
            run()

    # Backward passes run on the stream of their forward pass, so that one is captured: it must not be the default one.
    stream = torch.cuda.current_stream()
    replays: list[Callable[[], Any]] = []
    try:
        for run in runs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
            replays.append(graph.replay)
    except RuntimeError as error:  # it waits for the host, which a graph cannot
        torch.cuda.synchronize()
        return list(runs), f"eager ({str(error).splitlines()[0][:80]})"
    return replays, "graph"


def middle(samples: list[float]) -> tuple[float, float]:
    """Median, and half the distance of the 10th and 90th percentile as a share of it."""
    tenths = statistics.quantiles(samples, n=10)
    median = statistics.median(samples)
    return median, (tenths[-1] - tenths[0]) / 2 / median


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Bytes read and written per second by a plain copy."""
    source = torch.randint(256, (2**29 if device.type == "cuda" else 2**26,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(time_ms([lambda: target.copy_(source)], device, seconds)) * 1e-3)


def product_rate(device: torch.device, seconds: float) -> float:
    """FLOP/s of the largest linear layer's product in a ViT-L step: bfloat16 on a GPU, small and float32 on a CPU.

    Not of a large cube: an H100 does 8192^3 at a rate that no product of the step reaches.
    """
    cuda = device.type == "cuda"
    (rows, out, features), dtype = ((25_344, 4096, 1024), torch.bfloat16) if cuda else ((512,) * 3, torch.float32)
    x = torch.randn(rows, features, device=device).to(dtype)
    w = torch.randn(out, features, device=device).to(dtype)
    return 2 * rows * out * features / (statistics.median(time_ms([lambda: x @ w.t()], device, seconds)) * 1e-3)
