"""Discrete VAE: an image as a grid of codes, 8 times smaller, and back.

The small size is that of the original CAE code: three 4x4 convolutions of stride 2 with ReLU, residual blocks, a 1x1
convolution; the decoder mirrors it. Inputs have mean and standard deviation 0.5.

B batch, S image side, G = S / 8, N = G^2 positions, Nm masked, C width, V codes, E code_dim.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.config import TokenizerConfig, UserError
from cae_fast.files import read_weights
from cae_fast.models.codes import masked_codes
from cae_fast.models.quantizers import FiniteScalarQuantizer, GumbelQuantizer, Quantizer, VectorQuantizer

STRIDE = 8
VALUES_PER_CODE = 3 * STRIDE**2
MEAN = STD = 0.5
LAPLACE_EPS = 0.1
SIZES = {"small": (256, 2), "large": (512, 4)}
"""Width and residual blocks."""
CODE_DIMS = {"gumbel": 512, "vq": 32}
LOSSES = ("logit_laplace", "squared_error")


class DvaeOutput(NamedTuple):
    """Float32 scalars of one batch, and its codes."""

    total: Tensor
    """Loss to minimize, per value of the image."""
    squared_error: Tensor
    """Mean squared error of pixels in [0, 1]."""
    kl: Tensor
    diversity: Tensor
    commitment: Tensor
    codes: Tensor
    """int64 (B, N): what `encode` gives."""


def resolve_tokenizer(config: TokenizerConfig) -> TokenizerConfig:
    """The configuration with the fields left empty filled in. Raises UserError for values that make no tokenizer."""
    if config.size not in SIZES:
        raise UserError(f"tokenizer.size is {config.size!r}: set one of {', '.join(SIZES)}")
    width, num_blocks = SIZES[config.size]
    width = width if config.width is None else config.width
    num_blocks = num_blocks if config.num_blocks is None else config.num_blocks

    if config.image_size < STRIDE or config.image_size % STRIDE:
        raise UserError(f"tokenizer.image_size is {config.image_size}: it must be a multiple of {STRIDE}")
    if width < 1 or num_blocks < 0 or config.num_codes < 2:
        raise UserError(
            f"tokenizer.width is {width}, tokenizer.num_blocks {num_blocks}, tokenizer.num_codes {config.num_codes}: "
            "they must be at least 1, 0 and 2"
        )
    if config.loss not in LOSSES:
        raise UserError(f"tokenizer.loss is {config.loss!r}: set one of {', '.join(LOSSES)}")
    _check_schedules(config)
    return replace(config, width=width, num_blocks=num_blocks, code_dim=_code_dim(config))


def _code_dim(config: TokenizerConfig) -> int:
    if config.quantizer == "fsq":
        levels = config.fsq_levels
        if not levels or min(levels) < 3 or math.prod(levels) != config.num_codes:
            raise UserError(
                f"tokenizer.fsq_levels is {levels} and tokenizer.num_codes {config.num_codes}: "
                "the product of the levels, each at least 3, must be the number of codes"
            )
        if config.code_dim not in (None, len(levels)):
            raise UserError(f"tokenizer.code_dim is {config.code_dim}: with fsq leave it empty, it is {len(levels)}")
        return len(levels)
    if config.quantizer not in CODE_DIMS:
        raise UserError(f"tokenizer.quantizer is {config.quantizer!r}: set gumbel, fsq or vq")
    code_dim = CODE_DIMS[config.quantizer] if config.code_dim is None else config.code_dim
    if code_dim < 1:
        raise UserError(f"tokenizer.code_dim is {code_dim}: it must be at least 1")
    return code_dim


def shape_of(config: TokenizerConfig) -> tuple[int, int, int]:
    """width, num_blocks and code_dim of a configuration that resolve_tokenizer filled in."""
    width, num_blocks, code_dim = config.width, config.num_blocks, config.code_dim
    if width is None or num_blocks is None or code_dim is None:
        raise ValueError("this configuration has not been through resolve_tokenizer")
    return width, num_blocks, code_dim


def _check_schedules(config: TokenizerConfig) -> None:
    if len(config.temperature) != 2 or not all(0 < value < math.inf for value in config.temperature):
        raise UserError(f"tokenizer.temperature is {config.temperature}: two numbers above 0, the first and the last")
    for name in ("temperature_steps", "kl_warmup_steps", "kl_weight", "diversity_weight", "commitment_weight"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"tokenizer.{name} is {getattr(config, name)}: it must be a finite number of at least 0")


def cosine_ramp(step: int, steps: int, first: float, last: float) -> float:
    """Half a cosine from `first` at step 0 to `last` at `steps` and after (arXiv 2102.12092, appendix A.2)."""
    progress = min(1.0, step / steps) if steps else 1.0
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * progress))


class ResidualBlock(nn.Module):
    """x + 3x3, ReLU, 3x3, ReLU, 1x1."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def make_encoder(width: int, num_blocks: int) -> nn.Sequential:
    """Normalized images (B, 3, S, S) -> features (B, C, G, G)."""
    down: list[nn.Module] = []
    for channels in (3, width, width):
        down += [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*down, *(ResidualBlock(width) for _ in range(num_blocks)))


