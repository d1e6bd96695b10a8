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
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cae_fast import __version__
from cae_fast.config import ClassifyConfig, UserError
from cae_fast.data.loader import labelled_train_loader, resolve_num_workers
from cae_fast.data.sampling import SamplingPlan
from cae_fast.models.flops import block_flops
from cae_fast.models.heads import (
    AttentiveProbe,
    Classifier,
    FinetuneHead,
    LinearProbe,
    add_relative_position_bias,
)
from cae_fast.models.vit import drop_path_rates
from cae_fast.training.augmentation import BatchAugmentation, make_rand_augment
from cae_fast.training.checkpoint import save_state, write_safetensors, write_text
from cae_fast.training.classifier_optim import ClassifierOptimizer
from cae_fast.training.classify_task import Task, prepare_task, report, test
from cae_fast.training.distributed import joined, read_world
from cae_fast.training.interrupt import GO_ON, STOP, STOP_DIVERGED, StopRequest, own_verdict
from cae_fast.training.knn_probe import extract_features, knn_votes
from cae_fast.training.monitor import Monitor, drop_steps_after
from cae_fast.training.optim import scheduled_lr
from cae_fast.training.pictures import save_curves
from cae_fast.training.resume import newest_state, resume
from cae_fast.training.run_setup import (
    add_settings,
    choose_device,
    diverged,
    load_run_config,
    sampling_plan,
    stopped,
)
from cae_kernels import drop_path_scales

log = logging.getLogger(__name__)
HEADS = ("linear", "attentive", "knn", "finetune")
LabelledBatch = tuple[Tensor, Tensor, Tensor]
"""Images uint8 (B, 3, S, S) or, cached, tokens (B, n, D); labels (B,); positions (B,)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--head", required=True, choices=HEADS, help="what reads the encoder's tokens")
    add_settings(parser, ClassifyConfig)


def run(args: argparse.Namespace) -> int:
    config = load_run_config(ClassifyConfig, args)
    config.head.kind = args.head
    world = read_world()
    device = choose_device(config.train, world.local_rank)
    if args.head == "knn":
        return knn(prepare_task(config, world, device))
    if not world.main:
        logging.getLogger("cae_fast").setLevel(logging.WARNING)
    with StopRequest() as stop, joined(world, device, config.train.timeout_seconds, alone=True):
        return train(prepare(prepare_task(config, world, device)), stop)


def train_step(job: "Job", batches: list[LabelledBatch], step: int, lr: float) -> dict[str, Tensor]:
    """One optimizer step over its micro-batches. Nothing in it waits for the device; metrics stay there."""
    losses, hits = [], []
    world, seed = job.task.world, job.task.config.train.seed
    for number, (inputs, labels, positions) in enumerate(batches, world.rank * len(batches)):
        logits, targets = forward(job, inputs, labels, positions, draw_seed(seed, step, number))
        loss = F.cross_entropy(logits, targets, label_smoothing=job.task.config.augment.label_smoothing)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
        hits.append((logits.argmax(1) == labels).float().mean())
    loss, accuracy = world.mean(torch.stack((torch.stack(losses).mean(), torch.stack(hits).mean()))).unbind()
    result = job.optimizer.step(loss, lr)
    mixed = {} if job.augmentation.mix is not None else {"accuracy": accuracy}
    return {"loss": loss, **mixed, **result._asdict()}


def forward(job: "Job", inputs: Tensor, labels: Tensor, positions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
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


def train(job: "Job", stop: StopRequest) -> int:
    """Every step that is left, with tests and checkpoints. Returns the exit status."""
    config, task, world, per_epoch = job.task.config, job.task, job.task.world, job.plan.steps_per_epoch
    step = saved = job.start_step
    verdict = GO_ON
    job.model.head.train()
    monitoring = make_monitor(job) if world.main else nullcontext()
    with monitoring as monitor, closing(micro_batches(job)) as steps:
        for batches, waited in steps:
            world.beat()
            lr = scheduled_lr(step, per_epoch, config.optim)
            if monitor is not None:
                monitor.before_step(step)
            metrics = train_step(job, batches, step, lr)
            if monitor is not None:
                first = step * config.train.global_batch_size
                positions = range(first, first + config.train.global_batch_size)
                monitor.record(step, metrics, lr=lr, data_wait=waited, sample_ids=positions)
            step += 1
            verdict = world.agreed(own_verdict(monitor, stop))
            if verdict == STOP_DIVERGED:
                break
            if step % (config.validation.every_epochs * per_epoch) == 0 and step < job.last_step:
                record_test(job, step)
            if step % (config.checkpoint.every_epochs * per_epoch) == 0:
                if monitor is not None:
                    monitor.flush()
                save(job, saved := step)
            if verdict == STOP:
                break
    if verdict == STOP_DIVERGED:
        return world.on_main(lambda: diverged(task.run_dir, step))
    if saved != step:
        save(job, step)
    if verdict == STOP and step < job.last_step:
        return world.on_main(lambda: stopped(task.run_dir, step, stop.requested or "a signal to another process"))
    result = record_test(job, step)
    return world.on_main(lambda: finish(job, result, step))


def finish(job: "Job", result: dict[str, Any], step: int) -> int:
    """The classifier's weights, curves and results.json."""
    task = job.task
    facts = {"config": asdict(task.config), "encoder": task.encoder_sha256, "version": __version__, "step": step}
    classifier = task.run_dir / "classifier.safetensors"
    write_safetensors(classifier, job.optimizer.weights(), {"format": "pt", "cae_fast": json.dumps(facts)})
    save_curves(task.run_dir / "metrics.jsonl", task.run_dir / "curves.png")
    return report(task, result, step)


