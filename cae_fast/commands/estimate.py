"""Estimate a pretraining recipe on N GPUs: memory for each ZeRO stage, time of a step, hours, what limits it.

  cae-fast estimate configs/pretrain/vit_large_dalle.yaml --gpus 8
  cae-fast estimate configs/pretrain/vit_huge_in22k.yaml --gpus 8 64 512 --images 14197122 --markdown

Nothing is run and no GPU is needed: these are sums over the model's shapes and the assumptions printed with them.
Overrides (section.field=value) stand before the options.
"""

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cae_fast.config import PretrainConfig, TargetConfig, UserError
from cae_fast.cost.devices import DEVICES, Device
from cae_fast.cost.estimation import (
    DECODED_BY_A_CORE,
    STAGES,
    WORKERS,
    Estimate,
    Workload,
    assumptions,
    estimate,
)
from cae_fast.cost.memory import activations, targets_bytes, traffic, working_bytes
from cae_fast.data.masking import make_mask
from cae_fast.files import write_text
from cae_fast.models.cae import ModelShape, resolve_model
from cae_fast.models.dalle import DalleEncoder, DalleTokenizer
from cae_fast.models.flops import forward_flops, pretraining_flops
from cae_fast.models.targets import ENCODED_AT_ONCE, PixelTargets, Targets, make_model, make_targets
from cae_fast.settings import add_settings, load_run_config
from cae_fast.training.engine import PRECISIONS
from cae_fast.training.setup import check_training, micro_batch_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, PretrainConfig)
    parser.add_argument(
        "--gpus", type=int, nargs="+", required=True, metavar="N", help="one: all ZeRO stages; several: a row each"
    )
    parser.add_argument("--device", default="h100", help=f"{', '.join(DEVICES)} (default: %(default)s)")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage of the rows with several --gpus (default: 1)")
    parser.add_argument("--images", type=int, default=1_281_167, help="images of the data (default: ImageNet-1K's)")
    parser.add_argument("--data-rate", type=float, metavar="X", help="images/s that reach each GPU")
    parser.add_argument("--measured", metavar="FILE", help="JSON of benchmarks/speed/peaks.py: a card's own rates")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--json", metavar="FILE", help="write all numbers here")


def run(args: argparse.Namespace) -> int:
    config = load_run_config(PretrainConfig, args)
    _check_arguments(args)

    device = _measured(DEVICES[args.device], args.measured)
    work = workload(config, args.images, args.data_rate)
    stages = STAGES if len(args.gpus) == 1 else (args.zero,)
    pairs = [(gpus, stage if gpus > 1 else 0) for gpus in args.gpus for stage in stages]  # one GPU needs no ZeRO
    rows = [estimate(work, device, gpus, stage) for gpus, stage in dict.fromkeys(pairs)]

    notes = assumptions(work, device)
    if config.target.kind == "codes" and not config.target.tokenizer:
        notes.append("target.tokenizer is empty: DALL-E's encoder at its published size")
    show(work, device, rows, notes, markdown=args.markdown)
    if args.json:
        facts = {"config": asdict(config), "workload": asdict(work), "device": asdict(device), "assumptions": notes}
        write_text(Path(args.json), json.dumps(facts | {"estimates": [asdict(row) for row in rows]}, indent=1))
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.device not in DEVICES:
        raise UserError(f"--device={args.device}: choose one of {', '.join(DEVICES)}")
    if args.zero not in STAGES:
        raise UserError(f"--zero={args.zero}: choose a stage from 0 to 3")
    for name, value in (("gpus", min(args.gpus)), ("images", args.images)):
        if value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")
    if args.data_rate is not None and not 0 < args.data_rate < math.inf:
        raise UserError(f"--data-rate={args.data_rate}: must be a finite number above 0")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json={args.json}: its folder does not exist")


def _measured(device: Device, path: str | None) -> Device:
    if path is None:
        return device
    try:
        facts = json.loads(Path(path).read_text())
        rates = {name: float(facts["rates"][name]) for name in ("linears", "convolutions", "copy")}
        source = f"measured: {path}, on {facts['device']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--measured={path}: not a JSON file of benchmarks/speed/peaks.py ({error!r})") from error
    for name, rate in rates.items():
        if not 0 < rate < math.inf:
            raise UserError(f"--measured={path}: its rate of {name} is {rate}")
    linears, convolutions, copy = rates.values()
    return replace(device, linears=linears, convolutions=convolutions, copy=copy, source=source)