def make_decoder(code_dim: int, width: int, num_blocks: int, out_channels: int) -> nn.Sequential:
    """Vectors (B, E, G, G) -> (B, out_channels, S, S)."""
    up: list[nn.Module] = []
    for _ in range(3):
        up += [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.ReLU()]
    blocks = (ResidualBlock(width) for _ in range(num_blocks))
    return nn.Sequential(nn.Conv2d(code_dim, width, 1), *blocks, *up, nn.Conv2d(width, out_channels, 1))


def he_initialize(modules: list[nn.Module]) -> None:
    """Keep the signal's size through ReLUs (arXiv 1502.01852); torch's default loses it, and the codes collapse."""
    for module in modules:
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            fan_in = module.in_channels * math.prod(module.kernel_size)
            if isinstance(module, nn.ConvTranspose2d):
                fan_in //= math.prod(module.stride)  # an output pixel sees a quarter of the kernel
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
            assert module.bias is not None
            nn.init.zeros_(module.bias)


class DiscreteVAE(nn.Module):
    """Encoder, quantizer and decoder; `config` as resolve_tokenizer gives it."""

    downsampling = STRIDE

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        width, num_blocks, code_dim = shape_of(config)
        self.config, self.num_codes = config, config.num_codes
        self.quantizer = make_quantizer(config, code_dim)
        self.encoder = make_encoder(width, num_blocks)
        self.head = nn.Linear(width, self.quantizer.in_dim)
        out_channels = 6 if config.loss == "logit_laplace" else 3
        self.decoder = make_decoder(code_dim, width, num_blocks, out_channels)
        he_initialize([*self.encoder.modules(), *self.decoder[:-1].modules()])

    def forward(self, images: Tensor, temperature: float, kl_weight: float) -> DvaeOutput:
        """Losses of uint8 images (B, 3, S, S)."""
        grid = images.shape[-1] // STRIDE
        inputs = self.head(self.features(images).flatten(2).mT).float()  # (B, N, in_dim)
        quantized = self.quantizer(inputs, temperature)
        output = self._decode(quantized.vectors.unflatten(1, (grid, grid)))  # (B, 3 or 6, S, S)

        pixels = images.float() / 255  # (B, 3, S, S)
        if self.config.loss == "logit_laplace":
            loss = logit_laplace_loss(output, pixels)
        else:
            loss = F.mse_loss(output, (pixels - MEAN) / STD)
        weighted = kl_weight * quantized.kl + self.config.diversity_weight * quantized.diversity
        total = loss + weighted / VALUES_PER_CODE + quantized.commitment

        return DvaeOutput(
            total=total,
            squared_error=F.mse_loss(self._pixels(output.detach()), pixels),
            kl=quantized.kl.detach(),
            diversity=quantized.diversity.detach(),
            commitment=quantized.commitment.detach(),
            codes=quantized.codes,
        )

    def features(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S) -> (B, C, G, G) in the weights' type. Raises ValueError for an unfit side."""
        if images.shape[-1] % STRIDE or images.shape[-2] % STRIDE:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels: the sides must be multiples of {STRIDE}")
        normalized = ((images.float() / 255 - MEAN) / STD).to(self.head.weight.dtype)
        if normalized.is_cuda:
            normalized = normalized.contiguous(memory_format=torch.channels_last)  # all that follows then is, too
        return self.encoder(normalized)

    @torch.no_grad()
    def encode(self, token_images: Tensor, masked_ids: Tensor) -> Tensor:
        """Codes int64 (B, Nm) of uint8 images (B, 3, S, S) at the positions masked_ids (B, Nm), row by row."""
        features = self.features(token_images)
        if isinstance(self.quantizer, GumbelQuantizer):
            return masked_codes(features, self.head.weight, self.head.bias, masked_ids)
        rows = features.flatten(2).mT  # (B, N, C)
        rows = rows.gather(1, masked_ids[..., None].expand(-1, -1, rows.shape[-1]))  # (B, Nm, C)
        return self.quantizer.codes(self.head(rows).float())

    def code_grid(self, images: Tensor) -> Tensor:
        """All codes of uint8 images (B, 3, S, S): int64 (B, G, G)."""
        height, width = images.shape[-2] // STRIDE, images.shape[-1] // STRIDE
        ids = torch.arange(height * width, device=images.device).expand(len(images), -1)  # (B, N)
        return self.encode(images, ids).unflatten(1, (height, width))

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, G, G) -> images in [0, 1], float32 (B, 3, S, S)."""
        return self._pixels(self._decode(self.quantizer.vectors(codes)))

    def _decode(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors.movedim(-1, 1).to(self.head.weight.dtype)).float()

    def _pixels(self, output: Tensor) -> Tensor:
        if self.config.loss == "logit_laplace":
            return ((output[:, :3].sigmoid() - LAPLACE_EPS) / (1 - 2 * LAPLACE_EPS)).clamp(0, 1)
        return (output * STD + MEAN).clamp(0, 1)


def logit_laplace_loss(output: Tensor, pixels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats (arXiv 2102.12092, appendix A.3, equation 2).

    `output` (B, 6, S, S): location and logarithm of the scale, of the logit; `pixels` (B, 3, S, S) in [0, 1].
    """
    location, log_scale = output.chunk(2, 1)
    x = LAPLACE_EPS + (1 - 2 * LAPLACE_EPS) * pixels
    return ((x.logit() - location).abs() * (-log_scale).exp() + log_scale + (2 * x * (1 - x)).log()).mean()


