"""Whole pretraining steps, side by side: ours, plain torch, torch.compile, both together, and the original's.

    python -m benchmarks.speed.train_step --models ViT-L ViT-H --json train_step.json     # a GPU
    python -m benchmarks.speed.train_step --tiny                                          # a CPU: small sizes, float32
    python -m benchmarks.speed.train_step --data /data/imagenet/train                     # through the loader

  ours                  as `cae-fast pretrain` runs: fused kernels, tokenizer on a stream of its own
  reference             the same step in plain torch ops (CAE_KERNELS=all=reference): attention by torch's SDPA, and
                        torch's own fused AdamW without our engine's costs (torch_adamw.py)
  compiled              the reference with model and tokenizer under torch.compile: the strongest plain torch we know
  ours-compiled         our kernels, as registered ops, with model and tokenizer under torch.compile
  ours-compiled-graphs  the same with the model's passes as CUDA graphs (mode="reduce-overhead")
  original              original_step.py: the original's step as its users run it (float16 autocast and scaler)

Targets are codes of DALL-E's encoder (random weights, published size). Every variant runs in a process of its own, one
after the other, and measures the device's ceilings too (a copy, and a product of the step's own shape). Synthetic data:
two random batches in pinned memory. Columns: median milliseconds of a step and half the spread (10th to 90th
percentile), images/s, MFU of the model's FLOPs and of all (with the tokenizer's), peak memory, and milliseconds per
part from a profile of further steps (`idle`: median less the time in which the device was busy). On a CPU the largest
micro-batch and memory are not measured.
"""

# B micro-batch, N patches, S image side, T side of the tokenizer's images.

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial, wraps
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from benchmarks.record import earlier_rows, record, save, settled
from benchmarks.speed.original_step import OriginalStep, boolean_mask
from benchmarks.speed.step_parts import PARTS, step_parts
from benchmarks.speed.timing import copy_bandwidth, middle, product_rate
from benchmarks.speed.torch_adamw import TorchAdamW
from cae_fast.commands.pretrain import Job, make_inputs, micro_batches, prepare, take_step
from cae_fast.config import PretrainConfig
from cae_fast.cost.devices import device_peak_flops
from cae_fast.data.loader import Batch
from cae_fast.files import write_safetensors
from cae_fast.models.dalle import DalleEncoder
from cae_fast.models.flops import pretraining_flops
from cae_fast.training.distributed import World
from cae_fast.training.inputs import inputs_ahead
from cae_fast.training.setup import choose_device

VARIANTS = ("ours", "compiled", "original", "reference", "ours-compiled", "ours-compiled-graphs")
KEY = ("model", "variant", "batch", "data")


class Model(NamedTuple):
    size: str
    batch: int
    image_size: int = 224
    tokenizer_width: int = 256
    codes: int = 8192


MODELS = {
    "ViT-B": Model("base", batch=256),
    "ViT-L": Model("large", batch=256),
    "ViT-H": Model("huge", batch=128),
    "tiny": Model("tiny", batch=8, image_size=32, tokenizer_width=8, codes=512),
}
LR = 1e-4
PROFILED = 3


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.child:
        print(json.dumps(measure_variant(json.loads(args.child))))
        return 0

    models = ["tiny"] if args.tiny else args.models
    rows, failed = earlier_rows(args.json, KEY), False
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            tokenizer = str(write_tokenizer(Path(folder), model))
            for variant in args.variants:
                batch = args.batch or MODELS[model].batch
                key = model, variant, batch, args.data or "synthetic"
                if settled(rows, key) and not args.again and (not args.largest or "largest_batch" in rows[key]):
                    continue

                asked = {"model": model, "variant": variant, "batch": batch, "tokenizer": tokenizer, "folder": folder}
                asked |= {"data": args.data, "warmup": args.warmup, "steps": args.steps, "largest": args.largest}
                rows[key] = in_own_process(asked, args.limit)
                failed |= "failed" in rows[key]
                print(table_row(rows[key]), flush=True)
                if args.json:
                    save(args.json, record("train_step", rows=list(rows.values())))

    print_ratios(list(rows.values()))
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["ViT-L", "ViT-H", "ViT-B"] if cuda else ["tiny"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=models)
    parser.add_argument("--tiny", action="store_true", help="the same as --models tiny")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, help="default: 256, ViT-H 128, tiny 8")
    parser.add_argument("--data", help="a folder of images, or bundled:NAME; default: synthetic")
    parser.add_argument("--warmup", type=int, default=5 if cuda else 1)
    parser.add_argument("--steps", type=int, default=20 if cuda else 5)
    parser.add_argument("--largest", action="store_true", help="also find the largest micro-batch that fits (a GPU)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a variant")
    parser.add_argument("--json", type=Path, help="write raw samples here, after every variant, beside those there")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.largest and not cuda:
        parser.error("--largest needs a CUDA GPU: a CPU's memory has no hard end")
    return args


