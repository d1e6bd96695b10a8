"""Train a discrete VAE on images without labels; its codes can be the target of pretraining.

  cae-fast train-tokenizer configs/tokenizer/quickstart_fsq.yaml
  cae-fast train-tokenizer configs/tokenizer/dvae_imagenet1k.yaml data.path=/data/imagenet/train

It writes RUN/tokenizer.safetensors. Run it again with the same arguments to continue an interrupted run.
"""

# B batch, N positions of the code grid, Nm masked, S image side, V codes.

import argparse
import json
import logging
import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cae_fast import __version__
from cae_fast.config import OptimConfig, TrainTokenizerConfig, UserError
from cae_fast.data.backend import OpenLoader, choose_backend
from cae_fast.data.index import ImageIndex, index_for
from cae_fast.data.loader import Batch, pretrain_loader, resolve_num_workers
from cae_fast.data.sampling import SamplingPlan
from cae_fast.models.dvae import (
    MEAN,
    STD,
    DiscreteVAE,
    DvaeOutput,
    cosine_ramp,
    dvae_metadata,
    resolve_tokenizer,
    training_flops,
)
from cae_fast.models.quantizers import VectorQuantizer, perplexity
from cae_fast.training.checkpoint import remove_leftovers, save_state, write_safetensors, write_text
from cae_fast.training.distributed import read_world
from cae_fast.training.engine import Engine
from cae_fast.training.interrupt import StopRequest
from cae_fast.training.monitor import Monitor
from cae_fast.training.optim import scheduled_lr
from cae_fast.training.pictures import save_curves, save_pairs
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
)

log = logging.getLogger(__name__)
EVALUATION_CROPS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, TrainTokenizerConfig)


def run(args: argparse.Namespace) -> int:
    config = load_run_config(TrainTokenizerConfig, args)
    with StopRequest() as stop:
        return train(prepare(config), stop)


class TokenizerEngine(Engine):
    """An engine whose training state includes the model's buffers: the running means of a vq codebook."""

    def __init__(self, model: DiscreteVAE, optim: OptimConfig, precision: str, device: torch.device, accumulation: int):
        super().__init__(model, optim, precision, device, accumulation)
        if isinstance(model.quantizer, VectorQuantizer):
            model.quantizer.float()  # running means would stand still in bfloat16
        parameters = {name for name, _ in model.named_parameters()}
        self.buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"buffer/{name}": tensor for name, tensor in self.buffers.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        for name, tensor in self.buffers.items():
            tensor.copy_(state[f"buffer/{name}"])


class CodeUse:
    """How often each code occurred since the last report; counted on the device."""

    def __init__(self, num_codes: int, device: torch.device):
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)  # (V,)

    def add(self, codes: Tensor) -> None:
        codes = codes.flatten()
        self.counts.scatter_add_(0, codes, torch.ones_like(codes))

    def report(self) -> dict[str, Tensor]:
        """Perplexity, used and dead codes as scalars on the device; then it starts anew."""
        used = self.counts.count_nonzero()
        result = {"perplexity": perplexity(self.counts), "used_codes": used, "dead_codes": len(self.counts) - used}
        self.counts.zero_()
        return result


def train_step(job: "Job", batches: list[Batch], step: int, lr: float) -> dict[str, Tensor]:
    """One optimizer step over its micro-batches; metrics stay on the device. Adds to `job.use`."""
    settings, seed = job.model.config, job.config.train.seed
    temperature = cosine_ramp(step, settings.temperature_steps, *settings.temperature)
    kl_weight = cosine_ramp(step, settings.kl_warmup_steps, 0.0, settings.kl_weight)
    outputs: list[DvaeOutput] = []
    for number, batch in enumerate(batches):
        torch.manual_seed(noise_seed(seed, step, number))
        output = job.engine(batch.images, temperature, kl_weight)
        job.engine.backward(output.total)
        job.use.add(output.codes)
        outputs.append(output)
    result = job.engine.step(lr)
    squared_error = torch.stack([output.squared_error for output in outputs]).mean()
    metrics = {
        "loss": torch.stack([output.total.detach() for output in outputs]).mean(),
        "squared_error": squared_error,
        "psnr": psnr(squared_error),
    }
    if settings.quantizer == "gumbel":
        metrics["kl"] = torch.stack([output.kl for output in outputs]).mean()
        metrics["diversity"] = torch.stack([output.diversity for output in outputs]).mean()
        metrics["temperature"] = torch.full((), temperature, device=job.device)
        metrics["kl_weight"] = torch.full((), kl_weight, device=job.device)
    if settings.quantizer == "vq":
        metrics["commitment"] = torch.stack([output.commitment for output in outputs]).mean()
    return metrics | result._asdict()


