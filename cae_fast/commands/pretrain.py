"""Pretrain a context autoencoder.

  cae-fast pretrain configs/quickstart.yaml
  cae-fast pretrain configs/pretrain/vit_large_pixels.yaml data.path=/data/imagenet/train optim.lr=1e-3

Run it again with the same arguments to continue an interrupted run: nothing else is needed.
"""

# B batch, Nv visible, Nm masked, S image side, P values of a patch, L residual branches.

import argparse
import json
import logging
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cae_fast import __version__
from cae_fast.config import (
    MaskConfig,
    PretrainConfig,
    ProbeConfig,
    UserError,
)
from cae_fast.data.backend import OpenLoader, choose_backend
from cae_fast.data.index import ImageIndex, index_for
from cae_fast.data.loader import Batch, Mask, pretrain_loader, resolve_num_workers
from cae_fast.data.normalize import Normalize
from cae_fast.data.sampling import SamplingPlan
from cae_fast.models.cae import CaeLosses, ContextAutoencoder, resolve_model
from cae_fast.models.flops import pretraining_flops
from cae_fast.models.tokenizers import Targets, file_sha256, make_targets, prediction_dim
from cae_fast.training.checkpoint import remove_leftovers, save_model, save_state, write_text
from cae_fast.training.engine import PRECISIONS, Engine
from cae_fast.training.inputs import StepInputs, inputs_ahead
from cae_fast.training.inspection import Inspection
from cae_fast.training.interrupt import StopRequest
from cae_fast.training.monitor import Monitor
from cae_fast.training.optim import scheduled_lr
from cae_fast.training.pictures import save_curves
from cae_fast.training.resume import first_backend, load_weights, newest_state, resume
from cae_fast.training.run_setup import (
    MAX_CONSECUTIVE_SKIPS,
    add_settings,
    check_training,
    choose_device,
    describe,
    diverged,
    kernel_backends,
    load_run_config,
    micro_batch_size,
    sampling_plan,
    summary,
)
from cae_kernels import block_mask, drop_path_scales, random_mask

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, PretrainConfig)


def run(args: argparse.Namespace) -> int:
    config = load_run_config(PretrainConfig, args)
    with StopRequest() as stop:
        return train(prepare(config), stop)


def train_step(job: "Job", inputs: list[StepInputs], lr: float) -> dict[str, Tensor | None]:
    """One optimizer step over its micro-batches. Nothing in it waits for the device; metrics stay there."""
    collected: list[CaeLosses] = []
    for micro_batch in inputs:
        losses = job.engine(*micro_batch)
        job.engine.backward(losses.total)
        collected.append(losses._replace(total=losses.total.detach()))
    result = job.engine.step(lr)
    # Pixels have no accuracy.
    means = (None if values[0] is None else torch.stack(values).mean() for values in zip(*collected, strict=True))
    return dict(zip(("loss", "loss_main", "loss_align", "accuracy"), means, strict=True)) | result._asdict()


def make_inputs(job: "Job", batch: Batch) -> StepInputs:
    images = job.normalize(batch.images)  # (B, 3, S, S)
    view = images if batch.token_images is None else batch.token_images
    targets = job.encode(view, batch.masked_ids)  # (B, Nm, P or D), or codes (B, Nm)
    keep = drop_path_scales(job.config.train.seed, batch.positions, job.drop_path_rates)  # (L, B)
    return StepInputs(images.to(job.dtype), batch.visible_ids, batch.masked_ids, targets, keep)


def train(job: "Job", stop: StopRequest) -> int:
    """Every step that is left, checkpoints, and the pictures at the end. Returns the exit status."""
    config, monitor = job.config, make_monitor(job)
    if job.start_step == 0 and config.probe.train:
        write_text(job.run_dir / "probe.json", json.dumps({"random": job.inspection.knn_accuracy()}))
    step = saved = job.start_step
    with monitor, closing(micro_batches(job)) as batches:
        for inputs, waited in inputs_ahead(batches, partial(make_inputs, job), job.device):
            monitor.before_step(step)
            lr = scheduled_lr(step, job.plan.steps_per_epoch, config.optim)
            metrics = train_step(job, inputs, lr)
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
        return diverged(job.run_dir, step)
    if saved != step:
        save(job, step)
    if stop.requested and step < job.last_step:
        log.info("stopped by %s after step %d; run the same command again to continue", stop.requested, step)
        return 0
    return finish(job)


