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
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae_fast.config import PretrainConfig, ProbeConfig, UserError
from cae_fast.data.backend import OpenLoader, choose_backend
from cae_fast.data.index import ImageIndex
from cae_fast.data.loader import Batch, Mask, pretrain_loader, resolve_num_workers
from cae_fast.data.masking import make_mask
from cae_fast.data.normalize import Normalize
from cae_fast.data.sampling import sampling_plan
from cae_fast.evaluation.inspection import Inspection
from cae_fast.files import file_sha256, survive_disk, write_text
from cae_fast.models.cae import CaeLosses, ContextAutoencoder, resolve_model
from cae_fast.models.flops import pretraining_flops
from cae_fast.models.targets import Encode, Targets, make_encode, make_model, make_targets
from cae_fast.output import say
from cae_fast.settings import add_settings, load_run_config
from cae_fast.training.checkpoint import consolidated, save_model
from cae_fast.training.distributed import World, joined, read_world
from cae_fast.training.engine import PRECISIONS
from cae_fast.training.inputs import StepInputs, grouped, inputs_ahead
from cae_fast.training.lock import locked
from cae_fast.training.loop import Run, run_steps
from cae_fast.training.pictures import save_curves
from cae_fast.training.resume import first_backend, load_weights, newest_state, resume
from cae_fast.training.setup import (
    begin,
    check_training,
    choose_device,
    kernel_backends,
    micro_batch_size,
    open_index,
    set_normalization,
    summary,
)
from cae_fast.training.zero_engine import AnyEngine, make_engine, zero_stage
from cae_kernels import drop_path_scales

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
    with joined(world, device, config.train.timeout_seconds, alone), locked(Path(config.train.run_dir), world.main):
        return train(prepare(config, world, device))


def train(job: "Job") -> int:
    """Every step that is left, then pictures. Returns the exit status."""
    run = job.run
    if run.start_step == 0 and run.config.probe.train:
        inspection = job.inspection()
        run.world.on_main(lambda: write_text(job.probe_file, json.dumps({"random": inspection.knn_accuracy()})))

    inputs = inputs_ahead(micro_batches(job), partial(make_inputs, job), run.device)
    ending = run_steps(run, inputs, partial(take_step, job), partial(model_files, job.model))
    if ending is not None:
        return ending

    inspection = job.inspection()
    return run.world.on_main(lambda: finish(job, inspection))


def micro_batches(job: "Job") -> Generator[list[Batch], None, None]:
    """The micro-batches of every step left."""
    run = job.run
    loader = job.open_loader(
        start_step=run.start_step,
        stop_step=run.last_step,
        pin_memory=run.device.type == "cuda",
        decoder=run.config.data.backend,
        device=run.device,
    )
    return grouped(loader, job.engine.accumulation)


def make_inputs(job: "Job", batch: Batch) -> StepInputs:
    """Normalize a micro-batch, and make its targets and what drop path keeps of it; without gradient."""
    batch = batch.to(job.run.device)
    images = job.normalize(batch.images)  # (B, 3, S, S)
    view = images if batch.token_images is None else batch.token_images
    targets = job.encode(view, batch.masked_ids)  # (B, Nm, P or D), or codes (B, Nm)
    keep = drop_path_scales(job.run.config.train.seed, batch.positions, job.drop_path_rates)  # (L, B)
    return StepInputs(
        images=images.to(job.dtype),
        visible_ids=batch.visible_ids,
        masked_ids=batch.masked_ids,
        targets=targets,
        keep=keep,
    )


def take_step(job: "Job", inputs: list[StepInputs], step: int, lr: float) -> dict[str, Tensor]:
    """One optimizer step over its micro-batches. Nothing in it waits for the device; metrics stay there."""
    collected: list[CaeLosses] = []
    for micro_batch in inputs:
        losses = job.engine(*micro_batch)
        job.engine.backward(losses.total)
        collected.append(losses._replace(total=losses.total.detach()))
    result = job.engine.step(lr)

    # Pixels have no accuracy.
    names = {"total": "loss", "main": "loss_main", "alignment": "loss_align", "accuracy": "accuracy"}
    rows = {names[name]: [getattr(losses, name) for losses in collected] for name in CaeLosses._fields}
    rows = {name: values for name, values in rows.items() if values[0] is not None}
    means = job.run.world.mean(torch.stack([torch.stack(values).mean().float() for values in rows.values()]))
    return dict(zip(rows, means.unbind(), strict=True)) | result._asdict()


def model_files(model: ContextAutoencoder, state: dict[str, Tensor], facts: dict[str, Any]) -> Callable[[], object]:
    """What writes model.safetensors and encoder.safetensors of a training state."""
    whole = consolidated(model, state)
    return lambda: save_model(Path(facts["config"]["train"]["run_dir"]), whole, facts)


