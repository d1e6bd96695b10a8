"""Measure what an encoder knows on labelled images: probes of the frozen encoder, k-NN, or fine-tuning.

  cae-fast classify --head linear configs/classify/quickstart_linear.yaml
  cae-fast classify --head finetune configs/classify/finetune_vit_base.yaml \\
      encoder.path=runs/base/encoder.safetensors data.path=/data/imagenet/train validation.path=/data/imagenet/val

  torchrun --nproc-per-node 8 -m cae_fast classify --head finetune CONFIG ...

It writes RUN/results.json: top-1 and top-5, the settings and the encoder's SHA-256. Run it again with the same
arguments to continue an interrupted run, with as many processes as you like. k-NN reads no optim settings.
"""

# B micro-batch, N patches, n tokens that a head reads, S image side, D width, K classes, M images.

import argparse
import json
import logging
import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cae_fast import __version__
from cae_fast.config import ClassifyConfig, UserError
from cae_fast.data.loader import labelled_train_loader, resolve_num_workers
from cae_fast.data.sampling import SamplingPlan, sampling_plan
from cae_fast.evaluation.augmentation import BatchAugmentation, make_rand_augment
from cae_fast.evaluation.classifier import Classifier
from cae_fast.evaluation.finetune import add_relative_position_bias
from cae_fast.evaluation.heads import HEADS, SETTINGS
from cae_fast.evaluation.knn_probe import extract_features, knn_votes
from cae_fast.evaluation.optimizer import ClassifierOptimizer
from cae_fast.evaluation.task import Task, check_settings, prepare_task, report, test
from cae_fast.files import write_safetensors, write_text
from cae_fast.models.flops import block_flops
from cae_fast.models.vit import drop_path_rates
from cae_fast.settings import add_settings, load_run_config
from cae_fast.training.distributed import joined, read_world
from cae_fast.training.inputs import grouped, inputs_ahead
from cae_fast.training.lock import locked
from cae_fast.training.loop import Run, run_steps
from cae_fast.training.monitor import drop_steps_after
from cae_fast.training.pictures import save_curves
from cae_fast.training.resume import newest_state, resume
from cae_fast.training.setup import choose_device
from cae_kernels import drop_path_scales

