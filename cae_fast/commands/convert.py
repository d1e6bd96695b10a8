"""Turn weights from one code base's files into another's, without running code from them.

  cae-fast convert cae checkpoint.pth model.safetensors
  cae-fast convert cae runs/base/model.safetensors folder --to huggingface
  cae-fast convert dalle encoder.pkl decoder.pkl dalle.safetensors

`cae-fast convert cae --help` and `cae-fast convert dalle --help` tell more.
"""

# B batch, T image side, N positions.

import argparse
import json
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cae_fast import __version__
from cae_fast.commands import convert_cae
from cae_fast.config import DataConfig, UserError
from cae_fast.data.index import build_index, resolve_data_path
from cae_fast.data.loader import pretrain_loader, resolve_num_workers
from cae_fast.data.sampling import SamplingPlan
from cae_fast.files import file_sha256, write_safetensors
from cae_fast.models.dalle import DalleTokenizer, dalle_tokenizer, from_openai
from cae_fast.models.safe_pickle import read_state
from cae_kernels import random_mask

DALLE_CLASSES = ("dall_e.", "torch.nn.modules.")
VERIFY_GRID, VERIFY_BATCH = 14, 16
DALLE_HELP = """The discrete VAE of DALL-E, as OpenAI publishes it (pickled modules) or as other toolboxes do (state
dicts in .pth files; an encoder alone is enough to pretrain), as one file for target.tokenizer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_subparsers(dest="model", required=True, metavar="cae|dalle")
    formatter = argparse.RawDescriptionHelpFormatter
    convert_cae.add_arguments(models.add_parser("cae", description=convert_cae.__doc__, formatter_class=formatter))
    parser = models.add_parser("dalle", description=DALLE_HELP)
    parser.set_defaults(convert=convert_dalle)
    parser.add_argument("files", nargs="+", metavar="FILE", help="encoder, decoder (may be left out)")
    parser.add_argument("out", metavar="OUT.safetensors", help="file to write")
    parser.add_argument(
        "--verify",
        metavar="IMAGES",
        help="folder of images (or bundled:NAME): compare float16 with float32 codes on a crop of each",
    )


def run(args: argparse.Namespace) -> int:
    return args.convert(args)


def convert_dalle(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the last argument is the file to write and ends in .safetensors")
    if len(args.files) > 2:
        raise UserError(f"{len(args.files)} files to read: give the encoder, or the encoder and the decoder")

    state, sources = {}, {}
    for part, file in zip(("encoder", "decoder")[: len(args.files)], args.files, strict=True):
        for name, tensor in read_dalle(Path(file), part).items():
            state[f"{part}.{name}"] = tensor
        sources[part] = {"file": Path(file).name, "sha256": file_sha256(file)}

    tokenizer = make_tokenizer(state, args.files)
    facts = {"kind": "dalle", "sizes": sizes(tokenizer), "sources": sources, "version": __version__}
    write_safetensors(out, state, facts)

    for part, source in sources.items():
        print(f"{part}: {source['file']}, SHA-256 {source['sha256']}")
    print(f"{out}: {json.dumps(facts['sizes'])}, SHA-256 {file_sha256(out)}")
    print(f"use it with target.kind=codes target.tokenizer={out}")
    if args.verify:
        verify(state, args.verify)
    return 0


def read_dalle(path: Path, part: str) -> dict[str, Tensor]:
    """Weights of the encoder or decoder under our names. Raises UserError where the file holds something else."""
    try:
        state = from_openai(read_state(path, DALLE_CLASSES))
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    kernel = state["input.weight"].shape[-1] if "input.weight" in state else None
    found = {7: "an encoder", 1: "a decoder"}.get(kernel or 0, "something else")
    if not found.endswith(part):
        raise UserError(f"{path} holds {found}, not the {part}: give the encoder first, then the decoder")
    return state


def make_tokenizer(state: dict[str, Tensor], files: list[str]) -> DalleTokenizer:
    """Raises UserError where the weights are not those of DALL-E's modules."""
    try:
        tokenizer = dalle_tokenizer(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{' and '.join(files)}: not DALL-E's modules ({' '.join(str(error).split())[:300]})"
        ) from error
    if tokenizer.decoder is not None and tokenizer.decoder.input.in_channels != tokenizer.num_codes:
        raise UserError(
            f"{files[0]} makes {tokenizer.num_codes} codes and {files[1]} reads {tokenizer.decoder.input.in_channels}: "
            "they do not belong together"
        )
    return tokenizer


def sizes(tokenizer: DalleTokenizer) -> dict[str, int]:
    encoder, decoder = tokenizer.encoder, tokenizer.decoder
    numbers = {"num_codes": tokenizer.num_codes, "encoder_width": encoder.input.out_channels}
    numbers["encoder_parameters"] = sum(p.numel() for p in encoder.parameters())
    if decoder is not None:
        numbers["decoder_width"] = decoder.output.in_channels
        numbers["decoder_parameters"] = sum(p.numel() for p in decoder.parameters())
    return numbers


def verify(state: dict[str, Tensor], images: str) -> None:
    """Print on how many codes the encoder in float16 and in float32 agree, on one pretraining crop of every image."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    half, full = (dalle_tokenizer(encoder, device, dtype) for dtype in (torch.float16, torch.float32))
    agreed = total = 0

    # The crops are those of pretraining, by its own plan and loader.
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig()
        index = build_index(resolve_data_path(images), Path(folder) / "images.index", data.max_pixels)
        batch = min(VERIFY_BATCH, len(index))
        plan = SamplingPlan(
            num_samples=len(index),
            heights=index.heights,
            widths=index.widths,
            global_batch_size=batch,
            seed=0,
            crop_scale=data.crop_scale,
            crop_ratio=data.crop_ratio,
            horizontal_flip=data.horizontal_flip,
        )

        loader = pretrain_loader(
            index,
            plan,
            partial(random_mask, seed=0, height=VERIFY_GRID, width=VERIFY_GRID, num_masked=1),
            image_size=VERIFY_GRID,  # the encoder's view, not looked at
            token_size=half.token_size(VERIFY_GRID),
            start_step=0,
            stop_step=plan.steps_per_epoch,
            rank=0,
            world_size=1,
            micro_batch_size=batch,
            num_workers=resolve_num_workers(None, 1),
            pin_memory=False,
        )

        ids = torch.arange(VERIFY_GRID**2, device=device).expand(batch, -1)  # (B, N)
        with closing(loader):
            for crop in loader:
                assert crop.token_images is not None
                token_images = crop.token_images.to(device)  # (B, 3, T, T)
                same = half.encode(token_images, ids) == full.encode(token_images, ids)
                agreed, total = agreed + int(same.sum()), total + same.numel()
    print(f"float16 and float32 agree on {agreed:,} of {total:,} codes ({agreed / total:.4%}) of {images}, on {device}")
