"""DALL-E's discrete VAE as a frozen tokenizer: image -> codes on a grid 8 times smaller, and codes -> image.

Ramesh et al., "Zero-Shot Text-to-Image Generation" (arXiv 2102.12092), appendix A, in the layout of OpenAI's dall_e
package. The factor 1 / layers^2 of each block's branch is part of the weights here (exact for the published sizes).

B batch, S image side, G = S / 8 side of the grid, N = G^2 positions, Nm masked, C channels, V codes.
"""

import re
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.config import UserError
from cae_fast.models.codes import masked_codes
from cae_kernels import bias_relu, bias_residual_relu, conv2d_and_bias

NUM_GROUPS = 4
STRIDE = 8
LAPLACE_EPS = 0.1
"""Pixels in [0, 1] are mapped to [eps, 1 - eps] (arXiv 2102.12092, appendix A.3)."""


Terms = tuple[Tensor, Tensor | None, Tensor | None]
"""Output of a convolution, its bias where that is not in it yet, residual."""


class ResidualBlock(nn.Module):
    """shortcut(x) + four convolutions with a ReLU before each; hidden width: a quarter of the output.

    The sum is left to the next block, which needs its ReLU too: one pass makes both.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_sizes: tuple[int, int, int, int]):
        super().__init__()
        hidden = out_channels // 4
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        widths = pairwise((in_channels, hidden, hidden, hidden, out_channels))
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Conv2d(before, after, kernel, padding=kernel // 2)
            for (before, after), kernel in zip(widths, kernel_sizes, strict=True)
        )

    def branch(self, hidden: Tensor) -> Tensor:
        """ReLU of x (B, C, H, W) -> what the last convolution reads."""
        for conv in (self.conv1, self.conv2, self.conv3):
            hidden = bias_relu(*_convolve(conv, hidden))
        return hidden

    def forward(self, x: Tensor, hidden: Tensor) -> Terms:
        """x (B, C, H, W) and its branch -> what bias_residual_relu adds up."""
        out, bias = _convolve(self.conv4, hidden)
        if isinstance(self.shortcut, nn.Conv2d):
            x, shift = _convolve(self.shortcut, x)
            if bias is not None and shift is not None:
                bias = bias + shift
        return out, bias, x


def _convolve(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return conv2d_and_bias(x, conv.weight, conv.bias, conv.padding)


def _groups(widths: list[int], num_blocks: int, kernel_sizes: tuple[int, int, int, int]) -> nn.ModuleList:
    """One group for each step from a width to the next; the first block of a group changes the width."""
    return nn.ModuleList(
        nn.Sequential(
            *(ResidualBlock(before if i == 0 else after, after, kernel_sizes) for i in range(num_blocks)),
        )
        for before, after in pairwise(widths)
    )


def _blocks(groups: nn.ModuleList) -> list[tuple[Any, bool]]:
    """All residual blocks, and whether the size of the grid changes before them."""
    return [(block, i > 0 and j == 0) for i, group in enumerate(groups) for j, block in enumerate(group.children())]


class DalleEncoder(nn.Module):
    """7x7 convolution, 4 groups of residual blocks of 1, 2, 4, 8 times `width` with max-pooling between, ReLU, 1x1."""

    def __init__(self, width: int = 256, num_blocks: int = 2, num_codes: int = 8192):
        super().__init__()
        self.input = nn.Conv2d(3, width, 7, padding=3)
        self.groups = _groups([width, width, 2 * width, 4 * width, 8 * width], num_blocks, (3, 3, 3, 1))
        self.output = nn.Conv2d(8 * width, num_codes, 1)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads. x: (B, 3, S, S) in [0.1, 0.9]. Returns (B, 8 width, G, G)."""
        out, bias = _convolve(self.input, x)
        shortcut: Tensor | None = None
        # ReLU commutes with max-pooling: sum, pooling and ReLU are one pass, which stores nothing of full size. The
        # names are used again, or deleted, so that what has been read is freed before anything new is made.
        for block, pool in _blocks(self.groups):
            shortcut, hidden = bias_residual_relu(out, bias, shortcut, pool)
            hidden = block.branch(hidden)
            out, bias, shortcut = block(shortcut, hidden)
            del hidden
        return bias_relu(out, bias, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, V, G, G) of mapped pixels (B, 3, S, S)."""
        return self.output(self.features(x))


class DalleDecoder(nn.Module):
    """Codes -> the location parameter of each pixel's logit-Laplace distribution."""

    def __init__(self, width: int = 256, input_width: int = 128, num_blocks: int = 2, num_codes: int = 8192):
        super().__init__()
        self.input = nn.Conv2d(num_codes, input_width, 1)
        self.groups = _groups([input_width, 8 * width, 4 * width, 2 * width, width], num_blocks, (1, 3, 3, 3))
        self.output = nn.Conv2d(width, 6, 1)

    def forward(self, codes: Tensor) -> Tensor:
        """codes: (B, G, G) int64. Returns (B, 6, S, S): location and log-scale of three channels."""
        assert self.input.bias is not None
        # A 1x1 convolution of one-hot vectors is a look-up.
        x = F.embedding(codes, self.input.weight.flatten(1).T) + self.input.bias  # (B, G, G, input_width)
        terms: Terms = x.permute(0, 3, 1, 2), None, None
        for block, enlarge in _blocks(self.groups):
            x, hidden = bias_residual_relu(*terms)
            if enlarge:
                x, hidden = (F.interpolate(part, scale_factor=2, mode="nearest") for part in (x, hidden))
            terms = block(x, block.branch(hidden))
        return self.output(bias_relu(*terms))


