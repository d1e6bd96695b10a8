"""Time per 1,000 block-wise masks: the original's law in Python, the torch reference, and the Triton kernel on a GPU.

    python -m benchmarks.loading.masks --json masks.json

Milliseconds of wall time on one core (median of interleaved repeats). The kernel must give the reference's masks.
"""

import argparse
import functools
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.record import earlier, record, save
from cae_kernels import block_mask

COUNT = 1000
CASES = {"ViT-S, B, L: 98 of 14x14": (14, 98), "ViT-H: 128 of 16x16": (16, 128)}


class PythonBlockMask:
    """Block-wise masking one image at a time, patch by patch, as the original code does it (BEiT's Algorithm 1)."""

    def __init__(self, grid: int, num_masked: int, min_block: int = 16, min_aspect: float = 0.3) -> None:
        self.grid, self.num_masked, self.min_block = grid, num_masked, min_block
        self.log_aspect = math.log(min_aspect), -math.log(min_aspect)

    def __call__(self) -> NDArray[np.bool_]:
        mask = np.zeros((self.grid, self.grid), dtype=bool)
        count = 0
        while count < self.num_masked:
            count += self._place(mask, self.num_masked - count)
        return mask

    def _place(self, mask: NDArray[np.bool_], limit: int) -> int:
        for _ in range(10):
            area = random.uniform(self.min_block, limit)
            aspect = math.exp(random.uniform(*self.log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.grid or width >= self.grid:
                continue
            top, left = random.randint(0, self.grid - height), random.randint(0, self.grid - width)
            new = height * width - int(mask[top : top + height, left : left + width].sum())
            if 0 < new <= limit:
                for row in range(top, top + height):
                    for column in range(left, left + width):
                        if not mask[row, column]:
                            mask[row, column] = True
                return new
        return 0


def in_python(grid: int, num_masked: int) -> None:
    draw = PythonBlockMask(grid, num_masked)
    for _ in range(COUNT):
        assert draw().sum() == num_masked


def with_kernel(grid: int, num_masked: int, backend: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    os.environ["CAE_KERNELS"] = f"block_mask={backend}"
    positions = torch.arange(COUNT, device=device)
    masks = block_mask(positions, seed=0, height=grid, width=grid, num_masked=num_masked)
    if device == "cuda":
        torch.cuda.synchronize()
    return masks


def ways(grid: int, num_masked: int) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {
        "original's law in Python": functools.partial(in_python, grid, num_masked),
        "torch reference, CPU": functools.partial(with_kernel, grid, num_masked, backend="reference", device="cpu"),
    }
    if torch.cuda.is_available():
        on_gpu = functools.partial(with_kernel, grid, num_masked, device="cuda")
        found["torch reference, GPU"] = functools.partial(on_gpu, backend="reference")
        found["Triton kernel, GPU"] = triton = functools.partial(on_gpu, backend="triton")
        for ours, expected in zip(triton(), with_kernel(grid, num_masked, "reference", "cpu"), strict=True):
            assert torch.equal(ours.cpu(), expected), "the kernel's masks are not the reference's"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write raw samples here")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    args = parser.parse_args()
    if not args.again and earlier(args.json):
        print(f"{args.json} has it; --again measures again")
        return

    torch.set_num_threads(1)
    rows = []
    for case, (grid, num_masked) in CASES.items():
        runs = ways(grid, num_masked)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()  # compiles, where there is something to compile

        for _ in range(args.repeats):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                samples[name].append((time.perf_counter() - began) * 1e3)

        baseline = statistics.median(samples["original's law in Python"])
        for name, values in samples.items():
            median = statistics.median(values)
            print(f"{case:26s} {name:26s} {median:9.2f} ms per {COUNT}  {baseline / median:7.1f}x", flush=True)
            rows.append({"case": case, "way": name, "milliseconds_per_1000": values})
        if not torch.cuda.is_available():
            print(f"{case:26s} {'Triton kernel, GPU':26s} not measured: needs a CUDA GPU")
            rows.append({"case": case, "way": "Triton kernel, GPU", "missing": "a CUDA GPU"})
    if args.json:
        save(args.json, record("masks", rows=rows))


if __name__ == "__main__":
    main()