def finish(job: "Job", inspection: Inspection) -> int:
    """Pictures, and what the pretraining brought. The run is done, even where images or disk refuse them."""
    run_dir, made = job.run.run_dir, ["model.safetensors", "encoder.safetensors (for timm)"]
    draw: dict[str, Callable[[Path], object]] = {
        "curves.png": partial(save_curves, run_dir / "metrics.jsonl"),
        "reconstructions.png": inspection.save_reconstructions,
    }
    for name, save in draw.items():
        try:
            if save(run_dir / name) is not False:
                made.append(name)
        except (UserError, OSError) as error:
            log.warning("no %s: %s", name, error)
    log.info("%s: %s", run_dir, ", ".join(made))

    if job.run.config.probe.train and job.probe_file.exists():
        try:
            probe = json.loads(job.probe_file.read_text()) | {"pretrained": inspection.knn_accuracy()}
        except UserError as error:
            log.warning("no probe after pretraining: %s", error)
            return 0
        survive_disk("probe.json", write_text, job.probe_file, json.dumps(probe))
        say(
            f"k-NN probe of the frozen encoder (k = {job.run.config.probe.k}, top-1): "
            f"{probe['random']:.2%} before pretraining, {probe['pretrained']:.2%} after"
        )
    return 0


@dataclass
class Job:
    """All that a pretraining run is made of."""

    run: Run[PretrainConfig]
    index: ImageIndex
    model: ContextAutoencoder
    engine: AnyEngine
    open_loader: OpenLoader
    mask: Mask
    num_masked: int
    normalize: Normalize
    targets: Targets
    encode: Encode
    drop_path_rates: Tensor
    """Of every residual branch (L,)."""

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.run.config.train.precision]

    @property
    def probe_file(self) -> Path:
        return self.run.run_dir / "probe.json"

    def inspection(self) -> Inspection:
        """A look at the model for process 0; all processes call it, for at ZeRO stage 3 none has the whole model."""
        run, model = self.run, self.model
        if zero_stage(run.config.train, run.world) == 3:
            model = make_model(run.config, self.targets)
            model.load_state_dict(self.engine.model_state())
            model.to(run.device, self.dtype)
        return Inspection(
            config=run.config,
            index=self.index,
            model=model,
            targets=self.targets,
            normalize=self.normalize,
            mask=self.mask,
            dtype=self.dtype,
            device=run.device,
        )


def prepare(config: PretrainConfig, world: World, device: torch.device) -> Job:
    """Open the data, build the model and load what the run folder holds; UserError for settings that do not fit."""
    shape = resolve_model(config.model)
    config.model = replace(config.model, **asdict(shape))
    kernels = kernel_backends(device)
    log.info("kernels: %s (why not others: cae-fast doctor)", summary(kernels))

    # What a step reads: targets, masks, images in the order of the plan.
    targets = make_targets(config.target, shape.image_size, shape.patch_size, device)
    grid, micro = shape.image_size // shape.patch_size, micro_batch_size(config.train, world.size)
    mask, num_masked = make_mask(config.mask, grid, config.train.seed)
    state = world.on_main(lambda: newest_state(config))
    teacher = config.target.tokenizer if config.target.kind == "features" else None
    mean, std = set_normalization(config.data, state, config.train.init_from or teacher)
    index = open_index(config, world)
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

    # What is trained: new weights, or those of another run, or this run's own.
    torch.manual_seed(config.train.seed)
    model = make_model(config, targets)
    model.checkpoint_blocks(config.train.activation_checkpointing)
    if config.train.init_from and state is None:
        load_weights(model, config.train.init_from)
    accumulation = config.train.global_batch_size // (world.size * micro)
    engine = make_engine(model, config, device, accumulation, world=world)
    tokenizer = file_sha256(config.target.tokenizer) if config.target.tokenizer else None
    facts = {"data": index.fingerprint, "tokenizer": tokenizer}
    start_step = 0 if state is None else resume(config, engine, state, facts)
    begin(config, device, kernels, world)

    flops = pretraining_flops(model, num_masked) + targets.encode_flops(grid, num_masked)
    run = Run(
        config=config,
        world=world,
        device=device,
        plan=plan,
        trained=engine,
        facts=facts,
        flops_per_image=flops,
        start_step=start_step,
        published=("model.safetensors", "encoder.safetensors"),
    )
    return Job(
        run=run,
        index=index,
        model=model,
        engine=engine,
        open_loader=open_loader,
        mask=mask,
        num_masked=num_masked,
        normalize=Normalize(mean, std, device),
        targets=targets,
        encode=make_encode(targets, config.target.compile),
        drop_path_rates=torch.tensor(model.branch_rates(), device=device),
    )


def check_probe(probe: ProbeConfig) -> None:
    if bool(probe.train) != bool(probe.test):
        raise UserError(f"probe.train is {probe.train}, probe.test {probe.test}: set both or neither")
