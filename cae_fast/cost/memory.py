"""Bytes of a training step: what each ZeRO stage keeps, what the fused ops save for backward, what they move.

Counted from the ops: their `save_for_backward`, and inputs read once and outputs written once (kernels/README.md).

B batch, N patches, Nv visible, Nm masked, n tokens, D encoder width, R regressor and decoder width, I and J the heads'
widths together in those two (D and R where heads divide them), V codes, P values of a patch, e bytes of a number.
"""

from dataclasses import dataclass
from typing import NamedTuple

from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.dalle import DalleTokenizer
from cae_fast.models.targets import DvaeTokenizer, PixelTargets, Targets
from cae_fast.models.teacher import TeacherFeatures

STATISTIC = 4
"""Bytes of a float32 statistic of a row: mean and 1 / standard deviation for each LayerNorm."""
WORKING_ROWS = 10
"""A block without gradient holds, at its widest, its two inputs, two sums, 4 D of hidden values, a branch and the
tokens it began with; the backward pass of a block holds no more beside what it frees."""


class Sizes(NamedTuple):
    """The legend's sizes for one model."""

    visible: int
    masked: int
    width: int
    inner: int
    decoder_width: int
    decoder_inner: int
    element: int

    @property
    def patches(self) -> int:
        return self.visible + self.masked


def sizes_of(model: ContextAutoencoder, num_masked: int, element: int) -> Sizes:
    shape = model.shape
    return Sizes(
        visible=model.encoder.grid**2 - num_masked,
        masked=num_masked,
        width=shape.embed_dim,
        inner=shape.embed_dim // shape.num_heads * shape.num_heads,
        decoder_width=shape.decoder_embed_dim,
        decoder_inner=shape.decoder_embed_dim // shape.decoder_num_heads * shape.decoder_num_heads,
        element=element,
    )


@dataclass(frozen=True)
class ModelState:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    """Float32 master weights and Adam's two moments."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def model_state(parameters: int, stage: int, gpus: int, element: int) -> ModelState:
    """What ZeRO divides by the number of GPUs (arXiv 1910.02054, section 5): the optimizer's part from stage 1,
    gradients from 2, weights from 3. In float32 the weights are their own masters until a stage divides them."""

    def share(size: int, first_stage: int) -> int:
        return -(-parameters * size // (gpus if stage >= first_stage else 1))

    optimizer = 8 + (4 if element < 4 or stage else 0)
    return ModelState(share(element, 3), share(element, 2), share(optimizer, 1))


@dataclass(frozen=True)
class Activations:
    """Bytes saved between forward and backward pass: {part: for each image}, and `fixed` for a micro-batch."""

    parts: dict[str, int]
    fixed: int

    @property
    def per_image(self) -> int:
        return sum(self.parts.values())


def activations(model: ContextAutoencoder, num_masked: int, element: int, checkpointing: bool = False) -> Activations:
    """What autograd keeps of one micro-batch, beside weights, buffers and inputs, when every op is its Triton kernel.

    checkpointing: every block of encoder, regressor and decoder keeps its inputs only; `recomputed` is the largest
    block, made again in the backward pass.
    """
    s, shape = sizes_of(model, num_masked, element), model.shape
    width, m, e = s.decoder_width, s.masked, element
    align, codes = model.alignment_weight > 0, model.predict_codes
    projected = shape.decoder_embed_dim != shape.embed_dim

    encoder = _blocks(shape.depth, s.visible + 1, s.width, s.inner, element=e, checkpointing=checkpointing)
    decoder = _blocks(shape.decoder_depth, m, width, s.decoder_inner, element=e, checkpointing=checkpointing)
    parts = {
        "patches": s.patches * 3 * shape.patch_size**2 * e,
        "encoder": encoder + (s.visible + 1) * s.width * e,
        "regressor": _regressor(s, shape.regressor_depth, checkpointing),
        "decoder": decoder,
    }
    if projected:  # the Linear's output, its LayerNorm's, and two statistics
        parts["encoder"] += (s.visible + 1) * (2 * width * e + 2 * STATISTIC)

    # Latents are kept by the alignment, with their targets, or by the head where no decoder stands between.
    latents_kept = align or (shape.decoder_depth == 0 and not codes)
    parts["losses"] = m * width * e * latents_kept
    if align:
        parts["losses"] += (m * width if projected else (m + 1) * s.width) * e
    parts["losses"] += _prediction(model, m, e, features_shared=shape.decoder_depth == 0)

    if checkpointing:
        whole, inputs = (_block(s.visible + 1, s.width, s.inner, e, checkpointing=on) for on in (False, True))
        parts["recomputed"] = max(whole - inputs, _regressor_block(s, False) - _regressor_block(s, True))
    fixed = (width + 1) * model.decoder.head.out_features * e if codes else 0  # the head's gradients
    return Activations(parts, fixed)


def _block(tokens: int, width: int, inner: int, element: int, checkpointing: bool) -> int:
    """Inputs, normalized and not; unless checkpointed also q, k, v, the heads' output, both branches, the sum between
    them and its norm, and the MLP's hidden values before and after GELU."""
    if checkpointing:
        return 2 * tokens * width * element
    return tokens * ((14 * width + 4 * inner) * element + 4 * STATISTIC)


