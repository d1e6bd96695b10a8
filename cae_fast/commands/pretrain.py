"""Pretrain a context autoencoder.

  cae-fast pretrain configs/quickstart.yaml
  cae-fast pretrain configs/pretrain/vit_large_pixels.yaml data.path=/data/imagenet/train optim.lr=1e-3

  torchrun --nproc-per-node 8 -m cae_fast pretrain configs/pretrain/vit_large_pixels.yaml data.path=/data/imagenet/train

Run it again with the same arguments to continue an interrupted run: nothing else is needed, also not the same number
of processes.
"""

# B batch, Nv visible, Nm masked, S image side, P values of a patch, L residual branches.

import argparse
import json
import logging
from collections.abc import Generator
from contextlib import closing, nullcontext
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
from cae_fast.models.tokenizers import Encode, Targets, file_sha256, make_encode, make_targets, prediction_dim
from cae_fast.training.checkpoint import consolidated, remove_leftovers, save_model, save_state, write_text
from cae_fast.training.distributed import World, joined, read_world
from cae_fast.training.engine import PRECISIONS
from cae_fast.training.inputs import StepInputs, inputs_ahead
from cae_fast.training.inspection import Inspection
from cae_fast.training.interrupt import GO_ON, STOP, STOP_DIVERGED, StopRequest, own_verdict
from cae_fast.training.monitor import Monitor
from cae_fast.training.optim import scheduled_lr
from cae_fast.training.pictures import save_curves
from cae_fast.training.resume import first_backend, load_weights, newest_state, resume
from cae_fast.training.run_setup import (
    STOPPED,
    add_settings,
    check_training,
    choose_device,
    describe,
    diverged,
    kernel_backends,
    load_run_config,
    micro_batch_size,
    sampling_plan,
    stopped,
    summary,
)
from cae_fast.training.saving import Saver
from cae_fast.training.zero_engine import AnyEngine, make_engine, zero_stage
from cae_kernels import block_mask, drop_path_scales, random_mask

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, PretrainConfig)


def run(args: argparse.Namespace) -> int:
    config = load_run_config(PretrainConfig, args)
    check_training(config)
    check_probe(config.probe)
    world = read_world()
    device = choose_device(config.train, world.local_rank)
    alone = zero_stage(config.train, world) == 0
    if not world.main:
        logging.getLogger("cae_fast").setLevel(logging.WARNING)
    with StopRequest() as stop, joined(world, device, config.train.timeout_seconds, alone):
        return train(prepare(config, world, device), stop)


def train_step(job: "Job", inputs: list[StepInputs], lr: float) -> dict[str, Tensor]:
    """One optimizer step over its micro-batches. Nothing in it waits for the device; metrics stay there."""
    collected: list[CaeLosses] = []
    for micro_batch in inputs:
        losses = job.engine(*micro_batch)
        job.engine.backward(losses.total)
        collected.append(losses._replace(total=losses.total.detach()))
    result = job.engine.step(lr)
    # Pixels have no accuracy.
    rows = [torch.stack(values).mean() for values in zip(*collected, strict=True) if values[0] is not None]
    means = job.world.mean(torch.stack([row.float() for row in rows])).unbind()
    return dict(zip(("loss", "loss_main", "loss_align", "accuracy"), means, strict=False)) | result._asdict()


def make_inputs(job: "Job", batch: Batch) -> StepInputs:
    images = job.normalize(batch.images)  # (B, 3, S, S)
    view = images if batch.token_images is None else batch.token_images
    targets = job.encode(view, batch.masked_ids)  # (B, Nm, P or D), or codes (B, Nm)
    keep = drop_path_scales(job.config.train.seed, batch.positions, job.drop_path_rates)  # (L, B)
    return StepInputs(images.to(job.dtype), batch.visible_ids, batch.masked_ids, targets, keep)


def train(job: "Job", stop: StopRequest) -> int:
    """Every step that is left, checkpoints, and the pictures at the end. Returns the exit status."""
    config, world = job.config, job.world
    if job.start_step == 0 and config.probe.train:
        inspection = job.inspection()
        world.on_main(lambda: write_text(job.probe_file, json.dumps({"random": inspection.knn_accuracy()})))
    step, saved, verdict = job.start_step, job.start_step, GO_ON
    monitoring = make_monitor(job) if world.main else nullcontext()
    with job.saver, monitoring as monitor, closing(micro_batches(job)) as batches:
        for inputs, waited in inputs_ahead(batches, partial(make_inputs, job), job.device):
            world.beat()
            lr = scheduled_lr(step, job.plan.steps_per_epoch, config.optim)
            if monitor is not None:
                monitor.before_step(step)
            metrics = train_step(job, inputs, lr)
            if monitor is not None:
                first = step * config.train.global_batch_size
                positions = range(first, first + config.train.global_batch_size)
                monitor.record(step, metrics, lr=lr, data_wait=waited, sample_ids=positions)
            step += 1
            verdict = world.agreed(own_verdict(monitor, stop))
            if verdict == STOP_DIVERGED:
                break
            if step % (config.checkpoint.every_epochs * job.plan.steps_per_epoch) == 0:
                save(job, saved := step, monitor)
            if verdict == STOP:
                break
        if verdict != STOP_DIVERGED and saved != step:
            save(job, step, monitor)
        world.on_main(job.saver.wait)
    if verdict == STOP_DIVERGED:
        return world.on_main(lambda: diverged(job.run_dir, step))
    if world.on_main(lambda: job.saver.failed):
        log.error(
            "stopped after step %d, which is not saved; the same command continues from the last checkpoint", step
        )
        return 1
    if verdict == STOP and step < job.last_step:
        return world.on_main(lambda: stopped(job.run_dir, step, stop.requested or "a signal to another process"))
    inspection = job.inspection()
    return world.on_main(lambda: finish(job, inspection))


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


