"""An encoder and labelled images to train and to test it on: what every protocol of `cae-fast classify` shares.

B batch, N patches, S image side, K classes.
"""

import json
import logging
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae_fast import __version__
from cae_fast.config import ClassifyConfig, HeadConfig, UserError
from cae_fast.data.index import ImageIndex
from cae_fast.data.loader import labelled_loader, resolve_num_workers
from cae_fast.data.normalize import Normalize
from cae_fast.evaluation.augmentation import import_eval
from cae_fast.evaluation.heads import HEADS, SETTINGS
from cae_fast.files import file_sha256, write_text
from cae_fast.models.encoder import load_encoder
from cae_fast.models.vit import VisionTransformer
from cae_fast.output import say
from cae_fast.training.distributed import World
from cae_fast.training.engine import PRECISIONS
from cae_fast.training.setup import (
    begin,
    check_training,
    kernel_backends,
    micro_batch_size,
    open_index,
    set_normalization,
    shared_index,
)

log = logging.getLogger(__name__)


@dataclass
class Task:
    """A frozen or pretrained encoder, and labelled images to train and to test on."""

    config: ClassifyConfig
    world: World
    device: torch.device
    encoder: VisionTransformer
    encoder_sha256: str
    index: ImageIndex
    validation_index: ImageIndex
    mean: list[float]
    """Of the encoder's input, as `normalize` uses it."""
    normalize: Normalize

    @property
    def run_dir(self) -> Path:
        return Path(self.config.train.run_dir)

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.config.train.precision]

    @property
    def num_classes(self) -> int:
        return int(max(self.index.labels.max(), self.validation_index.labels.max())) + 1

    @property
    def image_size(self) -> int:
        return self.encoder.grid * self.encoder.patch_embed.patch_size

    @property
    def micro_batch_size(self) -> int:
        return micro_batch_size(self.config.train, self.world.size)

    def images(self, index: ImageIndex) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This process's share of an index, cut as for validation, with labels; batches that lost all are left out."""
        workers = resolve_num_workers(self.config.data.num_workers, self.world.core_share)
        share, crop_pct = range(self.world.rank, len(index), self.world.size), self.config.validation.crop_pct
        images = labelled_loader(
            index,
            self.image_size,
            batch_size=self.micro_batch_size,
            num_workers=workers,
            sample_ids=share,
            crop_pct=crop_pct,
        )
        with closing(images) as batches:
            yield from ((images, labels) for images, labels in batches if len(labels))


def prepare_task(config: ClassifyConfig, world: World, device: torch.device) -> Task:
    """Check the settings, load the encoder and open the images."""
    check_training(config)
    check_settings(config, world.size)
    packages = HEADS[config.head.kind].packages if config.head.kind in HEADS else ()
    for module in ("torchmetrics.classification", *packages):
        import_eval(module)
    encoder = load_encoder(config.encoder.path, config.encoder.image_size)

    # Labelled images of the same classes to train and to test on.
    if not (config.validation.path or config.validation.index):
        raise UserError("validation.path is empty: set it to labelled images to test on")
    index = open_index(config, world)
    validation = replace(config.data, path=config.validation.path, index=config.validation.index)
    validation_index = shared_index(validation, Path(config.train.run_dir), world)
    log.info("validation: %s", validation_index)
    for name, part in (("data", index), ("validation", validation_index)):
        if part.labels.min() < 0:
            raise UserError(
                f"{name}.path: {part.source} has images without a label: each must lie in its class's folder"
            )
    check_classes("data.path and validation.path", index, validation_index)
    check_results(config)

    mean, std = set_normalization(config.data, None, config.encoder.path)
    encoder.to(device=device, dtype=PRECISIONS[config.train.precision])
    begin(config, device, kernel_backends(device), world)
    return Task(
        config=config,
        world=world,
        device=device,
        encoder=encoder,
        encoder_sha256=file_sha256(config.encoder.path),
        index=index,
        validation_index=validation_index,
        mean=mean,
        normalize=Normalize(mean, std, device),
    )


def check_classes(names: str, train: ImageIndex, test: ImageIndex) -> None:
    """UserError where two sets of images have other classes: their labels would mean other things."""
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[:3]
        raise UserError(
            f"{names} have other classes ({len(train.classes)} and {len(test.classes)}; in one alone: {', '.join(odd)})"
        )