def _blocks(depth: int, tokens: int, width: int, inner: int, element: int, checkpointing: bool) -> int:
    """All blocks, and the statistics of the LayerNorm before the first."""
    return (
        depth * _block(tokens, width, inner, element, checkpointing=checkpointing)
        + bool(depth) * 2 * tokens * STATISTIC
    )


def _regressor_block(s: Sizes, checkpointing: bool) -> int:
    """Residual stream, norms for queries, keys and values of both sources, norm2's output and the MLP's (which the
    next norms keep), statistics; unless checkpointed also q, two keys and values, the heads' output, the attention
    branch and the MLP's hidden values."""
    masked, visible, statistics = 6, 2, 4 * (s.masked + s.visible)
    inside = 0
    if not checkpointing:
        masked, inside = 15, 4 * s.masked + 2 * s.visible
        statistics += 2 * s.masked
    rows = (masked * s.masked + visible * s.visible) * s.decoder_width + inside * s.decoder_inner
    return rows * s.element + statistics * STATISTIC


def _regressor(s: Sizes, depth: int, checkpointing: bool) -> int:
    """Its blocks, whose first residual stream is one mask token, and the statistics of the norm after the last."""
    first = s.masked * s.decoder_width * s.element
    return depth * _regressor_block(s, checkpointing) - first + 2 * s.masked * STATISTIC


def _prediction(model: ContextAutoencoder, masked: int, element: int, features_shared: bool) -> int:
    """The loss of codes keeps the gradient of its input; others what the head reads, and its output: in float32 with
    its product and two norms for the cosine."""
    width, out = model.shape.decoder_embed_dim, model.decoder.head.out_features
    if model.predict_codes:
        return masked * width * element
    features = 0 if features_shared else masked * width * element
    return features + masked * (8 * out + 8 if model.cosine_loss else out * element)


def working_bytes(model: ContextAutoencoder, num_masked: int, element: int) -> int:
    """For each image, the most that lives beside the activations: the targets' pass, a block's backward or logits."""
    s = sizes_of(model, num_masked, element)
    rows = WORKING_ROWS * max((s.masked + 1) * s.width, s.masked * s.decoder_width)
    logits = s.masked * model.decoder.head.out_features
    return element * max(rows, logits)


def targets_bytes(targets: Targets, model: ContextAutoencoder, num_masked: int) -> tuple[int, int]:
    """Of what makes the targets, on CUDA: weights, and the most that lives while it runs, for each image."""
    if isinstance(targets, PixelTargets):
        return 0, 4 * (3 * model.shape.image_size**2 + num_masked * targets.output_dim)
    grid = model.encoder.grid
    if isinstance(targets, TeacherFeatures):
        weights = sum(p.numel() for p in targets.model.parameters())
        return 2 * weights, WORKING_ROWS * (grid**2 + 1) * targets.output_dim * 2

    side = targets.token_size(grid)
    if isinstance(targets, DalleTokenizer):
        weights = sum(p.numel() for p in targets.encoder.parameters())
        decoder = 0 if targets.decoder is None else sum(p.numel() for p in targets.decoder.parameters())
        # The first group: its input, a block's, that after ReLU, and a hidden map a quarter as wide.
        return 2 * weights + 4 * decoder, 13 * targets.encoder.input.out_channels * side**2 * 2 // 4

    assert isinstance(targets, DvaeTokenizer)
    half = sum(p.numel() for part in (targets.model.encoder, targets.model.head) for p in part.parameters())
    everything = sum(p.numel() for p in targets.model.parameters())
    first = targets.model.head.in_features * (side // 2) ** 2 * 2
    return 2 * half + 4 * (everything - half), 2 * first + 3 * side**2 * 2


def traffic(model: ContextAutoencoder, num_masked: int, element: int) -> int:
    """Bytes that all ops but matrix products move for each image, forward and backward.

    A block's forward pass in units of n D: attention 4, two residual norms 8, GELU 8; backward 7, 12, 12, and 5 to
    sum the biases' gradients of qkv, proj and fc2.
    """
    s, shape = sizes_of(model, num_masked, element), model.shape
    m, v, width, inner = s.masked, s.visible, s.decoder_width, s.decoder_inner
    encoder = shape.depth * (v + 1) * (42 * s.width + 14 * s.inner)
    decoder = shape.decoder_depth * m * (42 * width + 14 * inner)
    targets = shape.depth * (m + 1) * (16 * s.width + 4 * s.inner) if model.alignment_weight > 0 else 0
    # Norms of queries, keys and values 14 and 7, residual norm 9, GELU 20, biases; attention 4 + 7 and 2 + 4.
    regressor = shape.regressor_depth * ((45 * m + 7 * v) * width + (13 * m + 7 * v) * inner)
    gather = (2 * (s.patches + 1) + s.patches + v) * s.width
    losses = 5 * m * width * (model.alignment_weight > 0)
    losses += 2 * m * model.decoder.head.out_features  # logits, read and replaced by their gradient
    return element * (encoder + decoder + targets + regressor + gather + losses)