def in_own_process(asked: dict[str, Any], limit: float) -> dict[str, Any]:
    """A variant's row; where it fails, "failed" says how."""
    row = {key: asked[key] for key in ("model", "variant", "batch")} | {"data": asked["data"] or "synthetic"}
    kernels = {} if asked["variant"].startswith("ours") else {"CAE_KERNELS": "all=reference"}
    # A folder of its own beside the given one: a cache of other programs holds kernels' plain names.
    cache = {"TRITON_CACHE_DIR": str(Path(os.environ.get("TRITON_CACHE_DIR", asked["folder"])) / "named")}
    command = [sys.executable, "-m", "benchmarks.speed.train_step", "--child", json.dumps(asked)]
    try:
        done = subprocess.run(command, env=os.environ | kernels | cache, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return row | {"failed": f"took longer than {limit:.0f} s"}
    if done.returncode:
        return row | {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


def write_tokenizer(folder: Path, model: str) -> Path:
    """A tokenizer file with random weights."""
    width, codes = MODELS[model].tokenizer_width, MODELS[model].codes
    path = folder / f"tokenizer-{width}-{codes}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        weights = DalleEncoder(width, num_codes=codes).state_dict()
        state = {f"encoder.{name}": tensor for name, tensor in weights.items()}
        write_safetensors(path, state, {"kind": "dalle"})
    return path


def measure_variant(asked: dict[str, Any]) -> dict[str, Any]:
    """Everything about one variant; runs in its own process."""
    job = make_job(asked)
    device = job.run.device
    name_kernels()
    facts = describe(job)
    ceilings = {"copy": copy_bandwidth(device, 0.1), "product": product_rate(device, 0.1)}

    steps_of = make_steps(job, asked["variant"])
    total = asked["warmup"] + asked["steps"] + PROFILED
    batches = micro_batches(job) if asked["data"] else synthetic(job, asked["batch"], total)
    with closing(batches), closing(steps_of(batches)) as steps:
        row = measure(steps, device, asked["warmup"], asked["steps"])

    median = statistics.median(row["step_ms"])
    row["idle_ms"] = max(median - row["profile"]["busy"], 0.0)
    row["images_per_second"] = asked["batch"] / median * 1e3
    peak = facts.pop("peak_flops")
    for name in ("model", "all"):
        used = row["images_per_second"] * facts[f"flops_{name}"]
        row[f"mfu_{name}"] = used / peak if peak else None
    if asked["largest"]:
        row["largest_batch"] = largest_batch(job, steps_of, asked["batch"])
    return row | facts | {"ceilings": ceilings}


def make_job(asked: dict[str, Any]) -> Job:
    """The job of `cae-fast pretrain` for this model."""
    model = MODELS[asked["model"]]
    batch, folder = asked["batch"], Path(asked["folder"])
    config = PretrainConfig()
    config.model.size, config.model.image_size = model.size, model.image_size
    if model.size == "tiny":
        config.model.depth = config.model.regressor_depth = config.model.decoder_depth = 2
    config.target.kind, config.target.tokenizer = "codes", asked["tokenizer"]
    config.target.compile = "compiled" in asked["variant"]

    config.data.path = asked["data"] or str(small_images(folder / f"images-{batch}", batch))
    config.data.backend = "auto" if asked["data"] else "cpu"
    config.optim.epochs, config.optim.warmup_epochs = 1_000_000, 1

    config.train.run_dir = str(folder / f"run-{asked['model']}-{asked['variant']}")
    config.train.resume = "never"
    config.train.global_batch_size = batch
    config.train.precision = "bfloat16" if torch.cuda.is_available() else "float32"
    config.train.max_steps = asked["warmup"] + asked["steps"] + PROFILED
    config.log.tensorboard = False
    return prepare(config, World(), choose_device(config.train))


def small_images(folder: Path, count: int) -> Path:
    """Something to index where the batches are synthetic."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    return folder


def name_kernels() -> None:
    """Have traces show `attention_forward_kernel` instead of `_forward_kernel`, of which there are many."""
    for module in [module for name, module in sys.modules.items() if name.startswith("cae_kernels.")]:
        for value in vars(module).values():
            kernel = getattr(value, "fn", None)
            if hasattr(value, "_repr") and getattr(kernel, "__module__", "") == module.__name__:
                full = f"{module.__name__.rpartition('.')[2]}_{kernel.__name__.strip('_')}"
                value._repr = lambda _, full=full: full


def describe(job: Job) -> dict[str, Any]:
    flops = pretraining_flops(job.model, job.num_masked)
    name = torch.cuda.get_device_name() if job.run.device.type == "cuda" else "cpu"
    tokenizer = job.targets.encode_flops(job.model.encoder.grid, job.num_masked)
    return {"flops_model": flops, "flops_all": flops + tokenizer, "peak_flops": device_peak_flops(name)}


def synthetic(job: Job, batch: int, steps: int) -> Iterator[list[Batch]]:
    """Two random batches in turn, the same for every variant, in pinned memory where there is a GPU."""
    random = torch.Generator().manual_seed(0)
    encoder, pool = job.model.encoder, []
    token_size = job.targets.token_size(encoder.grid)
    for number in range(2):
        positions = torch.arange(batch) + number * batch
        images, token_images = (
            torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, generator=random)
            for side in (job.model.shape.image_size, token_size)
        )
        made = Batch(images, token_images, *job.mask(positions), positions, positions)
        pool.append(made.pin_memory() if job.run.device.type == "cuda" else made)
    turns = cycle(pool)
    for _ in range(steps):
        yield [next(turns)]


StepsOf = Callable[[Iterator[list[Batch]]], Iterator[Any]]


def make_steps(job: Job, variant: str) -> StepsOf:
    """A function that takes a step for each of its batches and yields the metrics."""
    if variant == "original":
        return original_steps(job)
    if not variant.startswith("ours"):
        job.engine.step = TorchAdamW(job.engine)
    graphs = variant == "ours-compiled-graphs"
    if "compiled" in variant:
        job.model.compile(mode="reduce-overhead" if graphs else "default")
    annotate_optimizer(job)

    def steps_of(batches: Iterator[list[Batch]]) -> Iterator[Any]:
        for inputs, _ in inputs_ahead(batches, partial(make_inputs, job), job.run.device):
            if graphs:  # what the graphs of the step before returned may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            yield take_step(job, inputs, 0, LR)

    return steps_of


def annotate_optimizer(job: Job) -> None:
    step = job.engine.step

    @wraps(step)
    def annotated(lr: float) -> Any:
        with torch.profiler.record_function("optimizer"):
            return step(lr)

    job.engine.step = annotated


def original_steps(job: Job) -> StepsOf:
    original = OriginalStep(job.model.cpu(), job.targets.encoder, job.run.config.optim, job.run.device)
    job.engine = None  # its memory is not the original's
    gc.collect()
    torch.cuda.empty_cache()

    def steps_of(batches: Iterator[list[Batch]]) -> Iterator[Any]:
        for (batch,) in batches:
            batch = batch.to(job.run.device)
            masked = boolean_mask(batch.masked_ids, job.model.encoder.grid**2)
            labels = original.labels(batch.token_images, masked)
            yield original(job.normalize(batch.images), masked, labels, LR)

    return steps_of


def measure(steps: Iterator[Any], device: torch.device, warmup: int, count: int) -> dict[str, Any]:
    """Time `count` steps after a warm-up, then profile a few more."""
    cuda = device.type == "cuda"
    for _ in range(warmup):
        next(steps)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    # The device's own clock where there is one: no step waits for the host.
    marks = [mark(cuda)]
    for _ in range(count):
        metrics = next(steps)
        marks.append(mark(cuda))
    if cuda:
        torch.cuda.synchronize()
        times = [first.elapsed_time(last) for first, last in pairwise(marks)]
    else:
        times = [(last - first) * 1e3 for first, last in pairwise(marks)]

    # Steps of their own, after those that are timed: a profiler slows them.
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        peak = torch.cuda.max_memory_allocated() if cuda else None
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(PROFILED):
                next(steps)
            if cuda:
                torch.cuda.synchronize()
        profiler.export_chrome_trace(file.name)
        profile = step_parts(json.loads(Path(file.name).read_text()), PROFILED)
    return {"step_ms": times, "loss": float(metrics["loss"]), "peak_bytes": peak, "profile": profile}


def mark(cuda: bool) -> Any:
    """A point in time: of the device's main stream, or the wall clock in seconds."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def largest_batch(job: Job, steps_of: StepsOf, known: int) -> int:
    """The largest multiple of 16 that two steps fit with, by doubling and bisection."""

    def fits(batch: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            with closing(steps_of(synthetic(job, batch, 2))) as steps:
                for _ in steps:
                    pass
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            for parameter in job.model.parameters():
                parameter.grad = None
            return False
        return True

    low, high = known, 2 * known
    while fits(high):
        low, high = high, 2 * high
    while high - low > 16:
        middle = (low + high) // 32 * 16
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def table_row(row: dict[str, Any]) -> str:
    start = f"{row['model']:6s} B={row['batch']:<4d} {row['variant']:10s}"
    if "failed" in row:
        return f"{start} FAILED: {row['failed']}"

    median, spread = middle(row["step_ms"])
    cells = [f"{median:9.2f} ms +-{spread:3.0%} {row['images_per_second']:7.0f} images/s"]
    if row["mfu_all"] is not None:
        cells.append(f"MFU {row['mfu_model']:.1%} / {row['mfu_all']:.1%}")
    if row["peak_bytes"] is not None:
        cells.append(f"{row['peak_bytes'] / 1e9:.1f} GB")
    if "largest_batch" in row:
        cells.append(f"largest batch {row['largest_batch']}")
    parts = ", ".join(f"{name} {row['profile']['parts'][name]:.1f}" for name in PARTS)
    return f"{start} {'  '.join(cells)}  [{parts}, idle {row['idle_ms']:.1f} ms]"


def print_ratios(rows: list[dict[str, Any]]) -> None:
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model and "failed" not in row]
        done = {row["variant"]: row["images_per_second"] for row in own}
        if "ours" in done:
            others = (f"{done['ours'] / speed:.2f}x {name}" for name, speed in done.items() if name != "ours")
            print(f"{model}: ours is {', '.join(others) or 'alone'}")


if __name__ == "__main__":
    sys.exit(main())
