"""Pretrain a context autoencoder.

  cae-fast pretrain configs/quickstart.yaml
  cae-fast pretrain configs/pretrain/vit_large_pixels.yaml data.path=/data/imagenet/train optim.lr=1e-3

Run it again with the same arguments to continue an interrupted run: nothing else is needed.
"""

# B batch, Nv visible, Nm masked, S image side, P values of a patch, L residual branches.

import argparse
import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from cae_kernels import block_mask, drop_path_scales, random_mask
from cae_kernels.dispatch import BACKENDS, backend
from omegaconf import OmegaConf
from torch import Tensor

from cae_fast import __version__
from cae_fast.config import MaskConfig, PretrainConfig, TargetConfig, TrainConfig, UserError, field_docs, load_config
from cae_fast.data.index import ImageIndex, index_for
from cae_fast.data.loader import Batch, Mask, pretrain_loader, resolve_num_workers
from cae_fast.data.normalize import Normalize
from cae_fast.data.sampling import SamplingPlan
from cae_fast.models.cae import ContextAutoencoder, resolve_model
from cae_fast.models.flops import pretraining_flops
from cae_fast.models.tokenizers import PixelTargets
from cae_fast.training.checkpoint import remove_leftovers, save_model, save_state, state_files, write_text
from cae_fast.training.engine import PRECISIONS, Engine
from cae_fast.training.inspection import Inspection
from cae_fast.training.interrupt import StopRequest
from cae_fast.training.monitor import Monitor
from cae_fast.training.optim import check_optim, scheduled_lr
from cae_fast.training.pictures import save_curves
from cae_fast.training.resume import load_weights, newest_state, resume

log = logging.getLogger(__name__)
MAX_CONSECUTIVE_SKIPS = 10
DIVERGED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings changed for this run")
    settings = field_docs(PretrainConfig).items()
    rows = [f"  {name} = {value!r}\n      {text}".rstrip() for name, (value, text) in settings]
    parser.epilog = "settings and their defaults:\n" + "\n".join(rows).replace("%", "%%")


def run(args: argparse.Namespace) -> int:
    config = load_config(PretrainConfig, args.config, args.overrides)
    if not config.train.run_dir:
        config.train.run_dir = f"runs/{Path(args.config).stem}"
    with StopRequest() as stop:
        return train(prepare(config), stop)


def train_step(job: "Job", batches: list[Batch], lr: float) -> dict[str, Tensor]:
    """One optimizer step over its micro-batches. Nothing in it waits for the device; metrics stay there."""
    totals, mains, alignments = [], [], []
    for batch in batches:
        images = job.normalize(batch.images)  # (B, 3, S, S)
        with torch.no_grad():
            targets = job.targets.encode(images, batch.masked_ids)  # (B, Nm, P)
        keep = drop_path_scales(job.config.train.seed, batch.positions, job.drop_path_rates)  # (L, B)
        losses = job.engine(images.to(job.dtype), batch.visible_ids, batch.masked_ids, targets, keep)
        job.engine.backward(losses.total)
        totals.append(losses.total.detach())
        mains.append(losses.main)
        alignments.append(losses.alignment)
    result = job.engine.step(lr)
    means = (torch.stack(values).mean() for values in (totals, mains, alignments))
    return dict(zip(("loss", "loss_main", "loss_align"), means, strict=True)) | result._asdict()