log = logging.getLogger(__name__)
LabelledBatch = tuple[Tensor, Tensor, Tensor]
"""Images uint8 (B, 3, S, S) or, cached, tokens (B, n, D); labels (B,); positions (B,)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", required=True, choices=list(SETTINGS), help="what reads the encoder's tokens")
    add_settings(parser, ClassifyConfig)


def run(args: argparse.Namespace) -> int:
    config = load_run_config(ClassifyConfig, args)
    config.head.kind = args.head
    world = read_world()
    check_settings(config, world.size)
    device = choose_device(config.train, world.local_rank)
    with (
        joined(world, device, config.train.timeout_seconds, alone=True),
        locked(Path(config.train.run_dir), world.main),
    ):
        task = prepare_task(config, world, device)
        return train(prepare(task)) if args.head in HEADS else knn(task)


def train(job: "Job") -> int:
    """Every step that is left, then the last test. Returns the exit status."""
    run = job.run
    job.model.head.train()
    move = partial(move_batch, run.device)
    ending = run_steps(run, inputs_ahead(micro_batches(job), move, run.device), partial(take_step, job))
    if ending is not None:
        return ending
    result = record_test(job, run.last_step)
    return run.world.on_main(lambda: finish(job, result))


def micro_batches(job: "Job") -> Generator[list[LabelledBatch], None, None]:
    """The micro-batches of every step left."""
    run, task = job.run, job.task
    config, world, size = task.config, run.world, task.micro_batch_size
    if job.cached is not None:
        return cached_batches(job.cached, run.plan, range(run.start_step, run.last_step), size)
    batches = labelled_train_loader(
        task.index,
        run.plan,
        augment=make_rand_augment(config.augment.rand_augment, task.image_size, task.mean),
        image_size=task.image_size,
        start_step=run.start_step,
        stop_step=run.last_step,
        rank=world.rank,
        world_size=world.size,
        micro_batch_size=size,
        num_workers=resolve_num_workers(config.data.num_workers, world.core_share),
        pin_memory=run.device.type == "cuda",
        decoder="cpu" if config.data.backend == "auto" else config.data.backend,
    )
    return grouped(batches, config.train.global_batch_size // (world.size * size))


def cached_batches(
    cached: tuple[Tensor, Tensor], plan: SamplingPlan, steps: range, size: int
) -> Generator[list[LabelledBatch], None, None]:
    """The micro-batches of these steps from what the head reads of every image, and the labels."""
    tokens, labels = cached
    for step in steps:
        sample = plan.draw(step, 0, plan.global_batch_size)
        ids, positions = torch.from_numpy(sample.sample_ids), torch.from_numpy(sample.positions)
        parts = zip(ids.split(size), positions.split(size), strict=True)
        yield [(tokens[part], labels[part], where) for part, where in parts]


def move_batch(device: torch.device, batch: LabelledBatch) -> LabelledBatch:
    inputs, labels, positions = (tensor.to(device, non_blocking=True) for tensor in batch)
    return inputs, labels, positions


def take_step(job: "Job", inputs: list[LabelledBatch], step: int, lr: float) -> dict[str, Tensor]:
    """One optimizer step over its micro-batches, after the test that is due. Metrics stay on the device."""
    config, world = job.task.config, job.run.world
    if step % (config.validation.every_epochs * job.run.plan.steps_per_epoch) == 0 and step > 0:
        record_test(job, step)

    losses, hits = [], []
    for number, (images, labels, positions) in enumerate(inputs, world.rank * len(inputs)):
        seed = draw_seed(config.train.seed, step, number)
        logits, targets = forward(job, images, labels, positions, seed=seed)
        loss = F.cross_entropy(logits, targets, label_smoothing=config.augment.label_smoothing)
        (loss / len(inputs)).backward()
        losses.append(loss.detach())
        hits.append((logits.argmax(1) == labels).float().mean())

    loss, accuracy = world.mean(torch.stack((torch.stack(losses).mean(), torch.stack(hits).mean()))).unbind()
    result = job.optimizer.step(loss, lr)
    mixed = {} if job.augmentation.mix is not None else {"accuracy": accuracy}
    return {"loss": loss, **mixed, **result._asdict()}


def forward(job: "Job", inputs: Tensor, labels: Tensor, positions: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Logits (B, K) of a training batch, and its targets."""
    if job.cached is not None:
        return job.model.head(inputs), labels
    images, targets = job.augmentation(job.task.normalize(inputs), labels, seed)
    keep = None
    if job.drop_path_rates is not None:
        keep = drop_path_scales(job.task.config.train.seed, positions, job.drop_path_rates)  # (2 * depth, B)
    return job.model(images.to(job.task.dtype), keep), targets


def draw_seed(seed: int, step: int, micro_batch: int) -> int:
    """What a micro-batch's augmentation draws from, counted over all processes: a resumed run draws the same."""
    return int(np.random.SeedSequence((seed, step, micro_batch)).generate_state(1)[0])


def record_test(job: "Job", step: int) -> dict[str, Any]:
    """Test on the validation images and add a line to tests.jsonl; what later steps left there goes.

    A test that is there already, of a run that was stopped after it, is not made again.
    """
    path = job.task.run_dir / "tests.jsonl"
    lines = job.run.world.on_main(lambda: drop_steps_after(path, step))
    if lines and lines[-1]["step"] == step:
        return lines[-1]

    def logits(images: Tensor) -> Tensor:
        return job.model(job.task.normalize(images).to(job.task.dtype))

    job.model.head.eval()
    result = test(job.task, logits)
    job.model.head.train()
    if job.run.world.main:
        lines.append({"step": step, "epoch": step / job.run.plan.steps_per_epoch, **result})
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        log.info("step %d: top-1 %.2f %%, top-5 %.2f %%", step, 100 * result["top1"], 100 * result["top5"])
    return result


def finish(job: "Job", result: dict[str, Any]) -> int:
    """The classifier's weights, curves and results.json."""
    task, step = job.task, job.run.last_step
    facts = {"config": asdict(task.config), "encoder": task.encoder_sha256, "version": __version__, "step": step}
    classifier = task.run_dir / "classifier.safetensors"
    write_safetensors(classifier, job.optimizer.weights(), facts)
    save_curves(task.run_dir / "metrics.jsonl", task.run_dir / "curves.png")
    return report(task, result, step=step, train_images=len(task.index))


