"""A pretraining step as users of the original code run it, rendered in plain PyTorch for comparison.

What makes it the original's: a second copy of the encoder for the alignment targets, brought up to date by copying
all weights every step; patches chosen with boolean masks; attention as two batched products and a softmax; drop path,
LayerScale, residual sum and LayerNorm one by one; float16 autocast with a gradient scaler, which leaves the residual
stream, LayerNorm and softmax in float32; the tokenizer in its own float16 (weights cast at every call), its last layer
in float32 at every position; torch's AdamW; three `.item()` and a synchronization per step.

Parameters have the names of `cae_fast.models.cae.ContextAutoencoder`, so that its weights can be loaded.

B batch, N patches, Nv visible, Nm masked, n tokens, D width, H heads, V codes, T side of the tokenizer's images.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae_fast.config import OptimConfig
from cae_fast.models.cae import ContextAutoencoder, ModelShape
from cae_fast.models.dalle import DalleEncoder, ResidualBlock, map_pixels
from cae_fast.models.vit import NORM_EPS, drop_path_rates
from cae_fast.training.optim import decays


class DropPath(nn.Module):
    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(B, H, n, C) each. Returns (B, n, H * C). CUDA's autocast makes the softmax in float32, as here."""
    scores = (query * scale) @ key.transpose(-2, -1)  # (B, H, n, n)
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        inner = width // heads * heads
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        self.proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(query, key, value, self.scale))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        inner = width // heads * heads
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        self.proj = nn.Linear(inner, width)

    def split(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, n, C)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = self.split(query, self.q.weight, self.q_bias)
        k, v = self.split(key, self.k.weight, None), self.split(value, self.v.weight, self.v_bias)
        return self.proj(attend(q, k, v, self.scale))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, rate: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, NORM_EPS), nn.LayerNorm(width, NORM_EPS)
        self.attn, self.mlp, self.drop_path = SelfAttention(width, heads), Mlp(width), DropPath(rate)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class RegressorBlock(nn.Module):
    def __init__(self, width: int, heads: int, rate: float):
        super().__init__()
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(width, NORM_EPS) for _ in range(4))
        self.attn, self.mlp, self.drop_path = CrossAttention(width, heads), Mlp(width), DropPath(rate)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, both: Tensor, masked_position: Tensor, position: Tensor) -> Tensor:
        query, key = self.norm_q(x + masked_position), self.norm_k(both + position)
        x = x + self.drop_path(self.gamma_1 * self.attn(query, key, self.norm_v(both)))
        x = self.norm2(x)
        return x + self.drop_path(self.gamma_2 * self.mlp(x))