def noise_seed(seed: int, step: int, micro_batch: int) -> int:
    """What torch's generators start from in a micro-batch, so that a resumed run draws the same noise."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [0, 1]."""
    return -10 * squared_error.log10()


def train(job: "Job", stop: StopRequest) -> int:
    """Every step that is left, checkpoints, and the evaluation at the end. Returns the exit status."""
    config, monitor = job.config, make_monitor(job)
    step = saved = job.start_step
    with monitor, closing(micro_batches(job, job.start_step, job.last_step)) as steps:
        for batches, waited in steps:
            monitor.before_step(step)
            lr = scheduled_lr(step, job.plan.steps_per_epoch, config.optim)
            metrics = train_step(job, batches, step, lr)
            first = step * config.train.global_batch_size
            positions = range(first, first + config.train.global_batch_size)
            step += 1
            checkpoint = step % (config.checkpoint.every_epochs * job.plan.steps_per_epoch) == 0
            if checkpoint or step % config.log.every_steps == 0 or step == job.last_step or stop.requested:
                metrics |= job.use.report()
            monitor.record(step - 1, metrics, lr=lr, data_wait=waited, sample_ids=positions)
            if monitor.consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
                return diverged(job.run_dir, step)
            if checkpoint:
                monitor.flush()
                save(job, saved := step)
            if stop.requested:
                break
    if saved != step:
        save(job, step)
    if stop.requested and step < job.last_step:
        log.info("stopped by %s after step %d; run the same command again to continue", stop.requested, step)
        return 0
    return finish(job, step)


def micro_batches(job: "Job", start: int, stop: int) -> Generator[tuple[list[Batch], float], None, None]:
    """For every step: its micro-batches on the device, and the seconds spent waiting for them."""
    loader = job.open_loader(
        start_step=start,
        stop_step=stop,
        pin_memory=job.device.type == "cuda",
        decoder=job.config.data.backend,
        device=job.device,
    )
    with closing(loader):
        for _ in range(start, stop):
            began = time.perf_counter()
            batches = [next(loader) for _ in range(job.engine.accumulation)]
            waited = time.perf_counter() - began
            yield [batch.to(job.device) for batch in batches], waited


def no_mask(positions: Tensor) -> tuple[Tensor, Tensor]:
    empty = positions.new_empty(len(positions), 0)
    return empty, empty


def save(job: "Job", step: int) -> None:
    keep_every = job.config.checkpoint.keep_every_epochs * job.plan.steps_per_epoch
    keep = set(range(keep_every, step, keep_every)) if keep_every else set()
    facts = {"data": job.index.fingerprint, "version": __version__, "step": step}
    save_state(job.run_dir, step, job.engine.state(), {"config": asdict(job.config), **facts}, keep)
    state = {name: tensor.cpu() for name, tensor in job.engine.model_state().items()}
    write_safetensors(job.run_dir / "tokenizer.safetensors", state, dvae_metadata(job.model.config, facts))


def finish(job: "Job", step: int) -> int:
    """Pictures, and how well the codes describe crops that training did not see."""
    save_curves(job.run_dir / "metrics.jsonl", job.run_dir / "curves.png")
    result = evaluate(job)
    write_text(job.run_dir / "evaluation.json", json.dumps(result | {"step": step}, indent=1))
    log.info("%s: curves.png, reconstructions.png, tokenizer.safetensors", job.run_dir)
    print(
        f"codes of {result['crops']:,} fresh crops: perplexity {result['perplexity']:.0f}, "
        f"{result['used_codes']:,} of {job.model.num_codes:,} used, PSNR {result['psnr']:.2f} dB; "
        f"use them with target.tokenizer={job.run_dir / 'tokenizer.safetensors'}",
        flush=True,
    )
    return 0


