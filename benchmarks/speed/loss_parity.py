"""Do the fused kernels train as plain torch does? Loss curves of three paths from the same seeds on bundled images.

    python -m benchmarks.speed.loss_parity --json loss_parity.json --png loss_parity.png

  float32     plain torch in float32, what the others are held against
  plain bf16  plain torch in bfloat16
  fused bf16  as `cae-fast pretrain` runs (on a CPU the fused kernels do not run, so this is the plain path again)

Fashion-MNIST, targets: codes of a tokenizer with random weights. On a GPU ViT-S at 224 px, on a CPU the tiny model.
A path's deviation is the largest distance of its loss from float32's, both as means over 10 steps, and the mean of
that over the seeds. Exits with 1 if the fused path's is over 1.1 times the plain bf16 path's.
"""

import argparse
import logging
import os
import sys
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from benchmarks.record import earlier, record, save
from benchmarks.speed.train_step import write_tokenizer
from cae_fast.commands.pretrain import make_inputs, micro_batches, prepare, take_step
from cae_fast.config import PretrainConfig
from cae_fast.files import replacing
from cae_fast.training.distributed import World
from cae_fast.training.inputs import inputs_ahead
from cae_fast.training.optim import scheduled_lr
from cae_fast.training.setup import choose_device

# precision, CAE_KERNELS
PATHS = {
    "float32": ("float32", "all=reference"),
    "plain bf16": ("bfloat16", "all=reference"),
    "fused bf16": ("bfloat16", None),
}
WINDOW = 10
MOST = 1.1

Curves = dict[str, list[list[float]]]
"""Losses of every step for each path and seed."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logging.disable(logging.INFO)
    found = None if args.again else earlier(args.json, steps=args.steps)
    curves: Curves = found["curves"] if found else {path: [] for path in PATHS}
    for seed in range(args.seeds):
        for path in PATHS:
            if len(curves[path]) > seed:
                print(f"seed {seed}, {path}: {args.json} has it; --again trains it again", flush=True)
                continue
            curves[path].append(train_path(path, seed, args.steps))
            print(f"seed {seed}, {path}: loss {curves[path][-1][0]:.4f} to {curves[path][-1][-1]:.4f}", flush=True)
            if args.json:
                save(args.json, record("loss_parity", steps=args.steps, curves=curves))
    return finish(curves, args)


def finish(curves: Curves, args: argparse.Namespace) -> int:
    """The verdict on all curves; 0 where it is passed."""
    found = deviations(curves)
    status = verdict(found)
    for path, deviation in found.items():
        print(f"{path}: deviates from float32 by {deviation:.5f} at most (means of {WINDOW} steps, {args.seeds} seeds)")
    print("fused bf16 is as near to float32 as plain bf16" if status == 0 else f"fused bf16 deviates over {MOST} times")
    if args.json:
        facts = {"deviations": found, "passed": status == 0, "kernels_ran": torch.cuda.is_available()}
        save(args.json, record("loss_parity", steps=args.steps, curves=curves, **facts))
    if args.png:
        draw(curves, args.png)
    return status


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3 if torch.cuda.is_available() else 1)
    parser.add_argument("--json", type=Path, help="write curves and deviations here, after every curve")
    parser.add_argument("--again", action="store_true", help="train also what the file has")
    parser.add_argument("--png", type=Path, help="draw the curves here")
    args = parser.parse_args(argv)
    if args.steps < WINDOW or args.seeds < 1:
        parser.error(f"--steps must be at least {WINDOW} and --seeds at least 1")
    return args


def train_path(path: str, seed: int, steps: int) -> list[float]:
    """The loss of every step."""
    precision, kernels = PATHS[path]
    before = os.environ.get("CAE_KERNELS")
    if kernels is not None:
        os.environ["CAE_KERNELS"] = kernels

    try:
        with tempfile.TemporaryDirectory() as folder:
            config = settings(Path(folder), precision, seed, steps)
            job = prepare(config, World(), choose_device(config.train))

            losses = []
            with closing(micro_batches(job)) as batches:
                for inputs, _ in inputs_ahead(batches, partial(make_inputs, job), job.run.device):
                    step = len(losses)
                    lr = scheduled_lr(step, job.run.plan.steps_per_epoch, job.run.config.optim)
                    losses.append(take_step(job, inputs, step, lr)["loss"])
            return torch.stack(losses).tolist()
    finally:
        os.environ.pop("CAE_KERNELS", None)
        if before is not None:
            os.environ["CAE_KERNELS"] = before


def settings(folder: Path, precision: str, seed: int, steps: int) -> PretrainConfig:
    config, cuda = PretrainConfig(), torch.cuda.is_available()
    config.model.size, config.model.image_size = ("small", 224) if cuda else ("tiny", 28)
    config.mask.min_block = 16 if cuda else 4
    config.target.kind, config.target.tokenizer = "codes", str(write_tokenizer(folder, "tiny"))
    config.data.path, config.data.backend = "bundled:fashion-mnist/train", "cpu"
    config.optim.epochs, config.optim.warmup_epochs, config.optim.lr = 4, 1, 1e-3
    config.train.run_dir, config.train.seed = str(folder / "run"), seed
    config.train.precision, config.train.max_steps = precision, steps
    config.train.global_batch_size = 64 if cuda else 16
    return config


def deviations(curves: Curves) -> dict[str, float]:
    """Of each bf16 path: the largest distance from float32 of means over WINDOW steps; the mean over the seeds."""
    means = {path: torch.tensor(rows).unfold(1, WINDOW, 1).mean(-1) for path, rows in curves.items()}  # (seeds, steps)
    truth = means.pop("float32")
    return {path: (mean - truth).abs().amax(1).mean().item() for path, mean in means.items()}


def verdict(found: dict[str, float]) -> int:
    """0 where the fused path is as near to float32 as the plain one, else 1; a NaN is not near."""
    return 0 if found["fused bf16"] <= MOST * found["plain bf16"] else 1


def draw(curves: Curves, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, distance = figure.subplots(2, 1, sharex=True)
    truth = torch.tensor(curves["float32"])
    for (name, rows), color in zip(curves.items(), ("#22223b", "#e07a1f", "#1f77b4"), strict=True):
        values = torch.tensor(rows)
        losses.plot(values.mean(0), color=color, label=name, linewidth=1.2)
        if name != "float32":
            distance.plot((values - truth).abs().mean(0), color=color, label=name, linewidth=1)
    losses.set(ylabel="loss", title=f"mean of {len(truth)} seeds")
    distance.set(ylabel="distance from float32", xlabel="step", yscale="log")
    losses.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