def micro_batches(job: "Job") -> Generator[list[Batch], None, None]:
    """The micro-batches of every step left."""
    loader = job.open_loader(
        start_step=job.start_step,
        stop_step=job.last_step,
        pin_memory=job.device.type == "cuda",
        decoder=job.config.data.backend,
        device=job.device,
    )
    with closing(loader):
        for _ in range(job.start_step, job.last_step):
            yield [next(loader) for _ in range(job.engine.accumulation)]


def save(job: "Job", step: int) -> None:
    keep_every = job.config.checkpoint.keep_every_epochs * job.plan.steps_per_epoch
    keep = set(range(keep_every, step, keep_every)) if keep_every else set()
    facts = {"config": asdict(job.config), "data": job.index.fingerprint, "version": __version__, "step": step}
    facts["tokenizer"] = job.tokenizer_sha256
    save_state(job.run_dir, step, job.engine.state(), facts, keep)
    save_model(job.run_dir, job.engine.model_state(), facts)


def finish(job: "Job") -> int:
    """Pictures, and what the pretraining brought."""
    save_curves(job.run_dir / "metrics.jsonl", job.run_dir / "curves.png")
    shown = job.inspection.save_reconstructions(job.run_dir / "reconstructions.png")
    pictures = "curves.png, reconstructions.png" if shown else "curves.png"
    log.info("%s: %s, model.safetensors, encoder.safetensors (for timm)", job.run_dir, pictures)
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
    open_loader: OpenLoader
    model: ContextAutoencoder
    engine: Engine
    targets: Targets
    encode: Callable[[Tensor, Tensor], Tensor]
    tokenizer_sha256: str | None
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
    check_probe(config.probe)
    device = choose_device(config.train)
    kernels = kernel_backends(device)
    log.info("kernels: %s (why not others: cae-fast doctor)", summary(kernels))
    targets = make_targets(config.target, shape.image_size, shape.patch_size, device)
    tokenizer_sha256 = file_sha256(config.target.tokenizer) if config.target.tokenizer else None
    grid, micro = shape.image_size // shape.patch_size, micro_batch_size(config.train)
    mask, num_masked = make_mask(config.mask, grid, config.train.seed)
    state = newest_state(config)
    run_dir = Path(config.train.run_dir)
    index = index_for(config.data, run_dir)
    log.info("data: %s", index)
    plan = sampling_plan(config, index)
    open_loader = partial(
        pretrain_loader,
        index,
        plan,
        mask,
        image_size=shape.image_size,
        token_size=targets.token_size(grid),
        rank=0,
        world_size=1,
        micro_batch_size=micro,
        num_workers=resolve_num_workers(config.data.num_workers, 1),
    )
    config.data.backend = choose_backend(config.data.backend, first_backend(state), device, open_loader)
    torch.manual_seed(config.train.seed)
    model = ContextAutoencoder(
        config.model,
        prediction_dim(targets),
        predict_codes=config.target.kind == "codes",
        alignment_weight=config.target.alignment_weight,
        cosine_loss=config.target.kind == "features",
    )
    if config.train.init_from and state is None:
        load_weights(model, config.train.init_from)
    engine = Engine(model, config.optim, config.train.precision, device, config.train.global_batch_size // micro)
    start = 0 if state is None else resume(config, engine, state, index.fingerprint, tokenizer_sha256)
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    describe(config, run_dir, device, kernels)
    rates = torch.tensor(model.branch_rates(), device=device)  # (L,)
    normalize = Normalize(config.data.mean, config.data.std, device)
    return Job(
        config,
        run_dir,
        device,
        index,
        plan,
        mask,
        num_masked,
        open_loader,
        model,
        engine,
        targets,
        torch.compile(targets.encode) if config.target.compile else targets.encode,
        tokenizer_sha256,
        normalize,
        rates,
        start,
    )


def check_probe(probe: ProbeConfig) -> None:
    if bool(probe.train) != bool(probe.test):
        raise UserError(f"probe.train is {probe.train}, probe.test {probe.test}: set both or neither")


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
    flops = pretraining_flops(job.model, job.num_masked)
    flops += job.targets.encode_flops(job.model.encoder.grid, job.num_masked)
    return Monitor(
        job.run_dir,
        job.config.log,
        total_steps=job.total_steps,
        start_step=job.start_step,
        steps_per_epoch=job.plan.steps_per_epoch,
        images_per_step=job.config.train.global_batch_size,
        flops_per_image=flops,
        device=job.device,
    )