def micro_batches(job: "Job") -> Generator[tuple[list[LabelledBatch], float], None, None]:
    """For every step left: its micro-batches on the device, and the seconds spent waiting for them."""
    config, device, world, size = job.task.config, job.task.device, job.task.world, job.task.micro_batch_size
    if job.cached is not None:
        tokens, labels = job.cached
        for step in range(job.start_step, job.last_step):
            sample = job.plan.draw(step, 0, config.train.global_batch_size)
            ids, positions = torch.from_numpy(sample.sample_ids), torch.from_numpy(sample.positions)
            parts = zip(ids.split(size), positions.split(size), strict=True)
            yield [(tokens[part].to(device), labels[part].to(device), where) for part, where in parts], 0.0
        return
    batches = labelled_train_loader(
        job.task.index,
        job.plan,
        augment=make_rand_augment(config.augment.rand_augment, job.task.image_size, config.data.mean),
        image_size=job.task.image_size,
        start_step=job.start_step,
        stop_step=job.last_step,
        rank=world.rank,
        world_size=world.size,
        micro_batch_size=size,
        num_workers=resolve_num_workers(config.data.num_workers, world.core_share),
        pin_memory=device.type == "cuda",
        decoder="cpu" if config.data.backend == "auto" else config.data.backend,
    )
    with closing(batches):
        for _ in range(job.start_step, job.last_step):
            began = time.perf_counter()
            loaded = [next(batches) for _ in range(config.train.global_batch_size // (world.size * size))]
            waited = time.perf_counter() - began
            move = partial(Tensor.to, device=device, non_blocking=True)
            yield [(move(x), move(labels), move(where)) for x, labels, where in loaded], waited


def save(job: "Job", step: int) -> None:
    task, keep_every = job.task, job.task.config.checkpoint.keep_every_epochs * job.plan.steps_per_epoch
    facts: dict[str, Any] = {"config": asdict(task.config), "version": __version__, "step": step}
    facts |= {"data": task.index.fingerprint, "encoder": task.encoder_sha256}
    keep = set(range(keep_every, step, keep_every)) if keep_every else set()
    task.world.on_main(lambda: save_state(task.run_dir, step, job.optimizer.state(), facts, keep))


def record_test(job: "Job", step: int) -> dict[str, Any]:
    """Test on the validation images and add a line to tests.jsonl; what later steps left there goes."""
    job.model.head.eval()

    def logits(images: Tensor) -> Tensor:
        return job.model(job.task.normalize(images).to(job.task.dtype))

    result = test(job.task, logits)
    job.model.head.train()
    if not job.task.world.main:
        return result
    path = job.task.run_dir / "tests.jsonl"
    lines = [*drop_steps_after(path, step - 1), {"step": step, "epoch": step / job.plan.steps_per_epoch, **result}]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    log.info("step %d: top-1 %.2f %%, top-5 %.2f %%", step, 100 * result["top1"], 100 * result["top5"])
    return result


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
    return report(task, test(task, lambda x: knn_votes(known, labels, features(x), k, task.num_classes)), 0)


@dataclass
class Job:
    """A head in training."""

    task: Task
    plan: SamplingPlan
    model: Classifier
    optimizer: ClassifierOptimizer
    augmentation: BatchAugmentation
    drop_path_rates: Tensor | None
    cached: tuple[Tensor, Tensor] | None
    start_step: int = 0

    @property
    def total_steps(self) -> int:
        return self.task.config.optim.epochs * self.plan.steps_per_epoch

    @property
    def last_step(self) -> int:
        limit = self.task.config.train.max_steps
        return self.total_steps if limit is None else min(limit, self.total_steps)


def prepare(task: Task) -> Job:
    """Make head and optimizer, encode the images if asked, and load what the run folder holds."""
    config, encoder = task.config, task.encoder
    state = task.world.on_main(lambda: newest_state(config))
    plan = sampling_plan(config, task.index)
    torch.manual_seed(config.train.seed)
    if config.encoder.rel_pos_bias:
        add_relative_position_bias(encoder)
        encoder.to(device=task.device, dtype=task.dtype)
    head: LinearProbe | AttentiveProbe | FinetuneHead
    if config.head.kind == "linear":
        head = LinearProbe(encoder.embed_dim, task.num_classes, config.head.features == "patch_mean")
    elif config.head.kind == "attentive":
        head = AttentiveProbe(encoder.embed_dim, task.num_heads, task.num_classes, config.head.class_token)
    else:
        head = FinetuneHead(encoder, task.num_classes)
    model = Classifier(encoder, head.to(task.device))
    rates = None
    if config.encoder.drop_path_rate:
        branches = [rate for rate in drop_path_rates(config.encoder.drop_path_rate, len(encoder.blocks)) for _ in "12"]
        rates = torch.tensor(branches, device=task.device)  # (2 * depth,)
    augmentation = BatchAugmentation(config.augment, task.num_classes, task.micro_batch_size, task.device)
    make_rand_augment(config.augment.rand_augment, task.image_size, config.data.mean)  # to complain before training
    optimizer = ClassifierOptimizer(model, config.optim, task.world)
    job = Job(task, plan, model, optimizer, augmentation, rates, None)
    if state is not None:
        frozen = {"encoder": task.encoder_sha256}
        job.start_step = resume(config, job.optimizer, state, task.index.fingerprint, frozen)
    if config.head.cache_features:
        job.cached = encode_all(task, model)
    return job


def encode_all(task: Task, model: Classifier) -> tuple[Tensor, Tensor]:
    """What the head reads of every training image, float32 (M, n, D), and the labels (M,), on the CPU."""

    def encode(images: Tensor) -> Tensor:
        return model.features(task.normalize(images.to(task.device)).to(task.dtype)).cpu()

    with closing(task.images(task.index)) as batches:
        tokens, labels = extract_features(encode, batches)
    if len(tokens) != len(task.index):
        lost = len(task.index) - len(tokens)
        raise UserError(f"head.cache_features: {lost} images of data.path cannot be used any more; scan it again")
    log.info("cached %.2f GiB of features", math.prod(tokens.shape) * 4 / 2**30)
    return tokens, labels


def make_monitor(job: Job) -> Monitor:
    encoder, config = job.task.encoder, job.task.config
    blocks = len(encoder.blocks) * block_flops(encoder.grid**2 + 1, encoder.embed_dim, job.task.num_heads)
    passes = 3 if config.head.kind == "finetune" else int(job.cached is None)
    return Monitor(
        job.task.run_dir,
        config.log,
        total_steps=job.total_steps,
        start_step=job.start_step,
        steps_per_epoch=job.plan.steps_per_epoch,
        images_per_step=config.train.global_batch_size,
        flops_per_image=passes * blocks,
        device=job.task.device,
    )
