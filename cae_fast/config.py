"""Every setting of every command, with its default, its reason and its limits.

A configuration is a YAML file with these sections, changed on the command line by dotted overrides:
`cae-fast pretrain configs/quickstart.yaml optim.lr=1e-3 train.seed=7`.
The text below a field is what `cae-fast pretrain --help` prints for it.
"""

from dataclasses import dataclass, field
from typing import Any


class UserError(ValueError):
    """A mistake in a setting or an input: the command line prints its one line and exits with status 2."""


IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def limited(default: Any, low: float = 0.0, high: float = 2.0**31 - 1) -> Any:
    """A number, or numbers of a list, from `low` to `high`, as `settings.check_numbers` demands.

    Without it: finite, at least 0 and below 2^31.
    """
    limits = {"low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=limits)
    return field(default=default, metadata=limits)


@dataclass
class ModelConfig:
    size: str = "base"
    """tiny, small, base, large, large_dec768 or huge; the fields left empty below take this size's value."""
    image_size: int = limited(224, low=1, high=2**14)
    """Side of the encoder's input in pixels; a multiple of the patch size."""
    patch_size: int | None = limited(None, low=1, high=2**14)
    embed_dim: int | None = limited(None, low=1, high=2**16)
    depth: int | None = limited(None, low=1, high=1000)
    num_heads: int | None = limited(None, low=1, high=2**16)
    decoder_embed_dim: int | None = limited(None, low=1, high=2**16)
    """Width of regressor and decoder; another one than the encoder's adds a Linear + LayerNorm between them."""
    decoder_num_heads: int | None = limited(None, low=1, high=2**16)
    regressor_depth: int = limited(4, low=1, high=1000)
    """Cross-attention blocks of the latent regressor (the paper's ablation: 1, 2, 4, 5)."""
    decoder_depth: int = limited(4, high=1000)
    """Self-attention blocks of the decoder; 0 is the paper's "no decoder": one linear layer predicts."""
    layer_scale_init: float | None = limited(None, low=-1e4, high=1e4)
    drop_path_rate: float = 0.1
    """Highest drop-path rate; it rises from 0 over the depth, anew in encoder, regressor and decoder."""
    align_drop_path: bool = True
    """Drop path also in the pass that makes the alignment targets, as in the original code."""
    rescale_init: bool = False
    """Divide the output projections of block l (from 1) by sqrt(2 l) at initialization (BEiT)."""


@dataclass
class TargetConfig:
    kind: str = "normalized_pixels"
    """pixels (RGB of the normalized image), normalized_pixels (each patch with mean 0, variance 1), codes (of a frozen
    tokenizer) or features (of a frozen vision transformer, with cosine loss)."""
    tokenizer: str | None = None
    """codes: a file of `cae-fast convert dalle` or `cae-fast train-tokenizer`; features: an encoder.safetensors."""
    compile: bool = False
    """torch.compile the frozen model of codes or features: the first step takes a minute longer."""
    alignment_weight: float = limited(2.0, high=1e9)
    """Weight of the squared error between predicted and encoded latents; 0 turns the alignment off."""


@dataclass
class MaskConfig:
    kind: str = "block"
    """block (BEiT's block-wise masking) or random."""
    ratio: float = limited(0.5, high=1)
    """Share of patches to mask: exactly floor(ratio * patches) in every image."""
    min_block: int = limited(16, low=1)
    """Smallest area of a block in patches, while at least that many remain to be masked."""
    max_block: int | None = limited(None, low=1)
    """Largest area of a block in patches; empty: the number of masked patches."""
    min_aspect: float = limited(0.3, low=1e-6, high=1)
    """Aspect ratios are log-uniform in [min_aspect, 1 / min_aspect]."""


@dataclass
class DataConfig:
    path: str = ""
    """A folder of images (nested or flat), tar files of images (a folder of them, a glob, a range as
    shards/{000000..013999}.tar, or URLs: http, s3, gs, az, hf ...), or `bundled:NAME` for images that ship with the
    package."""
    index: str | None = None
    """Index folder written by `cae-fast index`, refused where its images changed since; empty: made on first use and
    kept beside the run folder, and made again where name, size or time of an image or tar file changed."""
    shuffle: str = "global"
    """global (any image may follow any other; for fast disks), or shard (tar files only; for hard disks, networks and
    object stores): a few tar files in random order are read at a time, each nearly from front to back."""
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Share of the image's area that a random resized crop covers."""
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Width over height of a crop."""
    horizontal_flip: float = limited(0.5, high=1)
    """Probability of a horizontal flip."""
    mean: list[float] | None = field(default=None, metadata={"low": -10.0, "high": 10.0})
    """Per-channel mean of the encoder's input, images in [0, 1]; empty: what the weights that the run starts from were
    trained with, else ImageNet's [0.485, 0.456, 0.406]."""
    std: list[float] | None = field(default=None, metadata={"low": 0.0, "high": 100.0})
    """Per-channel standard deviation; empty: likewise, else [0.229, 0.224, 0.225]."""
    backend: str = "auto"
    """dali (NVIDIA DALI, on the GPU), cpu (libjpeg-turbo and torch), pil (Pillow alone, the reference) or auto: the
    faster of dali and cpu, measured on the run's own images; a run keeps what it began with."""
    num_workers: int | None = limited(None, high=1024)
    """Decoding processes per training process; empty: the cores left over, at most 12; 0: in the training process."""
    max_pixels: int = limited(100_000_000, low=1)
    """Images with more pixels than this are listed as bad and skipped."""


@dataclass
class OptimConfig:
    lr: float = limited(1.5e-3, high=1e6)
    """Peak learning rate; taken as it is, not rescaled by the batch size."""
    min_lr: float = limited(1e-5, high=1e6)
    epochs: int = limited(300, low=1, high=10**7)
    warmup_epochs: int = limited(10, high=10**7)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05
    """Constant; not applied to biases and other one-dimensional parameters."""
    clip_grad_norm: float = 3.0
    """Largest global norm of the gradient; 0 turns clipping off."""


@dataclass
class TrainConfig:
    run_dir: str = ""
    """Everything a run writes goes here."""
    seed: int = limited(0, high=2**63 - 1)
    device: str = "auto"
    """auto (CUDA when there is one), cuda or cpu."""
    precision: str = "bfloat16"
    """bfloat16 (compute; the optimizer keeps float32 master weights) or float32."""
    global_batch_size: int = limited(2048, low=1, high=2**24)
    """Images per optimizer step over all processes and accumulation steps."""
    micro_batch_size: int | None = limited(None, low=1, high=2**24)
    """Most images per forward pass and process; empty: the global batch over the processes. Accumulation follows."""
    resume: str = "auto"
    """auto: continue when run_dir holds a checkpoint; never: refuse such a folder; force: with changed settings too."""
    init_from: str | None = None
    """A model.safetensors to start the weights from (a new run, step 0)."""
    max_steps: int | None = limited(None, low=1)
    """Stop (with a checkpoint) after this step; the schedule stays that of optim.epochs."""
    zero: int | None = None
    """What processes share out (DeepSpeed's ZeRO stages): 0 nothing, plain data parallel, without DeepSpeed; 1 masters
    and moments; 2 gradients too; 3 weights too. Empty: 1 with several processes, else no DeepSpeed."""
    offload_optimizer: bool = False
    """ZeRO 1 to 3: keep masters and moments in the host's memory and update them there. Slow; for models too large."""
    activation_checkpointing: bool = False
    """Keep only what enters a block and compute the rest again in the backward pass: a third more work, and the memory
    of activations falls to about a fifth."""
    deepspeed: str | None = None
    """A JSON file with more DeepSpeed settings, such as configs/deepspeed/zero1_8xh100.json; what follows from other
    settings here must not be in it."""
    timeout_seconds: float = limited(600.0, low=1e-3, high=1e8)
    """With several processes: one that makes no step for so long, because it or another one hangs, ends the run."""


@dataclass
class CheckpointConfig:
    every_epochs: int = 1
    """Save the training state every so many epochs; the newest one always stays."""
    keep_every_epochs: int = 0
    """Also keep for good the states of every so many epochs; 0: only the newest."""


@dataclass
class LogConfig:
    every_steps: int = limited(10, low=1)
    """Steps between log lines; the only time metrics leave the device."""
    tensorboard: bool = True
    """Write TensorBoard's event files to run_dir/tensorboard."""
    wandb: str | None = None
    """Weights & Biases project; needs the wandb package."""
    profile: list[int] = field(default_factory=list)
    """[first, last]: write a torch.profiler trace of these steps to run_dir/profile."""


@dataclass
class ProbeConfig:
    train: str | None = None
    """Labelled images for a k-NN probe of the frozen encoder before and after pretraining; empty: no probe."""
    test: str | None = None
    k: int = limited(20, low=1)
    """Neighbours that vote."""


@dataclass
class PretrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


@dataclass
class TokenizerConfig:
    size: str = "small"
    """small (the shape of the original code) or large; the fields left empty below take this size's value."""
    image_size: int = limited(112, low=8, high=2**14)
    """Side of the crops in pixels, a multiple of 8: one code stands for 8x8 pixels."""
    width: int | None = limited(None, low=1, high=2**14)
    """Channels of every convolution: small 256, large 512."""
    num_blocks: int | None = limited(None, high=1000)
    """Residual blocks of encoder and decoder each: small 2, large 4."""
    quantizer: str = "gumbel"
    """gumbel (the paper's), fsq or vq; the last two need the vector-quantize-pytorch package."""
    num_codes: int = limited(8192, low=2, high=2**20)
    code_dim: int | None = limited(None, low=1, high=2**16)
    """Width of the vector that stands for a code: gumbel 512, vq 32; fsq: always the number of levels."""
    fsq_levels: list[int] = field(default_factory=lambda: [8, 8, 8, 4, 4])
    """Values that each coordinate is rounded to (fsq); their product is num_codes."""
    loss: str = "logit_laplace"
    """logit_laplace (DALL-E's likelihood, for which its KL weight is meant) or squared_error (the original code's)."""
    straight_through: bool = False
    """Gumbel: the decoder sees one code, with the gradient of the mixture; off: it sees the mixture, as DALL-E's."""
    temperature: list[float] = field(default_factory=lambda: [1.0, 1 / 16])
    """Gumbel: first and last temperature of the mixture (half a cosine between them)."""
    temperature_steps: int = 150_000
    """Gumbel: steps from the first temperature to the last."""
    kl_weight: float = 6.6
    """Gumbel: last weight of the KL divergence from the uniform distribution; the loss is divided by the 192 values
    of a code's pixels, so a code's KL counts kl_weight / 192."""
    kl_warmup_steps: int = 5_000
    """Gumbel: steps in which the KL weight rises from 0 (half a cosine)."""
    diversity_weight: float = 0.0
    """Gumbel: weight, scaled as the KL's, of how far the batch's mean distribution is from uniform (in nats). Against
    codebook collapse."""
    commitment_weight: float = 1.0
    """VQ: weight of the squared distance between a vector and its code."""


@dataclass
class TrainTokenizerConfig:
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]))
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class EncoderConfig:
    path: str = ""
    """Anything that `cae_fast.load_encoder` reads: encoder.safetensors of a run, what `cae-fast convert` writes, timm's
    vision transformers."""
    image_size: int | None = None
    """Side of the input in pixels; another than the file's interpolates the positions, which stay frozen."""
    drop_path_rate: float = limited(0.0, high=0.999999)
    """finetune: highest drop-path rate; it rises from 0 over the depth."""
    rel_pos_bias: bool = False
    """finetune: learned relative position biases in every block, 0 at first, beside the sine-cosine positions. The
    original code fine-tuned with them (its default; one table a block, with weight decay); attention then runs in
    torch's scaled_dot_product_attention."""