def workload(config: PretrainConfig, images: int, data_rate: float | None) -> Workload:
    """Check the settings and build the model without memory; UserError for what `cae-fast pretrain` would refuse."""
    check_training(config)
    shape = resolve_model(config.model)
    _, masked = make_mask(config.mask, shape.image_size // shape.patch_size, config.train.seed)
    targets = _targets(config.target, shape)
    element = PRECISIONS[config.train.precision].itemsize
    batch, workers = config.train.global_batch_size, config.data.num_workers
    if images < batch:
        raise UserError(f"--images={images}: fewer than train.global_batch_size={batch}")

    with torch.device("meta"):
        model = make_model(config, targets)
    parts = forward_flops(model, masked)
    weights, working = targets_bytes(targets, model, masked)
    target_values = masked * (8 if model.predict_codes else 4 * model.decoder.head.out_features)

    return Workload(
        parameters=sum(p.numel() for p in model.parameters()),
        tensors=len(list(model.parameters())),
        element=element,
        model_flops=pretraining_flops(model, masked),
        targets_flops=targets.encode_flops(model.encoder.grid, masked),
        recomputed_flops=sum(parts[name] for name in ("encoder", "regressor", "decoder")),
        traffic=traffic(model, masked, element),
        activations=activations(model, masked, element),
        checkpointed=activations(model, masked, element, checkpointing=True),
        working=working_bytes(model, masked, element),
        targets_weights=weights,
        targets_working=working,
        targets_at_once=batch if isinstance(targets, PixelTargets) else ENCODED_AT_ONCE,
        # uint8 as loaded, float32 normalized, and in the type of the training
        inputs=2 * (3 * shape.image_size**2 * (5 + element) + target_values + 8 * model.encoder.grid**2),
        global_batch=batch,
        micro_batch=micro_batch_size(config.train),
        epochs=config.optim.epochs,
        steps=config.optim.epochs * (images // batch),
        data_rate=data_rate or float(DECODED_BY_A_CORE * max(1, WORKERS if workers is None else workers)),
    )


def _targets(target: TargetConfig, shape: ModelShape) -> Targets:
    if target.kind == "codes" and not target.tokenizer:  # a recipe whose file is named on the command line
        with torch.device("meta"):
            return DalleTokenizer(DalleEncoder(), None, "meta")
    return make_targets(target, shape.image_size, shape.patch_size, torch.device("cpu"))


def show(work: Workload, device: Device, rows: list[Estimate], notes: list[str], markdown: bool) -> None:
    recipe = f"{work.epochs} epochs of {work.steps // work.epochs:,} steps of {work.global_batch} images"
    print(f"Estimates, not measurements: {work.parameters:,} parameters, {recipe}, {device.name}.")
    parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in work.activations.parts.items())
    flops = f"{work.model_flops / 1e9:.1f} GFLOP for the model, {work.targets_flops / 1e9:.1f} for its targets"
    print(f"Each image: {flops}, {work.traffic / 1e6:.0f} MB moved by ops other than products.")
    print(f"Activations, MB an image: {parts}; in all {work.activations.per_image / 1e6:.1f}, with checkpointing "
          f"{work.checkpointed.per_image / 1e6:.1f}; beside them {work.working / 1e6:.1f}.")  # fmt: skip
    print(f"Targets: {work.targets_weights / 1e9:.2f} GB of weights, {work.targets_working / 1e6:.1f} MB an image.\n")

    # On one number of GPUs the rows are ZeRO stages, which differ in memory, too.
    if len({row.gpus for row in rows}) == 1:
        _table("GB on one GPU", [_memory(row) for row in rows], markdown)
    _table("time", [_time(row) for row in rows], markdown)
    print("Assumptions:")
    for note in notes:
        print(f"- {note}")


def _memory(row: Estimate) -> dict[str, str]:
    return {
        "ZeRO": str(row.stage),
        "weights": f"{row.state.weights / 1e9:.2f}",
        "gradients": f"{row.state.gradients / 1e9:.2f}",
        "masters + moments": f"{row.state.optimizer / 1e9:.2f}",
        "micro-batch": str(row.micro_batch),
        "peak": _peak(row),
        "largest micro-batch": str(row.largest_micro_batch[0]),
        "peak, checkpointing": f"{row.peak[1] / 1e9:.1f}",
        "largest, checkpointing": f"{row.largest_micro_batch[1]} (+{row.recompute_ms:.0f} ms a step)",
    }


def _peak(row: Estimate) -> str:
    return f"{row.peak[0] / 1e9:.1f}" + ("" if row.fits else " (does not fit)")


def _time(row: Estimate) -> dict[str, str]:
    return {
        "GPUs": str(row.gpus),
        "ZeRO": str(row.stage),
        "batch of a GPU": f"{row.micro_batch}" + (f" x {row.accumulation}" if row.accumulation > 1 else ""),
        "peak GB": _peak(row),
        **{f"{name} ms": f"{ms:.1f}" for name, ms in row.parts_ms.items()},
        "step ms": f"{row.step_ms:.1f}",
        "images/s": f"{row.images_per_second:,.0f}",
        "MFU": f"{row.mfu:.0%}",
        "hours": f"{row.hours:,.1f}",
        "GPU-hours": f"{row.gpu_hours:,.0f}",
        "limit": row.limit,
    }


def _table(title: str, rows: list[dict[str, str]], markdown: bool) -> None:
    if markdown:
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        print("\n".join("| " + " | ".join(line) + " |" for line in lines), end="\n\n")
        return
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