def train(job: "Job", stop: StopRequest) -> int:
    """Every step that is left, checkpoints, and the pictures at the end. Returns the exit status."""
    config, monitor = job.config, make_monitor(job)
    if job.start_step == 0 and config.probe.train:
        write_text(job.run_dir / "probe.json", json.dumps({"random": job.inspection.knn_accuracy()}))
    step = saved = job.start_step
    with monitor, closing(micro_batches(job)) as steps:
        for batches, waited in steps:
            monitor.before_step(step)
            lr = scheduled_lr(step, job.plan.steps_per_epoch, config.optim)
            metrics = train_step(job, batches, lr)
            first = step * config.train.global_batch_size
            positions = range(first, first + config.train.global_batch_size)
            monitor.record(step, metrics, lr=lr, data_wait=waited, sample_ids=positions)
            step += 1
            if monitor.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
                break
            if step % (config.checkpoint.every_epochs * job.plan.steps_per_epoch) == 0:
                monitor.flush()
                save(job, saved := step)
            if stop.requested:
                break
    if monitor.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
        return diverged(job, step)
    if saved != step:
        save(job, step)
    if stop.requested and step < job.last_step:
        log.info("stopped by %s after step %d; run the same command again to continue", stop.requested, step)
        return 0
    return finish(job)


def micro_batches(job: "Job") -> Generator[tuple[list[Batch], float], None, None]:
    """For every step left: its micro-batches on the device, and the seconds spent waiting for them."""
    loader = pretrain_loader(
        job.index,
        job.plan,
        job.mask,
        image_size=job.model.shape.image_size,
        token_size=job.targets.token_size,
        start_step=job.start_step,
        stop_step=job.last_step,
        rank=0,
        world_size=1,
        micro_batch_size=job.config.train.global_batch_size // job.engine.accumulation,
        num_workers=resolve_num_workers(job.config.data.num_workers, 1),
        pin_memory=job.device.type == "cuda",
    )
    with closing(loader):
        for _ in range(job.start_step, job.last_step):
            began = time.perf_counter()
            batches = [next(loader) for _ in range(job.engine.accumulation)]
            waited = time.perf_counter() - began
            yield [batch.to(job.device) for batch in batches], waited


def save(job: "Job", step: int) -> None:
    keep_every = job.config.checkpoint.keep_every_epochs * job.plan.steps_per_epoch
    keep = set(range(keep_every, step, keep_every)) if keep_every else set()
    facts = {"config": asdict(job.config), "data": job.index.fingerprint, "version": __version__, "step": step}
    save_state(job.run_dir, step, job.engine.state(), facts, keep)
    save_model(job.run_dir, job.engine.model_state(), facts)


def diverged(job: "Job", step: int) -> int:
    newest = state_files(job.run_dir)
    where = f"the last checkpoint is that of step {newest[-1][0]}" if newest else "there is no checkpoint yet"
    log.error(
        "%d steps in a row had a non-finite loss or gradient; stopped after step %d, %s. They did not touch the "
        "weights. Lower optim.lr, lengthen optim.warmup_epochs or try train.precision=float32, and continue with "
        "train.resume=force; the samples of those steps are in %s",
        MAX_CONSECUTIVE_SKIPS,
        step,
        where,
        job.run_dir / "metrics.jsonl",
    )
    return DIVERGED


def finish(job: "Job") -> int:
    """Pictures, and what the pretraining brought."""
    save_curves(job.run_dir / "metrics.jsonl", job.run_dir / "curves.png")
    job.inspection.save_reconstructions(job.run_dir / "reconstructions.png")
    log.info("%s: curves.png, reconstructions.png, model.safetensors, encoder.safetensors (for timm)", job.run_dir)
    probe_file = job.run_dir / "probe.json"
    if job.config.probe.train and probe_file.exists():
        probe = json.loads(probe_file.read_text()) | {"pretrained": job.inspection.knn_accuracy()}
        write_text(probe_file, json.dumps(probe))
        print(
            f"k-NN probe of the frozen encoder (k = {job.config.probe.k}, top-1): "
            f"{probe['random']:.2%} before pretraining, {probe['pretrained']:.2%} after",
            flush=True,
        )
    return 0


