"""A context autoencoder or its encoder, from any of these files to any other.

IN: a checkpoint of Atten4Vis/CAE, lxtGH/CAE or mmpretrain (.pth, read without running code from it), a file of ours,
or a VisionTransformer of timm. Sizes come from the weights' shapes; copies of the encoder (alignment_encoder.*,
teacher.*) and the optimizer are left out. OUT, by --to:

  model         model.safetensors of ours, for train.init_from: the whole model (the default where IN has it)
  encoder       encoder.safetensors of ours: load_encoder, target.kind=features and timm's VisionTransformer read it
  beit          the encoder as timm's Beit (use_abs_pos_emb) and Eva read it: the original's names without prefix
  original      the whole model in the names of Atten4Vis/CAE, .safetensors or .pth (torch.save of {"model": ...})
  original-lxtgh  the same in the names of the older code base, lxtGH/CAE
  huggingface   a folder for timm.create_model("local-dir:OUT", pretrained=True) or for the Hugging Face hub
"""

import argparse
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cae_fast import __version__
from cae_fast.config import DataConfig, ModelConfig, UserError
from cae_fast.files import file_sha256, read_weights, replacing, write_safetensors, write_text
from cae_fast.models.cae import ContextAutoencoder, ModelShape
from cae_fast.models.encoder import header_shape, make_encoder, usual_heads
from cae_fast.models.safe_pickle import read_state
from cae_fast.models.vit import sincos_position_embedding
from cae_fast.models.weight_names import LEFT_OUT, encoder_for_timm, encoder_part, to_layout, to_ours

