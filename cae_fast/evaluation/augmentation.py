"""timm's augmentations for fine-tuning: RandAugment on single images, random erasing, mixup and CutMix on batches.

B batch, S image side, K classes.
"""

import importlib
import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cae_fast.config import AugmentConfig, UserError
from cae_fast.data.loader import Augment


def import_eval(module: str) -> Any:
    """A module of timm or torchmetrics. UserError says how to install them."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # the latter where torchvision was built for another torch
        name = module.partition(".")[0]
        raise UserError(f"cae-fast classify needs {name} ({error}): pip install 'cae-fast[eval]'") from error


def make_rand_augment(text: str, image_size: int, mean: list[float]) -> Augment | None:
    """RandAugment in timm's notation with the other settings of timm's create_transform; None for an empty text."""
    if not text:
        return None
    settings = {
        "translate_const": int(image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        return import_eval("timm.data.auto_augment").rand_augment_transform(text, settings)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"augment.rand_augment is {text!r}: write it as rand-m9-mstd0.5-inc1 ({error})") from error


class BatchAugmentation:
    """Random erasing (noise for each pixel), then mixup or CutMix of the batch with itself in reverse order.

    Raises UserError for settings out of range and for mixing batches of an odd size.
    """

    def __init__(self, augment: AugmentConfig, num_classes: int, batch_size: int, device: torch.device):
        for name in ("random_erasing", "mixup", "cutmix", "label_smoothing"):
            value, top = getattr(augment, name), float("inf") if name in ("mixup", "cutmix") else 1.0
            if not 0 <= value <= top:
                raise UserError(f"augment.{name} is {value}: it must be from 0 to {top}")
        self.erase: Any = None
        self.mix: Any = None
        if augment.random_erasing > 0:
            erasing = import_eval("timm.data.random_erasing").RandomErasing
            self.erase = erasing(augment.random_erasing, mode="pixel", device=device)
        if augment.mixup > 0 or augment.cutmix > 0:
            if batch_size % 2:
                raise UserError(f"the micro-batch has {batch_size} images: mixup and CutMix need an even number")
            mixup = import_eval("timm.data.mixup").Mixup
            # Labels are smoothed in the loss, which comes to the same.
            self.mix = mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Normalized images (B, 3, S, S) float32, which may be overwritten, and labels (B,).

        Returns images and targets: labels, or class probabilities (B, K) of a mixed batch. `seed` decides all draws.
        """
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - what timm draws from
        torch.manual_seed(seed)
        if self.erase is not None:
            images = self.erase(images)
        return (images, labels) if self.mix is None else self.mix(images, labels)