@dataclass
class Job:
    """All that a run is made of."""

    config: PretrainConfig
    run_dir: Path
    device: torch.device
    index: ImageIndex
    plan: SamplingPlan
    mask: Mask
    num_masked: int
    model: ContextAutoencoder
    engine: Engine
    targets: PixelTargets
    normalize: Normalize
    drop_path_rates: Tensor
    start_step: int

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.config.train.precision]

    @property
    def total_steps(self) -> int:
        return self.config.optim.epochs * self.plan.steps_per_epoch

    @property
    def last_step(self) -> int:
        limit = self.config.train.max_steps
        return self.total_steps if limit is None else min(limit, self.total_steps)

    @property
    def inspection(self) -> Inspection:
        return Inspection(self.config, self.model, self.targets, self.normalize, self.mask, self.dtype, self.device)


def prepare(config: PretrainConfig) -> Job:
    """Check every setting, open the data, build the model and load what the run folder holds."""
    shape = resolve_model(config.model)
    config.model = replace(config.model, **asdict(shape))
    check_training(config)
    device = choose_device(config.train)
    kernels = kernel_backends(device)
    log.info("kernels: %s (why not others: cae-fast doctor)", summary(kernels))
    targets = make_targets(config.target, shape.patch_size)
    mask, num_masked = make_mask(config.mask, shape.image_size // shape.patch_size, config.train.seed)
    state = newest_state(config)
    run_dir = Path(config.train.run_dir)
    index = index_for(config.data, run_dir)
    log.info("data: %s", index)
    plan = SamplingPlan(
        len(index),
        index.heights,
        index.widths,
        config.train.global_batch_size,
        config.train.seed,
        config.data.crop_scale,
        config.data.crop_ratio,
        config.data.horizontal_flip,
    )
    torch.manual_seed(config.train.seed)
    model = ContextAutoencoder(config.model, 3 * shape.patch_size**2, False, config.target.alignment_weight)
    if config.train.init_from and state is None:
        load_weights(model, config.train.init_from)
    accumulation = config.train.global_batch_size // micro_batch_size(config.train)
    engine = Engine(model, config.optim, config.train.precision, device, accumulation)
    start = 0 if state is None else resume(config, engine, state, index.fingerprint)
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    describe(config, run_dir, device, kernels)
    rates = torch.tensor(model.branch_rates(), device=device)  # (L,)
    normalize = Normalize(config.data.mean, config.data.std, device)
    return Job(config, run_dir, device, index, plan, mask, num_masked, model, engine, targets, normalize, rates, start)


def check_training(config: PretrainConfig) -> None:
    check_optim(config.optim)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UserError(f"WORLD_SIZE is {world}: this version trains in one process; start it without a launcher")
    if config.train.precision not in PRECISIONS:
        raise UserError(f"train.precision is {config.train.precision!r}: set one of {', '.join(PRECISIONS)}")
    if config.train.seed < 0:
        raise UserError(f"train.seed is {config.train.seed}: it must be at least 0")
    if config.train.max_steps is not None and config.train.max_steps < 1:
        raise UserError(f"train.max_steps is {config.train.max_steps}: it must be at least 1")
    if bool(config.probe.train) != bool(config.probe.test):
        raise UserError(f"probe.train is {config.probe.train}, probe.test {config.probe.test}: set both or neither")
    if config.data.path and config.data.index:
        raise UserError(f"data.path is {config.data.path} and data.index {config.data.index}: set one of them")
    if config.checkpoint.every_epochs < 1 or config.checkpoint.keep_every_epochs < 0:
        raise UserError(
            f"checkpoint.every_epochs is {config.checkpoint.every_epochs}, checkpoint.keep_every_epochs "
            f"{config.checkpoint.keep_every_epochs}: the first must be at least 1, the second at least 0"
        )


def choose_device(train: TrainConfig) -> torch.device:
    if train.device not in ("auto", "cuda", "cpu"):
        raise UserError(f"train.device is {train.device!r}: set auto, cuda or cpu")
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch finds no CUDA device: set train.device=cpu or auto")
    return torch.device("cuda" if train.device != "cpu" and torch.cuda.is_available() else "cpu")


def micro_batch_size(train: TrainConfig) -> int:
    total, micro = train.global_batch_size, train.micro_batch_size
    micro = total if micro is None else micro
    if total < 1 or micro < 1 or total % micro:
        raise UserError(
            f"train.global_batch_size is {total} and train.micro_batch_size {micro}: "
            "the first must be a multiple of the second, both at least 1"
        )
    return micro


def make_targets(target: TargetConfig, patch_size: int) -> PixelTargets:
    kinds = ("pixels", "normalized_pixels")
    if target.kind not in kinds:
        raise UserError(f"target.kind is {target.kind!r}: set one of {', '.join(kinds)}")
    if not 0 <= target.alignment_weight < math.inf:
        raise UserError(f"target.alignment_weight is {target.alignment_weight}: it must be finite and at least 0")
    return PixelTargets(patch_size, target.kind == "normalized_pixels")


def make_mask(mask: MaskConfig, grid: int, seed: int) -> tuple[Mask, int]:
    """The mask as a function of global sample positions (B,): visible_ids (B, Nv) and masked_ids (B, Nm); and Nm."""
    num_masked = int(mask.ratio * grid**2)
    if not 0 < num_masked < grid**2:
        raise UserError(
            f"mask.ratio is {mask.ratio}: it masks {num_masked} of {grid**2} patches, but at least one must be masked "
            "and one visible"
        )
    draw: Mask = partial(random_mask, seed=seed, height=grid, width=grid, num_masked=num_masked)
    if mask.kind not in ("block", "random"):
        raise UserError(f"mask.kind is {mask.kind!r}: set block or random")
    if mask.kind == "block":
        if mask.min_block > num_masked:
            raise UserError(f"mask.min_block is {mask.min_block}: more than the {num_masked} patches that are masked")
        draw = partial(
            block_mask,
            seed=seed,
            height=grid,
            width=grid,
            num_masked=num_masked,
            min_block=mask.min_block,
            max_block=mask.max_block,
            min_aspect=mask.min_aspect,
        )
    try:
        draw(torch.zeros(1, dtype=torch.int64))
    except ValueError as error:
        raise UserError(f"mask: {error}") from error
    return draw, num_masked


def make_monitor(job: Job) -> Monitor:
    return Monitor(
        job.run_dir,
        job.config.log,
        total_steps=job.total_steps,
        start_step=job.start_step,
        steps_per_epoch=job.plan.steps_per_epoch,
        images_per_step=job.config.train.global_batch_size,
        flops_per_image=pretraining_flops(job.model, job.num_masked),
        device=job.device,
    )


def summary(kernels: dict[str, str]) -> str:
    """Backends with their ops: `triton: attention, ...; reference: ...`; the ops are left out where all share one."""
    by_backend = {name: [op for op in kernels if kernels[op] == name] for name in dict.fromkeys(kernels.values())}
    if len(by_backend) == 1:
        return f"all {next(iter(by_backend))}"
    return "; ".join(f"{name}: {', '.join(ops)}" for name, ops in by_backend.items())


def kernel_backends(device: torch.device) -> dict[str, str]:
    """The backend of every op on this device; UserError where CAE_KERNELS asks for one that cannot run."""
    try:
        return {op: backend(op, torch.empty(0, device=device)) for op in BACKENDS}
    except ValueError as error:
        raise UserError(str(error)) from error


def describe(config: PretrainConfig, run_dir: Path, device: torch.device, kernels: dict[str, str]) -> None:
    """Keep the resolved settings and what they ran on beside the results."""
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    facts = {
        "command": shlex.join(["cae-fast", *sys.argv[1:]]),
        "revision": revision or None,
        "cae_fast": __version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "kernels": kernels,
    }
    write_text(run_dir / "environment.json", json.dumps(facts, indent=1))