@torch.no_grad()
def evaluate(job: "Job") -> dict[str, float]:
    """Encode and decode the crops that would come after the whole schedule; draws reconstructions.png of the first."""
    batch_size = job.config.train.global_batch_size
    steps = math.ceil(EVALUATION_CROPS / batch_size)
    job.use.report()
    job.model.eval()
    errors: list[Tensor] = []
    with closing(micro_batches(job, job.total_steps, job.total_steps + steps)) as batches:
        for images in (batch.images for step_batches, _ in batches for batch in step_batches):
            codes = job.model.code_grid(images)  # (B, G, G)
            decoded, pixels = job.model.decode_codes(codes), images.float() / 255  # (B, 3, S, S)
            if not errors:
                save_pairs(job.run_dir / "reconstructions.png", pixels, decoded)
            job.use.add(codes)
            errors.append((decoded - pixels).square().mean())
    job.model.train()
    squared_error = torch.stack(errors).mean()
    use = job.use.report()
    return {
        "crops": steps * batch_size,
        "squared_error": squared_error.item(),
        "psnr": psnr(squared_error).item(),
        "perplexity": use["perplexity"].item(),
        "used_codes": int(use["used_codes"]),
    }


@dataclass
class Job:
    """All that a run is made of."""

    config: TrainTokenizerConfig
    run_dir: Path
    device: torch.device
    index: ImageIndex
    plan: SamplingPlan
    open_loader: OpenLoader
    model: DiscreteVAE
    engine: TokenizerEngine
    use: CodeUse
    start_step: int

    @property
    def total_steps(self) -> int:
        return self.config.optim.epochs * self.plan.steps_per_epoch

    @property
    def last_step(self) -> int:
        limit = self.config.train.max_steps
        return self.total_steps if limit is None else min(limit, self.total_steps)


def prepare(config: TrainTokenizerConfig) -> Job:
    """Check every setting, open the data, build the model and load what the run folder holds."""
    config.tokenizer = resolve_tokenizer(config.tokenizer)
    check_training(config)
    if (size := read_world().size) > 1:
        raise UserError(f"{size} processes were started, but train-tokenizer runs in one: start it without a launcher")
    if config.train.zero or config.train.offload_optimizer or config.train.activation_checkpointing:
        raise UserError("train.zero, train.offload_optimizer and train.activation_checkpointing are for pretrain only")
    if set(config.data.mean) != {MEAN} or set(config.data.std) != {STD}:
        raise UserError(
            f"data.mean is {config.data.mean} and data.std {config.data.std}: the tokenizer's input always has {MEAN}"
        )
    device = choose_device(config.train)
    micro = micro_batch_size(config.train)
    state = newest_state(config)
    run_dir = Path(config.train.run_dir)
    index = index_for(config.data, run_dir)
    log.info("data: %s", index)
    plan = sampling_plan(config, index)
    open_loader = partial(
        pretrain_loader,
        index,
        plan,
        no_mask,
        image_size=config.tokenizer.image_size,
        token_size=None,
        rank=0,
        world_size=1,
        micro_batch_size=micro,
        num_workers=resolve_num_workers(config.data.num_workers, 1),
    )
    config.data.backend = choose_backend(config.data.backend, first_backend(state), device, open_loader)
    torch.manual_seed(config.train.seed)
    model = DiscreteVAE(config.tokenizer)
    if config.train.init_from and state is None:
        load_weights(model, config.train.init_from)
    engine = TokenizerEngine(
        model, config.optim, config.train.precision, device, config.train.global_batch_size // micro
    )
    start = 0 if state is None else resume(config, engine, state, index.fingerprint)
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    describe(config, run_dir, device, kernel_backends(device))
    return Job(
        config, run_dir, device, index, plan, open_loader, model, engine, CodeUse(model.num_codes, device), start
    )


def make_monitor(job: Job) -> Monitor:
    return Monitor(
        job.run_dir,
        job.config.log,
        total_steps=job.total_steps,
        start_step=job.start_step,
        steps_per_epoch=job.plan.steps_per_epoch,
        images_per_step=job.config.train.global_batch_size,
        flops_per_image=training_flops(job.model.config),
        device=job.device,
    )