class Encoder(nn.Module):
    pos_embed: Tensor

    def __init__(self, shape: ModelShape):
        super().__init__()
        width, patches = shape.embed_dim, (shape.image_size // shape.patch_size) ** 2
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, shape.patch_size, shape.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", torch.zeros(1, patches + 1, width))
        rates = drop_path_rates(shape.drop_path_rate, shape.depth)
        self.blocks = nn.ModuleList(Block(width, shape.num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, NORM_EPS)

    def forward(self, images: Tensor, skipped: Tensor) -> Tensor:
        """images: (B, 3, S, S); skipped: boolean (B, N), the patches that are left out. Returns (B, n + 1, D)."""
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)  # (B, N, D)
        batch, _, width = patches.shape

        chosen = patches[~skipped].reshape(batch, -1, width)
        tokens = torch.cat((self.cls_token.expand(batch, -1, -1), chosen), 1)
        position = self.pos_embed.expand(batch, -1, -1)
        chosen_position = position[:, 1:][~skipped].reshape(batch, -1, width)
        x = tokens + torch.cat((position[:, :1], chosen_position), 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Regressor(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        rates = drop_path_rates(shape.drop_path_rate, shape.regressor_depth)
        width, heads = shape.decoder_embed_dim, shape.decoder_num_heads
        self.blocks = nn.ModuleList(RegressorBlock(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, NORM_EPS)

    def forward(self, masked: Tensor, visible: Tensor, masked_position: Tensor, visible_position: Tensor) -> Tensor:
        position = torch.cat((visible_position, masked_position), 1)
        for block in self.blocks:
            masked = block(masked, torch.cat((visible, masked), 1), masked_position, position)
        return self.norm(masked)


class Decoder(nn.Module):
    def __init__(self, shape: ModelShape, num_codes: int):
        super().__init__()
        rates = drop_path_rates(shape.drop_path_rate, shape.decoder_depth)
        width, heads = shape.decoder_embed_dim, shape.decoder_num_heads
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm, self.head = nn.LayerNorm(width, NORM_EPS), nn.Linear(width, num_codes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class OriginalCAE(nn.Module):
    """For one width of encoder, regressor and decoder."""

    regressor_pos_embed: Tensor

    def __init__(self, shape: ModelShape, num_codes: int):
        super().__init__()
        if shape.decoder_embed_dim != shape.embed_dim or not shape.decoder_depth:
            raise ValueError("the original step is rendered for equal widths and a decoder only")
        self.encoder, self.alignment_encoder = Encoder(shape), Encoder(shape)
        self.alignment_encoder.requires_grad_(False)
        width = shape.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("regressor_pos_embed", torch.zeros_like(self.encoder.pos_embed))
        self.regressor, self.decoder = Regressor(shape), Decoder(shape, num_codes)

    @classmethod
    def of(cls, model: ContextAutoencoder) -> "OriginalCAE":
        """With the weights of ours, in float32."""
        original = cls(model.shape, model.decoder.head.out_features)
        state = {name: tensor.float() for name, tensor in model.state_dict().items()}
        copy = {f"alignment_{name}": tensor for name, tensor in state.items() if name.startswith("encoder.")}
        original.load_state_dict(state | copy)
        return original.train()

    @torch.no_grad()
    def update_alignment_encoder(self) -> None:
        for own, copy in zip(self.encoder.parameters(), self.alignment_encoder.parameters(), strict=True):
            copy.data.copy_(own.data)

    def forward(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images: (B, 3, S, S); masked: boolean (B, N). Returns logits (B * Nm, V), predicted and true latents."""
        visible = self.encoder(images, masked)[:, 1:]  # (B, Nv, D)
        with torch.no_grad():
            self.update_alignment_encoder()
            target = self.alignment_encoder(images, ~masked)[:, 1:]  # (B, Nm, D)

        batch, _, width = visible.shape
        position = self.regressor_pos_embed.expand(batch, -1, -1)[:, 1:]
        masked_position = position[masked].reshape(batch, -1, width)
        visible_position = position[~masked].reshape(batch, -1, width)
        queries = self.mask_token.expand(batch, masked_position.shape[1], -1)
        latents = self.regressor(queries, visible, masked_position, visible_position)
        logits = self.decoder(latents + masked_position)
        return logits.flatten(0, 1), latents, target


class OriginalTokenizer(nn.Module):
    """DALL-E's encoder as OpenAI's package runs it: NCHW, the branch scaled in the forward pass, all logits."""

    def __init__(self, encoder: DalleEncoder):
        super().__init__()
        blocks = [block for group in encoder.groups for block in group]
        self.gain, self.num_groups = 1 / len(blocks) ** 2, len(encoder.groups)
        self.encoder = DalleEncoder(encoder.input.out_channels, len(encoder.groups[0]), encoder.output.out_channels)
        self.encoder.load_state_dict({name: tensor.float() for name, tensor in encoder.state_dict().items()})
        for block in (block for group in self.encoder.groups for block in group):
            for parameter in block.conv4.parameters():
                parameter.data /= self.gain
        self.requires_grad_(False)

    @staticmethod
    def convolve(layer: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return F.conv2d(x.to(dtype), layer.weight.to(dtype), bias, padding=layer.padding)

    def branch(self, block: ResidualBlock, x: Tensor, dtype: torch.dtype) -> Tensor:
        identity = x if isinstance(block.shortcut, nn.Identity) else self.convolve(block.shortcut, x, dtype)
        for layer in (block.conv1, block.conv2, block.conv3, block.conv4):
            x = self.convolve(layer, F.relu(x), dtype)
        return identity + self.gain * x

    @torch.no_grad()
    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """images: float32 (B, 3, T, T), mapped. Returns codes (B, N) int64."""
        x = self.convolve(self.encoder.input, images, dtype)
        for i, group in enumerate(self.encoder.groups):
            x = x if i == 0 else F.max_pool2d(x, 2)
            for block in group:
                x = self.branch(block, x, dtype)
        return self.convolve(self.encoder.output, F.relu(x), torch.float32).argmax(1).flatten(1)


class OriginalStep:
    """Model, optimizer, scaler and tokenizer; calling it takes one optimizer step. On a CPU all is float32."""

    def __init__(
        self, model: ContextAutoencoder, encoder: DalleEncoder | None, optim: OptimConfig, device: torch.device
    ):
        self.model = OriginalCAE.of(model).to(device)
        self.tokenizer = None if encoder is None else OriginalTokenizer(encoder).to(device)
        self.device, self.half, self.clip = device, device.type == "cuda", optim.clip_grad_norm
        self.alignment_weight = model.alignment_weight
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in named if decays(name, p)], "weight_decay": optim.weight_decay},
            {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)

    def labels(self, token_images: Tensor, masked: Tensor) -> Tensor:
        """uint8 (B, 3, T, T) and a boolean mask (B, N). Returns the codes of the masked patches (B * Nm,)."""
        assert self.tokenizer is not None, "made without a tokenizer"
        with torch.profiler.record_function("tokenizer"):
            dtype = torch.float16 if self.half else torch.float32
            return self.tokenizer(map_pixels(token_images), dtype)[masked]

    def losses(self, images: Tensor, masked: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and alignment loss (not weighted) of normalized images (B, 3, S, S)."""
        with torch.autocast(self.device.type, torch.float16) if self.half else nullcontext():
            logits, latents, target = self.model(images, masked)
            main = F.cross_entropy(logits.float(), labels)
            return main, F.mse_loss(latents.float(), target.detach().float())

    def __call__(self, images: Tensor, masked: Tensor, labels: Tensor, lr: float) -> dict[str, float | Tensor]:
        """images: normalized float32 (B, 3, S, S); masked: boolean (B, N); labels: (B * Nm,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        main, alignment = self.losses(images, masked, labels)
        alignment = self.alignment_weight * alignment
        loss = main + alignment
        value, main_value, alignment_value = loss.item(), main.item(), alignment.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the original step's loss is {value}")

        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        with torch.profiler.record_function("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {"loss": value, "loss_main": main_value, "loss_align": alignment_value, "grad_norm": norm}


def boolean_mask(masked_ids: Tensor, num_patches: int) -> Tensor:
    """(B, Nm) -> boolean (B, N), True where a patch is masked."""
    mask = torch.zeros(len(masked_ids), num_patches, dtype=torch.bool, device=masked_ids.device)
    return mask.scatter_(1, masked_ids, True)