def map_pixels(images: Tensor) -> Tensor:
    """uint8 images to the encoder's float32 input, 0.1 + 0.8 x for x in [0, 1]."""
    return images.float() * ((1 - 2 * LAPLACE_EPS) / 255) + LAPLACE_EPS


class DalleTokenizer:
    """The frozen encoder in float16 on CUDA (float32 elsewhere), channels_last; the decoder in float32, if there."""

    def __init__(
        self,
        encoder: DalleEncoder,
        decoder: DalleDecoder | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        """dtype: of the encoder, None for the default of the device."""
        device = torch.device(device)
        # float16 and not bfloat16: with 8 bits less of fraction, many more pixels would get another code.
        self.dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        encoder = encoder.eval().requires_grad_(False)
        self.encoder = encoder.to(device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.decoder = None if decoder is None else decoder.eval().requires_grad_(False).to(device)
        self.num_codes = encoder.output.out_channels

    @property
    def has_decoder(self) -> bool:
        return self.decoder is not None

    def token_size(self, grid: int) -> int:
        """Side in pixels of the view that `encode` reads, for a grid of grid x grid codes."""
        return STRIDE * grid

    def encode_flops(self, grid: int, num_masked: int) -> int:
        """Of `encode` for one image: convolutions only, 2 per multiply-add."""
        encoder, size = self.encoder, self.token_size(grid)
        total = 2 * encoder.input.weight.numel() * size**2 + 2 * encoder.output.weight.numel() * num_masked
        for level, group in enumerate(encoder.groups):
            weights = sum(part.weight.numel() for part in group.modules() if isinstance(part, nn.Conv2d))
            total += 2 * weights * (size >> level) ** 2
        return total

    @torch.no_grad()
    def encode(self, token_images: Tensor, masked_ids: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) and masked_ids (B, Nm) int64, counted row by row -> codes (B, Nm) int64."""
        pixels = map_pixels(token_images).to(self.dtype, memory_format=torch.channels_last)
        features = self.encoder.features(pixels)  # (B, C, G, G)
        output = self.encoder.output
        assert output.bias is not None
        return masked_codes(features, output.weight.flatten(1), output.bias, masked_ids)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, G, G) int64 -> pictures (B, 3, S, S) float32 in [0, 1]. Needs a decoder."""
        assert self.decoder is not None, "this tokenizer has no decoder"
        location = self.decoder(codes)[:, :3].sigmoid()  # (B, 3, S, S)
        return ((location - LAPLACE_EPS) / (1 - 2 * LAPLACE_EPS)).clamp(0, 1)


def dalle_encoder(state: dict[str, Tensor]) -> DalleEncoder:
    """The encoder with these weights; its sizes are theirs. Raises KeyError or RuntimeError when they do not fit."""
    encoder = DalleEncoder(state["input.weight"].shape[0], _num_blocks(state), state["output.weight"].shape[0])
    encoder.load_state_dict(state)
    return encoder


def dalle_decoder(state: dict[str, Tensor]) -> DalleDecoder:
    """The decoder with these weights; its sizes are theirs. Raises KeyError or RuntimeError when they do not fit."""
    input_width, num_codes = state["input.weight"].shape[:2]
    decoder = DalleDecoder(state["output.weight"].shape[1], input_width, _num_blocks(state), num_codes)
    decoder.load_state_dict(state)
    return decoder


def _num_blocks(state: dict[str, Tensor]) -> int:
    return sum(re.fullmatch(r"groups\.0\.\d+\.conv1\.weight", name) is not None for name in state)


def dalle_tokenizer(
    state: dict[str, Tensor], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> DalleTokenizer:
    """The tokenizer from tensors `encoder.*` and perhaps `decoder.*`; KeyError or RuntimeError if they do not fit."""
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    decoder = dalle_decoder(parts["decoder"]) if parts["decoder"] else None
    return DalleTokenizer(dalle_encoder(parts["encoder"]), decoder, device, dtype)


_NAMES = (
    (r"blocks\.(input|output)(?:\.conv)?\.", r"\1."),
    (r"blocks\.group_(\d+)\.block_(\d+)\.id_path\.", r"groups.\1.\2.shortcut."),
    (r"blocks\.group_(\d+)\.block_(\d+)\.res_path\.conv_(\d+)\.", r"groups.\1.\2.conv\3."),
)


def from_openai(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of OpenAI's dall_e package as ours, float32, the blocks' factor folded in.

    Raises UserError for a name that neither its encoder nor its decoder has.
    """
    renamed = {_our_name(name): tensor.detach().float() for name, tensor in state.items()}
    gain = 1.0 / (NUM_GROUPS * _num_blocks(renamed)) ** 2 if _num_blocks(renamed) else 1.0
    return {name: tensor * gain if ".conv4." in name else tensor for name, tensor in renamed.items()}


def _our_name(name: str) -> str:
    for pattern, ours in _NAMES:
        match = re.fullmatch(pattern + "([wb])", name)
        if match:
            path = re.sub(
                r"groups\.(\d+)\.(\d+)", lambda m: f"groups.{int(m[1]) - 1}.{int(m[2]) - 1}", match.expand(ours)
            )
            return path + {"w": "weight", "b": "bias"}[match.groups()[-1]]
    raise UserError(f"{name!r} is no weight of DALL-E's encoder or decoder")