ORIGINAL = {"original": "Atten4Vis/CAE", "original-lxtgh": "lxtGH/CAE"}
ENCODER_COPY = {"original": "alignment_encoder.", "original-lxtgh": "teacher."}
WHOLE = ("model", *ORIGINAL)
SUFFIXES = {"model": (".safetensors",), "encoder": (".safetensors",), "huggingface": ("",)}
PUBLISHED_HEADS = 12
ENCODER_SIZES = ("image_size", "patch_size", "embed_dim", "depth", "num_heads")
DECODER_SIZES = ("decoder_embed_dim", "decoder_num_heads", "regressor_depth", "decoder_depth")
CARD = """---
library_name: timm
pipeline_tag: image-feature-extraction
tags: [timm, image-feature-extraction, context-autoencoder]
---
# Encoder of a context autoencoder ({embed_dim} wide, {depth} blocks, patches of {patch_size} px)

A vision transformer pretrained without labels by [CAE](https://arxiv.org/abs/2202.03026), converted by cae_fast
{version} from `{file}` (SHA-256 `{sha256}`, names of {layout}). It has no classification head.

| image size | patch | width | blocks | heads | parameters |
|---|---|---|---|---|---|
| {image_size} | {patch_size} | {embed_dim} | {depth} | {num_heads} | {parameters:,} |

Input: RGB in [0, 1], minus mean {mean}, divided by {std}.

```python
import timm, torch

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
tokens = model.forward_features(torch.zeros(1, 3, {image_size}, {image_size}))  # (1, {tokens}, {embed_dim})
```

`cae_fast.load_encoder("{folder}/model.safetensors")` gives the same. The terms of use are those of the original
weights and of the images they were trained on; add them here before publishing.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="IN", help="weights to read: .pth, .pt, .bin or .safetensors")
    parser.add_argument("out", metavar="OUT", help="file (or, for huggingface, folder) to write")
    parser.add_argument("--to", choices=["model", "encoder", "beit", *ORIGINAL, "huggingface"], help="see above")
    heads = "where IN does not say it: shapes do not tell (default: 12 as the published models, else 64 wide each)"
    parser.add_argument("--num-heads", type=int, help=f"heads of the encoder, {heads}")
    parser.add_argument("--decoder-num-heads", type=int, help="heads of regressor and decoder, likewise")
    parser.set_defaults(convert=convert_cae)


def convert_cae(args: argparse.Namespace) -> int:
    path, out = Path(args.file), Path(args.out)
    facts, state, layout = read_cae(path)

    # What is asked for must be in the file, and OUT must be of its kind.
    whole = "mask_token" in state
    to = args.to or ("model" if whole else "encoder")
    if to in WHOLE and not whole:
        raise UserError(
            f"--to {to} needs a whole model; {path} holds an encoder alone: --to encoder, beit, huggingface"
        )
    suffixes = SUFFIXES.get(to, (".safetensors", ".pth"))
    if out.suffix not in suffixes:
        raise UserError(f"{out}: --to {to} writes {' or '.join(suffixes) or 'a folder'}")

    # What the header says must be a model that the weights fill.
    model = describe(path, state, facts, layout, args=args)
    facts = facts | {"config": facts.get("config", {}) | {"model": model}, "version": __version__}
    shape = check(path, state, facts)
    facts["source"] = {"file": path.name, "sha256": file_sha256(path), "layout": layout}

    kind = "whole model" if whole else "encoder"
    print(f"{path}: {kind} in the names of {layout}, SHA-256 {facts['source']['sha256']}")
    print(", ".join(f"{name} {getattr(shape, name)}" for name in (*ENCODER_SIZES, *(DECODER_SIZES if whole else ()))))
    write(out, to, state, facts, shape=shape)
    print(f"{out}: written as {to}")
    return 0


def read_cae(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Our header ({} elsewhere), float32 weights under our names, and whose names they had. UserError: not a CAE."""
    facts, raw = read_weights(path) if path.suffix == ".safetensors" else ({}, read_state(path, ()))
    state, layout = to_ours(raw)
    if "encoder.patch_embed.proj.weight" not in state or "encoder.pos_embed" not in state:
        raise UserError(f"{path}: no CAE and no encoder with positions; its weights are {', '.join(list(raw)[:3])} ...")

    dropped = [name for name in raw if name.removeprefix("module.").startswith(LEFT_OUT)]
    if "mask_token" not in state:
        dropped += [name for name in state if not name.startswith("encoder.")]
        state = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    if dropped:
        parts = sorted({f"{name.removeprefix('module.').split('.')[0]}.*" for name in dropped})
        print(f"{path}: {', '.join(parts)} left out: copies of the encoder, or no part of a CAE")

    # Layouts that leave out the regressor's positions compute them: the encoder's law at the regressor's width.
    state = {name: tensor.float() for name, tensor in state.items()}
    if "mask_token" in state and "regressor_pos_embed" not in state:
        positions, width = state["encoder.pos_embed"], state["mask_token"].shape[-1]
        grid = math.isqrt(positions.shape[1] - 1)
        same = positions.shape[-1] == width
        state["regressor_pos_embed"] = positions.clone() if same else sincos_position_embedding(grid, grid, width)[None]
    return facts, state, layout


def describe(
    path: Path, state: dict[str, Tensor], facts: dict[str, Any], layout: str, args: argparse.Namespace
) -> dict[str, Any]:
    """The fields of ModelConfig, from the header of a file of ours, else from shapes and the given heads."""
    if "model" in facts.get("config", {}) and args.num_heads is args.decoder_num_heads is None:
        return facts["config"]["model"]

    patch = state["encoder.patch_embed.proj.weight"].shape[-1]
    model: dict[str, Any] = {
        "image_size": math.isqrt(state["encoder.pos_embed"].shape[1] - 1) * patch,
        "patch_size": patch,
        "embed_dim": state["encoder.cls_token"].shape[-1],
        "depth": count_blocks(state, "encoder"),
        "num_heads": find_heads(path, state, "encoder", layout, flag="--num-heads", given=args.num_heads),
    }
    if "mask_token" in state:
        given = args.decoder_num_heads
        model |= {
            "decoder_embed_dim": state["mask_token"].shape[-1],
            "decoder_num_heads": find_heads(path, state, "regressor", layout, flag="--decoder-num-heads", given=given),
            "regressor_depth": count_blocks(state, "regressor"),
            "decoder_depth": count_blocks(state, "decoder"),
        }
    return model


