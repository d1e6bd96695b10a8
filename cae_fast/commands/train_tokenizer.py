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
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cae_fast.config import OptimConfig, TrainTokenizerConfig, UserError
from cae_fast.data.backend import OpenLoader, choose_backend
from cae_fast.data.loader import Batch, pretrain_loader, resolve_num_workers
from cae_fast.data.masking import no_mask
from cae_fast.data.sampling import sampling_plan
from cae_fast.files import write_safetensors, write_text
from cae_fast.models.dvae import (
    MEAN,
    STD,
    DiscreteVAE,
    DvaeOutput,
    cosine_ramp,
    dvae_facts,
    resolve_tokenizer,
    training_flops,
)
from cae_fast.models.quantizers import VectorQuantizer, perplexity
from cae_fast.output import say
from cae_fast.settings import add_settings, load_run_config
from cae_fast.training.checkpoint import consolidated
from cae_fast.training.distributed import World, joined, read_world
from cae_fast.training.engine import Engine
from cae_fast.training.inputs import grouped, inputs_ahead
from cae_fast.training.lock import locked
from cae_fast.training.loop import Run, run_steps
from cae_fast.training.pictures import save_curves, save_pairs
from cae_fast.training.resume import first_backend, load_weights, newest_state, resume
from cae_fast.training.setup import (
    begin,
    check_training,
    choose_device,
    kernel_backends,
    micro_batch_size,
    open_index,
)

log = logging.getLogger(__name__)
EVALUATION_CROPS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, TrainTokenizerConfig)


def run(args: argparse.Namespace) -> int:
    config = load_run_config(TrainTokenizerConfig, args)
    world, device = World(), choose_device(config.train)
    with joined(world, device, config.train.timeout_seconds, alone=True), locked(Path(config.train.run_dir)):
        return train(prepare(config, world, device))


def train(job: "Job") -> int:
    """Every step that is left, then the evaluation. Returns the exit status."""
    run = job.run
    inputs = images_of(job, run.start_step, run.last_step)
    ending = run_steps(run, inputs, partial(take_step, job), partial(tokenizer_file, job.model))
    return run.world.on_main(lambda: finish(job)) if ending is None else ending


def images_of(job: "Job", start: int, stop: int) -> Generator[tuple[list[tuple[Tensor]], float], None, None]:
    """For every step its micro-batches' images on the device, uint8 (B, 3, S, S), and the seconds waited for them."""
    device = job.run.device
    loader = job.open_loader(
        start_step=start,
        stop_step=stop,
        pin_memory=device.type == "cuda",
        decoder=job.run.config.data.backend,
        device=device,
    )

    def move(batch: Batch) -> tuple[Tensor]:
        return (batch.images.to(device, non_blocking=True),)

    return inputs_ahead(grouped(loader, job.engine.accumulation), move, device)


class TokenizerEngine(Engine):
    """An engine whose training state includes the model's buffers: the running means of a vq codebook."""

    def __init__(self, model: DiscreteVAE, optim: OptimConfig, precision: str, device: torch.device, accumulation: int):
        super().__init__(model, optim, precision, device, accumulation=accumulation)
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


def take_step(job: "Job", inputs: list[tuple[Tensor]], step: int, lr: float) -> dict[str, Tensor]:
    """One optimizer step over its micro-batches' images; metrics stay on the device. Adds to `job.use`."""
    settings, seed = job.model.config, job.run.config.train.seed
    temperature = cosine_ramp(step, settings.temperature_steps, *settings.temperature)
    kl_weight = cosine_ramp(step, settings.kl_warmup_steps, 0.0, settings.kl_weight)

    outputs: list[DvaeOutput] = []
    for number, (images,) in enumerate(inputs):
        torch.manual_seed(noise_seed(seed, step, number))
        output = job.engine(images, temperature, kl_weight)
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
        metrics["temperature"] = torch.full((), temperature, device=job.run.device)
        metrics["kl_weight"] = torch.full((), kl_weight, device=job.run.device)
    if settings.quantizer == "vq":
        metrics["commitment"] = torch.stack([output.commitment for output in outputs]).mean()
    if is_shown(job.run, step + 1):
        metrics |= job.use.report()
    return metrics | result._asdict()


def is_shown(run: Run[TrainTokenizerConfig], steps: int) -> bool:
    """Whether metrics are shown after so many steps."""
    every = run.config.log.every_steps
    return bool(steps % every == 0 or steps % run.checkpoint_steps == 0 or steps == run.last_step or run.stop.requested)