@dataclass
class HeadConfig:
    kind: str = ""
    """Set by --head: linear, attentive, knn or finetune."""
    features: str | None = None
    """linear, knn: class_token (the paper's, empty for linear) or patch_mean, the mean of the patch tokens (empty for
    knn)."""
    class_token: bool = False
    """attentive: the class token is among the keys and values, as in the original code; the paper has the patches."""
    cache_features: bool = False
    """linear, attentive: encode every image once, cut as for validation, and train the head on that: without random
    crops and flips, in the memory of this machine."""
    k: int = 20
    """knn: neighbours that vote."""


@dataclass
class ValidationConfig:
    path: str = ""
    """Labelled images to test on: a folder of a folder for each class, tar files or `bundled:NAME`."""
    index: str | None = None
    """Index folder of these images, as data.index."""
    crop_pct: float = limited(0.875, low=1e-3, high=1)
    """The shorter side is resized to image_size / crop_pct, then the central square is cut out (224 of 256)."""
    every_epochs: int = 10
    """Test every so many epochs, and at the end."""


@dataclass
class ClassifyOptimConfig(OptimConfig):
    """By head: linear LARS (trust 0.001), attentive SGD (Nesterov), finetune AdamW."""

    weight_decay: float = 0.0
    """Constant; not applied to biases, other one-dimensional parameters and the class token."""
    clip_grad_norm: float = 0.0
    """Largest global norm of the gradient; 0 turns clipping off, as in the original."""
    momentum: float = 0.9
    """linear, attentive."""
    layer_decay: float = limited(1.0, low=1e-6, high=1)
    """finetune: every layer below the head has its learning rate multiplied by this once more."""


@dataclass
class AugmentConfig:
    rand_augment: str = ""
    """RandAugment in timm's notation, as rand-m9-mstd0.5-inc1; empty: none."""
    random_erasing: float = 0.0
    """Probability of replacing a rectangle by noise."""
    mixup: float = 0.0
    """Alpha of mixup; 0: none."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0: none. With mixup, one of the two is drawn for each micro-batch."""
    label_smoothing: float = 0.0


@dataclass
class ClassifyConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: ClassifyOptimConfig = field(default_factory=ClassifyOptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


RunConfig = PretrainConfig | TrainTokenizerConfig | ClassifyConfig