def make_quantizer(config: TokenizerConfig, code_dim: int) -> Quantizer:
    if config.quantizer == "fsq":
        return FiniteScalarQuantizer(config.fsq_levels)
    if config.quantizer == "vq":
        return VectorQuantizer(config.num_codes, code_dim, config.commitment_weight)
    return GumbelQuantizer(config.num_codes, code_dim, config.straight_through)


def dvae_flops(config: TokenizerConfig, image_size: int) -> dict[str, int]:
    """Forward pass for one image by parts, matrix products and convolutions, 2 per multiply-add.

    encoder and head are what encoding all positions costs; stem is the encoder's first convolution. The library's
    own work on a vq codebook counts as one matrix of distances.
    """
    width, blocks, code_dim = shape_of(config)
    positions = (image_size // STRIDE) ** 2
    block = 2 * 19 * width**2 * positions
    in_dim = config.num_codes if config.quantizer == "gumbel" else code_dim
    stem = 2 * 48 * width * positions * 16
    # Stride 2 up and down alike: 16 products per pair of channels at each pixel of the smaller image.
    halvings = 2 * 16 * width**2 * positions * (4 + 1)
    last = 2 * width * (6 if config.loss == "logit_laplace" else 3) * positions * 64
    return {
        "stem": stem,
        "encoder": stem + halvings + blocks * block,
        "head": 2 * width * in_dim * positions,
        "quantizer": 0 if config.quantizer == "fsq" else 2 * config.num_codes * code_dim * positions,
        "decoder": 2 * code_dim * width * positions
        + blocks * block
        + 2 * 16 * width**2 * positions * (16 + 4 + 1)
        + last,
    }


def training_flops(config: TokenizerConfig) -> int:
    """Forward and backward for one image; the first convolution needs no gradient of its input."""
    parts = dvae_flops(config, config.image_size)
    quantizer = parts["quantizer"] * (3 if config.quantizer == "gumbel" else 1)
    return 3 * (parts["encoder"] + parts["head"] + parts["decoder"]) - parts["stem"] + quantizer


def dvae_facts(config: TokenizerConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a tokenizer file: its kind and settings, and `facts` about its training."""
    return {"kind": "dvae", **asdict(config), **facts}


def load_dvae(path: str) -> DiscreteVAE:
    """The tokenizer of a file that `cae-fast train-tokenizer` wrote: float32, on the CPU, in evaluation mode, frozen.

    Raises UserError for a file that is missing or something else, and where its quantizer needs a package.
    """
    facts, state = read_weights(Path(path))
    if facts.get("kind") != "dvae":
        raise UserError(f"{path} is not a tokenizer of cae-fast train-tokenizer: its kind is {facts.get('kind')}")
    names = {item.name for item in fields(TokenizerConfig)}
    model = DiscreteVAE(resolve_tokenizer(TokenizerConfig(**{k: v for k, v in facts.items() if k in names})))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own header: {' '.join(str(error).split())[:300]}") from error
    return model.eval().requires_grad_(False)