def noise_seed(seed: int, step: int, micro_batch: int) -> int:
    """What torch's generators start from in a micro-batch, so that a resumed run draws the same noise."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [0, 1]."""
    return -10 * squared_error.log10()


def tokenizer_file(model: DiscreteVAE, state: dict[str, Tensor], facts: dict[str, Any]) -> Callable[[], object]:
    """What writes tokenizer.safetensors of a training state."""
    path = Path(facts["config"]["train"]["run_dir"]) / "tokenizer.safetensors"
    weights = {name: tensor.cpu() for name, tensor in consolidated(model, state).items()}
    header = dvae_facts(model.config, {name: value for name, value in facts.items() if name != "config"})
    return lambda: write_safetensors(path, weights, header)


def finish(job: "Job") -> int:
    """Pictures, and how well the codes describe crops that training did not see."""
    run_dir = job.run.run_dir
    save_curves(run_dir / "metrics.jsonl", run_dir / "curves.png")
    result = evaluate(job)
    write_text(run_dir / "evaluation.json", json.dumps(result | {"step": job.run.last_step}, indent=1))
    log.info("%s: curves.png, reconstructions.png, tokenizer.safetensors", run_dir)
    say(
        f"codes of {result['crops']:,} fresh crops: perplexity {result['perplexity']:.0f}, "
        f"{result['used_codes']:,} of {job.model.num_codes:,} used, PSNR {result['psnr']:.2f} dB; "
        f"use them with target.tokenizer={run_dir / 'tokenizer.safetensors'}"
    )
    return 0


@torch.no_grad()
def evaluate(job: "Job") -> dict[str, float]:
    """Encode and decode the crops that would come after the whole schedule; draws reconstructions.png of the first."""
    run, batch_size = job.run, job.run.config.train.global_batch_size
    steps = math.ceil(EVALUATION_CROPS / batch_size)
    job.use.report()
    job.model.eval()
    errors: list[Tensor] = []

    with closing(images_of(job, run.total_steps, run.total_steps + steps)) as inputs:
        for images in (images for micro_batches, _ in inputs for (images,) in micro_batches):
            codes = job.model.code_grid(images)  # (B, G, G)
            decoded, pixels = job.model.decode_codes(codes), images.float() / 255  # (B, 3, S, S)
            if not errors:
                save_pairs(run.run_dir / "reconstructions.png", pixels, decoded)
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
    """All that the training of a tokenizer is made of."""

    run: Run[TrainTokenizerConfig]
    model: DiscreteVAE
    engine: TokenizerEngine
    open_loader: OpenLoader
    use: CodeUse


def prepare(config: TrainTokenizerConfig, world: World, device: torch.device) -> Job:
    """Check every setting, open the data, build the model and load what the run folder holds."""
    config.tokenizer = resolve_tokenizer(config.tokenizer)
    check_training(config)
    check_settings(config)
    kernels = kernel_backends(device)

    # What a step reads: images in the order of the plan, without masks.
    micro = micro_batch_size(config.train)
    state = newest_state(config)
    index = open_index(config, world)
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

    # What is trained: new weights, or those of another run, or this run's own.
    torch.manual_seed(config.train.seed)
    model = DiscreteVAE(config.tokenizer)
    if config.train.init_from and state is None:
        load_weights(model, config.train.init_from)
    accumulation = config.train.global_batch_size // micro
    engine = TokenizerEngine(model, config.optim, config.train.precision, device, accumulation=accumulation)
    facts = {"data": index.fingerprint}
    start_step = 0 if state is None else resume(config, engine, state, facts)
    begin(config, device, kernels, world)

    run = Run(
        config=config,
        world=world,
        device=device,
        plan=plan,
        trained=engine,
        facts=facts,
        flops_per_image=training_flops(model.config),
        start_step=start_step,
        published=("tokenizer.safetensors",),
    )
    return Job(run=run, model=model, engine=engine, open_loader=open_loader, use=CodeUse(model.num_codes, device))


def check_settings(config: TrainTokenizerConfig) -> None:
    if (size := read_world().size) > 1:
        raise UserError(f"{size} processes were started, but train-tokenizer runs in one: start it without a launcher")
    if config.train.zero or config.train.offload_optimizer or config.train.activation_checkpointing:
        raise UserError("train.zero, train.offload_optimizer and train.activation_checkpointing are for pretrain only")
    if set(config.data.mean or [MEAN]) != {MEAN} or set(config.data.std or [STD]) != {STD}:
        raise UserError(
            f"data.mean is {config.data.mean} and data.std {config.data.std}: the tokenizer's input always has {MEAN}"
        )