def save(job: "Job", step: int, monitor: Monitor | None) -> None:
    """Start writing a checkpoint: all processes gather it, process 0 writes."""
    if monitor is not None:
        monitor.flush()
    job.world.on_main(job.saver.wait)
    state = job.saver.snapshot(job.engine.state_items(), keep=job.world.main)
    if not job.world.main:
        return
    keep_every = job.config.checkpoint.keep_every_epochs * job.plan.steps_per_epoch
    keep = set(range(keep_every, step, keep_every)) if keep_every else set()
    facts = {"config": asdict(job.config), "data": job.index.fingerprint, "version": __version__, "step": step}
    facts["tokenizer"] = job.tokenizer_sha256
    model = consolidated(job.model, state)

    def write() -> None:
        if not job.run_dir.is_dir():
            log.error("%s is gone: the checkpoint of step %d makes it anew; what it held is lost", job.run_dir, step)
        save_state(job.run_dir, step, state, facts, keep)
        save_model(job.run_dir, model, facts)

    job.saver.start(write, step)


def finish(job: "Job", inspection: Inspection) -> int:
    """Pictures, and what the pretraining brought."""
    made = ["model.safetensors", "encoder.safetensors (for timm)"]
    if (job.run_dir / "metrics.jsonl").exists():
        save_curves(job.run_dir / "metrics.jsonl", job.run_dir / "curves.png")
        made.append("curves.png")
    if inspection.save_reconstructions(job.run_dir / "reconstructions.png"):
        made.append("reconstructions.png")
    log.info("%s: %s", job.run_dir, ", ".join(made))
    if job.config.probe.train and job.probe_file.exists():
        probe = json.loads(job.probe_file.read_text()) | {"pretrained": inspection.knn_accuracy()}
        write_text(job.probe_file, json.dumps(probe))
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
    world: World
    device: torch.device
    index: ImageIndex
    plan: SamplingPlan
    mask: Mask
    num_masked: int
    open_loader: OpenLoader
    model: ContextAutoencoder
    engine: AnyEngine
    targets: Targets
    encode: Encode
    tokenizer_sha256: str | None
    normalize: Normalize
    drop_path_rates: Tensor
    start_step: int
    saver: Saver

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
    def probe_file(self) -> Path:
        return self.run_dir / "probe.json"

    def inspection(self) -> Inspection:
        """A look at the model for process 0; all processes call it, for at ZeRO stage 3 none has the whole model."""
        model = self.model
        if zero_stage(self.config.train, self.world) == 3:
            model = make_model(self.config, self.targets)
            model.load_state_dict(self.engine.model_state())
            model.to(self.device, self.dtype)
        return Inspection(self.config, model, self.targets, self.normalize, self.mask, self.dtype, self.device)


def make_model(config: PretrainConfig, targets: Targets) -> ContextAutoencoder:
    return ContextAutoencoder(
        config.model,
        prediction_dim(targets),
        predict_codes=config.target.kind == "codes",
        alignment_weight=config.target.alignment_weight,
        cosine_loss=config.target.kind == "features",
    )


def prepare(config: PretrainConfig, world: World, device: torch.device) -> Job:
    """Open the data, build the model and load what the run folder holds; UserError for settings that do not fit."""
    shape = resolve_model(config.model)
    config.model = replace(config.model, **asdict(shape))
    kernels = kernel_backends(device)
    log.info("kernels: %s (why not others: cae-fast doctor)", summary(kernels))
    targets = make_targets(config.target, shape.image_size, shape.patch_size, device)
    tokenizer_sha256 = file_sha256(config.target.tokenizer) if config.target.tokenizer else None
    grid, micro = shape.image_size // shape.patch_size, micro_batch_size(config.train, world.size)
    mask, num_masked = make_mask(config.mask, grid, config.train.seed)
    state = world.on_main(lambda: newest_state(config))
    run_dir = Path(config.train.run_dir)
    index = world.main_first(lambda: index_for(config.data, run_dir))
    log.info("data: %s", index)
    plan = sampling_plan(config, index)
    open_loader = partial(
        pretrain_loader,
        index,
        plan,
        mask,
        image_size=shape.image_size,
        token_size=targets.token_size(grid),
        rank=world.rank,
        world_size=world.size,
        micro_batch_size=micro,
        num_workers=resolve_num_workers(config.data.num_workers, world.core_share),
    )
    config.data.backend = world.on_main(
        lambda: choose_backend(config.data.backend, first_backend(state), device, open_loader)
    )
    torch.manual_seed(config.train.seed)
    model = make_model(config, targets)
    model.checkpoint_blocks(config.train.activation_checkpointing)
    if config.train.init_from and state is None:
        load_weights(model, config.train.init_from)
    engine = make_engine(model, config, device, config.train.global_batch_size // (world.size * micro), world)
    start = 0 if state is None else resume(config, engine, state, index.fingerprint, {"tokenizer": tokenizer_sha256})
    if world.main:
        begin(config, run_dir, device, kernels, world.size)
    return Job(
        config,
        run_dir,
        world,
        device,
        index,
        plan,
        mask,
        num_masked,
        open_loader,
        model,
        engine,
        targets,
        make_encode(targets, config.target.compile),
        tokenizer_sha256,
        Normalize(config.data.mean, config.data.std, device),
        torch.tensor(model.branch_rates(), device=device),  # (L,)
        start,
        Saver(run_dir),
    )


def begin(config: PretrainConfig, run_dir: Path, device: torch.device, kernels: dict[str, str], processes: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    (run_dir / STOPPED).unlink(missing_ok=True)
    describe(config, run_dir, device, kernels, processes)


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