def check_results(config: ClassifyConfig) -> None:
    """UserError where the run folder holds the results of another head, which would be overwritten."""
    path = Path(config.train.run_dir) / "results.json"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))["head"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if held != config.head.kind:
        raise UserError(f"{path} holds the results of --head {held}: choose another train.run_dir")


def check_settings(config: ClassifyConfig, processes: int = 1) -> None:
    """UserError for settings out of range, and for those that this head does not read."""
    head, optim = config.head, config.optim
    for field in fields(HeadConfig):
        value = getattr(head, field.name)
        if field.name not in ("kind", *SETTINGS[head.kind]) and value != field.default:
            raise UserError(f"head.{field.name} is {value!r}: --head {head.kind} does not read it")
    if head.features not in (None, "class_token", "patch_mean"):
        raise UserError(f"head.features is {head.features!r}: class_token or patch_mean")

    # What the command cannot do.
    if config.data.backend not in ("auto", "cpu", "pil"):
        raise UserError(f"data.backend is {config.data.backend!r}: classify decodes with cpu or pil (auto: cpu)")
    if processes > 1 and (head.kind == "knn" or head.cache_features):
        what = "--head knn" if head.kind == "knn" else "head.cache_features"
        raise UserError(f"{processes} processes were started, but {what} works in one: start it without a launcher")
    if config.train.zero or config.train.offload_optimizer or config.train.activation_checkpointing:
        raise UserError("train.zero, train.offload_optimizer and train.activation_checkpointing are for pretrain only")
    if config.train.init_from:
        raise UserError(f"train.init_from is {config.train.init_from}: give the encoder as encoder.path")

    # Numbers out of range.
    if not 0 < config.validation.crop_pct <= 1 or config.validation.every_epochs < 1:
        raise UserError(
            f"validation.crop_pct is {config.validation.crop_pct}, validation.every_epochs "
            f"{config.validation.every_epochs}: the first must be above 0 and at most 1, the second at least 1"
        )
    if not (0 <= config.encoder.drop_path_rate < 1 and 0 <= optim.momentum < 1 and 0 < optim.layer_decay <= 1):
        raise UserError(
            f"encoder.drop_path_rate is {config.encoder.drop_path_rate}, optim.momentum {optim.momentum}, "
            f"optim.layer_decay {optim.layer_decay}: from 0 to below 1 the first two, above 0 to 1 the third"
        )

    # What goes with another head only.
    if head.kind not in HEADS or not HEADS[head.kind].trains_encoder:
        for name in ("drop_path_rate", "rel_pos_bias"):
            if getattr(config.encoder, name):
                raise UserError(f"encoder.{name} is {getattr(config.encoder, name)}: only --head finetune trains it")
    if head.cache_features:
        used = [name for name, value in asdict(config.augment).items() if value and name != "label_smoothing"]
        if used:
            raise UserError(f"head.cache_features is true: cached features cannot have augment.{used[0]}")


@torch.no_grad()
def test(task: Task, classify: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Top-1 and top-5 (0..1) on the validation images of a classifier: uint8 images (B, 3, S, S) to scores (B, K).

    Processes share the images out, and torchmetrics adds up what they counted.
    """
    classification = import_eval("torchmetrics.classification")
    settings = {"num_classes": task.num_classes, "average": "micro", "validate_args": False}
    accuracies = [
        classification.MulticlassAccuracy(top_k=k, **settings).to(task.device) for k in (1, min(5, task.num_classes))
    ]
    seen = 0
    with closing(task.images(task.validation_index)) as batches:
        for images, labels in batches:
            task.world.beat()
            scores = classify(images.to(task.device))  # (B, K)
            for accuracy in accuracies:
                accuracy.update(scores, labels.to(task.device))
            seen += len(labels)
    count = round(task.world.mean(torch.tensor(float(seen), device=task.device)).item() * task.world.size)
    if not count:
        raise UserError(f"validation.path: none of the {len(task.validation_index)} images can be read")
    # float32 means of a whole number of hits
    top1, top5 = (round(accuracy.compute().item() * count) / count for accuracy in accuracies)
    return {"top1": top1, "top5": top5, "images": count}


def report(task: Task, result: dict[str, Any], *, step: int, train_images: int) -> int:
    """Write results.json and say what it holds. train_images: those that were read."""
    path, config = Path(task.config.encoder.path), task.config
    facts = {"head": config.head.kind, **result, "step": step, "encoder": path.name, "sha256": task.encoder_sha256}
    facts |= {"train_images": train_images, "config": asdict(config), "version": __version__}
    write_text(task.run_dir / "results.json", json.dumps(facts, indent=1) + "\n")
    top1, top5, count = result["top1"], result["top5"], result["images"]
    say(f"{config.head.kind}: top-1 {top1:.2%}, top-5 {top5:.2%} of {count:,} images ({task.run_dir})")
    return 0