def count_blocks(state: dict[str, Tensor], part: str) -> int:
    return sum(re.fullmatch(rf"{part}\.blocks\.\d+\.mlp\.fc1\.weight", name) is not None for name in state)


def find_heads(path: Path, state: dict[str, Tensor], part: str, layout: str, flag: str, given: int | None) -> int:
    """Heads of the encoder or the regressor; says on what it relies. UserError where a given number cannot be."""
    projection = state.get(f"{part}.blocks.0.attn.proj.weight")
    if projection is None:
        raise UserError(f"{path}: it holds no {part}.blocks.0.attn.proj.weight in the names of {layout}")
    width, inner = projection.shape
    if given is not None:
        if not 0 < given <= width or given * (width // given) != inner:
            raise UserError(f"{flag} is {given}: in {path} the heads are together {inner} wide, of {width} channels")
        return given
    published = layout != "timm" and PUBLISHED_HEADS * (width // PUBLISHED_HEADS) == inner
    heads = PUBLISHED_HEADS if published else usual_heads(path, projection)
    print(f"{part}: taken to have {heads} heads of width {inner // heads}; if not, give {flag}")
    return heads


def check(path: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> ModelShape:
    """The model that header and weights make. UserError where a weight is missing, unknown or of another shape."""
    shape = header_shape(facts)
    assert shape is not None
    try:
        if "mask_token" in state:
            with torch.device("meta"):
                whole = ContextAutoencoder(ModelConfig(**asdict(shape)), len(state["decoder.head.weight"]), True)
            whole.load_state_dict(state, assign=True)
        else:
            make_encoder(encoder_part(state), shape.num_heads)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path}: not a CAE ({' '.join(str(error).split())[:300]})") from error
    return shape


def write(out: Path, to: str, state: dict[str, Tensor], facts: dict[str, Any], shape: ModelShape) -> None:
    if to == "huggingface":
        if shape.embed_dim % shape.num_heads:
            raise UserError(
                f"timm's VisionTransformer cannot have {shape.num_heads} heads in a width of {shape.embed_dim}"
            )
        write_safetensors(out / "model.safetensors", encoder_for_timm(state), facts)
        write_folder(out, state, facts, shape)
        return

    if to == "encoder":
        state = encoder_for_timm(state)
    elif to == "beit":
        state = encoder_part(state)
    elif to in ORIGINAL:
        state = to_layout(state, ORIGINAL[to])
    if out.suffix == ".safetensors":
        write_safetensors(out, state, facts)
        return

    # The original's strict loading wants its copies of the encoder; they share its bytes.
    copies = {n: t for n, t in state.items() if to in ORIGINAL and n.startswith("encoder.")}
    state = state | {ENCODER_COPY[to] + name.removeprefix("encoder."): tensor for name, tensor in copies.items()}
    with replacing(out) as temporary:
        torch.save({"model": state}, temporary)


def write_folder(out: Path, state: dict[str, Tensor], facts: dict[str, Any], shape: ModelShape) -> None:
    """config.json for timm and a model card, beside the weights."""
    data = facts["config"].get("data", {})
    mean, std = data.get("mean", DataConfig().mean), data.get("std", DataConfig().std)

    # Any ViT of timm will do as the architecture: model_args replace all its sizes.
    sizes = {name: getattr(shape, name) for name in ENCODER_SIZES}
    side = sizes.pop("image_size")
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": shape.embed_dim,
        "model_args": {"img_size": side, "init_values": 1.0, "num_classes": 0} | sizes,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")

    text = CARD.format(
        version=__version__,
        parameters=sum(tensor.numel() for tensor in encoder_part(state).values()),
        image_size=side,
        tokens=(side // shape.patch_size) ** 2 + 1,
        mean=mean,
        std=std,
        folder=out.name,
        **sizes,
        **facts["source"],
    )
    write_text(out / "README.md", text)
