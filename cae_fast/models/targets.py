"""What the decoder is asked to predict at the masked patches: pixels, or what a frozen model makes of them.

B batch, N patches, Nm masked, S image side, T side of the tokenizer's view, G side of the grid of patches,
P = 3 p^2 values of a patch (row, column, channel).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cae_fast.config import PretrainConfig, TargetConfig, UserError
from cae_fast.files import read_weights
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.dalle import dalle_tokenizer
from cae_fast.models.dvae import DiscreteVAE, dvae_flops, load_dvae
from cae_fast.models.teacher import TeacherFeatures, load_teacher

ENCODED_AT_ONCE = 64
"""Images that a frozen model reads at once. On CUDA it has a stream of its own, whose memory nothing else can use:
DALL-E's encoder would hold 5.3 GB of activations for 256 images of 112 x 112 pixels."""

Encode = Callable[[Tensor, Tensor], Tensor]
"""A view of the images and masked_ids (B, Nm) -> targets: codes (B, Nm), or values (B, Nm, P or D)."""


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images (B, 3, S, S) as patches (B, N, P), row by row; within a patch: row, column, channel."""
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * channels)


class PixelTargets:
    """RGB targets (paper, Table 8), optionally with each patch scaled to mean 0 and variance 1."""

    def __init__(self, patch_size: int, normalize: bool):
        self.patch_size, self.normalize, self.output_dim = patch_size, normalize, 3 * patch_size**2

    def token_size(self, grid: int) -> None:
        """`encode` reads the encoder's own view, none of another size."""

    def encode_flops(self, grid: int, num_masked: int) -> int:
        return 0

    def encode(self, images: Tensor, masked_ids: Tensor) -> Tensor:
        """Normalized images (B, 3, S, S) and masked_ids (B, Nm) -> float32 targets (B, Nm, P)."""
        patches = self.masked_patches(images, masked_ids)
        if not self.normalize:
            return patches
        mean, std = self.patch_statistics(patches)
        return (patches - mean) / std

    def decode(self, prediction: Tensor, images: Tensor, masked_ids: Tensor) -> Tensor:
        """Predicted targets (B, Nm, P) as pixels of the normalized image; per-patch statistics are the true ones."""
        if not self.normalize:
            return prediction
        mean, std = self.patch_statistics(self.masked_patches(images, masked_ids))
        return prediction * std + mean

    def masked_patches(self, images: Tensor, masked_ids: Tensor) -> Tensor:
        patches = patchify(images.float(), self.patch_size)  # (B, N, P)
        return patches.gather(1, masked_ids[..., None].expand(-1, -1, patches.shape[-1]))  # (B, Nm, P)

    def patch_statistics(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        return mean, (variance + 1e-6).sqrt()


class Tokenizer(Protocol):
    """A frozen tokenizer: its own view of the crop in, codes out. Files carry its `kind` (see `load_tokenizer`)."""

    num_codes: int

    @property
    def has_decoder(self) -> bool:
        """Whether `decode` works."""

    def token_size(self, grid: int) -> int:
        """Side T in pixels of the view that `encode` reads, for grid x grid codes."""

    def encode_flops(self, grid: int, num_masked: int) -> int:
        """Of `encode` for one image: matrix products and convolutions, 2 per multiply-add."""

    def encode(self, token_images: Tensor, masked_ids: Tensor) -> Tensor:
        """uint8 (B, 3, T, T) and masked_ids (B, Nm), counted row by row -> codes (B, Nm) int64."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, G, G) int64 -> pictures (B, 3, T, T) float32 in [0, 1]."""


class DvaeTokenizer:
    """A d-VAE of ours, frozen: its encoder in float16 on CUDA (float32 elsewhere), channels_last; the rest float32."""

    has_decoder = True

    def __init__(self, model: DiscreteVAE, device: torch.device | str = "cpu"):
        self.model, self.num_codes = model.to(device), model.num_codes
        if torch.device(device).type == "cuda":
            model.encoder.to(torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
            model.head.half()

    def token_size(self, grid: int) -> int:
        return self.model.downsampling * grid

    def encode_flops(self, grid: int, num_masked: int) -> int:
        parts = dvae_flops(self.model.config, self.token_size(grid))
        per_grid = parts["head"] + (parts["quantizer"] if self.model.config.quantizer == "vq" else 0)
        return parts["encoder"] + per_grid * num_masked // grid**2

    def encode(self, token_images: Tensor, masked_ids: Tensor) -> Tensor:
        return self.model.encode(token_images, masked_ids)

    def decode(self, codes: Tensor) -> Tensor:
        return self.model.decode_codes(codes)


Targets = PixelTargets | TeacherFeatures | Tokenizer


def make_targets(target: TargetConfig, image_size: int, patch_size: int, device: torch.device) -> Targets:
    """What the settings ask for; UserError where they contradict each other or the file does not fit."""
    kinds = ("pixels", "normalized_pixels", "codes", "features")
    if target.kind not in kinds:
        raise UserError(f"target.kind is {target.kind!r}: set one of {', '.join(kinds)}")
    if not 0 <= target.alignment_weight < math.inf:
        raise UserError(f"target.alignment_weight is {target.alignment_weight}: it must be finite and at least 0")

    if target.kind in ("pixels", "normalized_pixels"):
        if target.tokenizer:
            raise UserError(
                f"target.tokenizer is {target.tokenizer}, but target.kind {target.kind}: set target.kind=codes"
            )
        if target.compile:
            raise UserError(f"target.compile is true, but target.kind {target.kind} runs no model: leave it false")
        return PixelTargets(patch_size, target.kind == "normalized_pixels")

    # Codes and features are what a frozen model in a file makes of the images.
    if not target.tokenizer:
        source = "`cae-fast convert dalle` or `cae-fast train-tokenizer` writes"
        if target.kind == "features":
            source = "holds a vision transformer (a run's encoder.safetensors)"
        raise UserError(f"target.kind is {target.kind}, but target.tokenizer is empty: set it to a file that {source}")
    if target.kind == "features":
        return load_teacher(target.tokenizer, image_size, patch_size, device)
    return load_tokenizer(target.tokenizer, device)


def make_encode(targets: Targets, compiled: bool) -> Encode:
    """`targets.encode` as training calls it: a frozen model compiled if asked, and on equal parts of a batch."""
    if isinstance(targets, PixelTargets):
        return targets.encode
    encode = torch.compile(targets.encode) if compiled else targets.encode

    def encode_in_parts(images: Tensor, masked_ids: Tensor) -> Tensor:
        parts = -(-len(images) // ENCODED_AT_ONCE)
        encoded = [encode(*part) for part in zip(images.chunk(parts), masked_ids.chunk(parts), strict=True)]
        return encoded[0] if parts == 1 else torch.cat(encoded)

    return encode_in_parts


def prediction_dim(targets: Targets) -> int:
    """Numbers that the decoder predicts for a patch."""
    return targets.output_dim if isinstance(targets, PixelTargets | TeacherFeatures) else targets.num_codes


def make_model(config: PretrainConfig, targets: Targets) -> ContextAutoencoder:
    """The model with new weights that predicts these targets."""
    return ContextAutoencoder(
        config.model,
        prediction_dim(targets),
        predict_codes=config.target.kind == "codes",
        alignment_weight=config.target.alignment_weight,
        cosine_loss=config.target.kind == "features",
    )


def load_tokenizer(path: str, device: torch.device | str = "cpu") -> Tokenizer:
    """The frozen tokenizer in a file of ours, by the `kind` in its header. UserError where it is none."""
    facts, state = read_tokenizer_file(path)
    try:
        if facts["kind"] == "dalle":
            return dalle_tokenizer(state, device)
        if facts["kind"] == "dvae":
            return DvaeTokenizer(load_dvae(path), device)
    except (KeyError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(f"target.tokenizer is {path}: its weights do not make a tokenizer ({text})") from error
    raise UserError(f"target.tokenizer is {path}: this version knows no tokenizer of kind {facts['kind']!r}")


def read_tokenizer_file(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the header says (at least `kind`) and the tensors. UserError names what is wrong with the file."""
    try:
        facts, state = read_weights(Path(path))
    except UserError as error:
        raise UserError(f"target.tokenizer is {error}") from error
    if "kind" not in facts:
        raise UserError(
            f"target.tokenizer is {path}: not a tokenizer; `cae-fast convert dalle` and `cae-fast train-tokenizer` "
            "write them"
        )
    return facts, state