def knn(task: Task) -> int:
    """Weighted k-NN on the mean of the patch tokens, or on the class token."""
    k = task.config.head.k
    if not 1 <= k <= len(task.index):
        raise UserError(f"head.k is {k}: give a number from 1 to {len(task.index)}, the number of training images")

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        tokens = task.encoder.forward_features(task.normalize(images.to(task.device)).to(task.dtype))
        if task.config.head.features == "class_token":
            return tokens[:, 0].float()  # (B, D)
        return tokens[:, 1:].float().mean(1)  # (B, D)

    with closing(task.images(task.index)) as batches:
        known, labels = extract_features(features, batches)  # (M, D), (M,)
    result = test(task, lambda x: knn_votes(known, labels, features(x), k=k, num_classes=task.num_classes))
    return report(task, result, step=0, train_images=len(labels))


@dataclass
class Job:
    """A head in training."""

    run: Run[ClassifyConfig]
    task: Task
    model: Classifier
    optimizer: ClassifierOptimizer
    augmentation: BatchAugmentation
    drop_path_rates: Tensor | None
    cached: tuple[Tensor, Tensor] | None
    """What the head reads of every training image, (M, n, D), and the labels (M,), on the CPU."""


def prepare(task: Task) -> Job:
    """Make head and optimizer, encode the images if asked, and load what the run folder holds."""
    config, encoder, world = task.config, task.encoder, task.world
    state = world.on_main(lambda: newest_state(config))
    plan = sampling_plan(config, task.index)

    # The model. make_rand_augment is called to complain before training.
    torch.manual_seed(config.train.seed)
    if config.encoder.rel_pos_bias:
        add_relative_position_bias(encoder)
        encoder.to(device=task.device, dtype=task.dtype)
    head = HEADS[config.head.kind].make(encoder, task.num_classes, config.head)
    model = Classifier(encoder, head.to(task.device))
    rates = None
    if config.encoder.drop_path_rate:
        branches = [rate for rate in drop_path_rates(config.encoder.drop_path_rate, len(encoder.blocks)) for _ in "12"]
        rates = torch.tensor(branches, device=task.device)  # (2 * depth,)
    augmentation = BatchAugmentation(config.augment, task.num_classes, task.micro_batch_size, task.device)
    make_rand_augment(config.augment.rand_augment, task.image_size, task.mean)

    # Where training stands.
    optimizer = ClassifierOptimizer(model, config.optim, world)
    facts = {"data": task.index.fingerprint, "encoder": task.encoder_sha256}
    start_step = 0 if state is None else resume(config, optimizer, state, facts)
    cached = encode_all(task, model) if config.head.cache_features else None

    blocks = len(encoder.blocks) * block_flops(encoder.grid**2 + 1, encoder.embed_dim, encoder.num_heads)
    run = Run(
        config=config,
        world=world,
        device=task.device,
        plan=plan,
        trained=optimizer,
        facts=facts,
        flops_per_image=blocks * (3 if head.trains_encoder else int(cached is None)),
        start_step=start_step,
    )
    return Job(
        run=run,
        task=task,
        model=model,
        optimizer=optimizer,
        augmentation=augmentation,
        drop_path_rates=rates,
        cached=cached,
    )


def encode_all(task: Task, model: Classifier) -> tuple[Tensor, Tensor]:
    """What the head reads of every training image, float32 (M, n, D), and the labels (M,), on the CPU."""

    def encode(images: Tensor) -> Tensor:
        return model.head.read(model.encoder, task.normalize(images.to(task.device)).to(task.dtype)).cpu()

    with closing(task.images(task.index)) as batches:
        tokens, labels = extract_features(encode, batches)
    if len(tokens) != len(task.index):
        lost = len(task.index) - len(tokens)
        raise UserError(f"head.cache_features: {lost} images of data.path cannot be used any more; scan it again")
    log.info("cached %.2f GiB of features", math.prod(tokens.shape) * 4 / 2**30)
    return tokens, labels
