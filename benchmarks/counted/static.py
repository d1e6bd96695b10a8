"""Launches, bytes and FLOPs of ops and whole steps, ours against eager PyTorch and torch.compile, without a GPU.

    python -m benchmarks.counted.static --json benchmarks/results/static.json        # minutes, a few GB of memory

  ours      our ops as registered ops: what they read and write; inner launches by their files
  eager     the plain torch reference, op by op
  compiled  what Inductor's scheduler would launch for the reference on an H100
  original  (steps) benchmarks/speed/original_step.py under float16 autocast

Nothing is computed: tensors are fake, at the real shapes of ViT-L at batch 256 and ViT-H at batch 128. An op's inputs
are read once and its results written once, so these are the least bytes of each way of cutting the work into kernels;
the tables have the time they take at the rates assumed of a GPU (cae_fast/cost/devices.py).
"""

# B batch, N patches, Nm masked, T side of the tokenizer's images.

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counted.count_compiled import count
from benchmarks.counted.count_launches import Launches, as_on_a_gpu
from benchmarks.record import record, save
from benchmarks.speed import ops
from benchmarks.speed.original_step import OriginalCAE, OriginalTokenizer
from benchmarks.speed.torch_adamw import TorchAdamW
from cae_fast.config import ModelConfig, OptimConfig
from cae_fast.cost.devices import DEVICES
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.dalle import DalleEncoder, DalleTokenizer
from cae_fast.models.flops import pretraining_flops
from cae_fast.training.engine import Engine
from cae_kernels.adamw import AdamWState

CPU = torch.device("cpu")
CEILINGS = {
    name.upper(): {rate: getattr(DEVICES[name], rate) for rate in ("linears", "convolutions", "copy")}
    for name in ("h100", "h200")
}
MODELS = {"ViT-L": ("large", 256), "ViT-H": ("huge", 128)}
COMPILED_DEPTHS = (2, 3)  # of the encoder; the rest follows, each block being the same
# Bytes a parameter, float32 gradients. torch's foreach AdamW: weight decay 8, exp_avg 12, exp_avg_sq 8 + 12, square
# root 8, division 8, eps 8, update 16. The scaler's unscaling 8, gradient clipping: norm 4, product 8.
FOREACH_ADAMW, UNSCALE_AND_CLIP = (80, 8), (20, 3)
FUSED_ADAMW = 28
WAYS = ("ours", "eager", "compiled")

Count = dict[str, int]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("-k", default="", help="only ops with this in their name")
    parser.add_argument("--no-steps", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found_ops: list[dict[str, Any]] = []
    found_steps: list[dict[str, Any]] = []

    for model in args.models:
        found_ops += count_ops(model, args.k)
        if not args.no_steps:
            found_steps += count_steps(model, *MODELS[model])
        if args.json:
            save(args.json, record("static", ceilings=CEILINGS, ops=found_ops, steps=found_steps))
    return 0


def count_ops(shape: str, text: str = "") -> list[dict[str, Any]]:
    """A row for each case of benchmarks/speed/ops.py in bfloat16: forward and backward pass for each way."""
    rows = []
    with FakeTensorMode():
        torch.manual_seed(0)
        sizes = ops.Sizes(shape, CPU, torch.bfloat16)
        for case in ops.cases(sizes):
            if text not in case.op:
                continue

            ops.choose("all", "reference")
            row: dict[str, Any] = {"op": case.op, "shape": case.shape, "moved": case.moved}
            row["flops"] = ops.count_flops(case)
            row["eager"] = [counter.total() for counter in eager_passes(case)]
            row["compiled"] = compiled_passes(case, sizes)
            with as_on_a_gpu():
                row["ours"] = [counter.total() for counter in eager_passes(case)]

            rows.append(row)
            ways = (f"{way} {[(p['launches'], round(p['bytes'] / 1e6)) for p in row[way]]}" for way in WAYS)
            print(f"{case.op:22s} {case.shape:16s} launches, MB: {'  '.join(ways)}", flush=True)
    return rows


def eager_passes(case: ops.Case) -> Iterator[Launches]:
    inputs = [tensor.detach().clone().requires_grad_(not case.forward_only) for tensor in case.inputs]
    with Launches() as forward:
        outputs = ops.flat(case.run(*inputs))
    yield forward
    outputs = [out for out in outputs if out.requires_grad]
    if outputs:
        upstream = [torch.empty_like(out) for out in outputs]
        with Launches() as backward:
            torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
        yield backward


def compiled_passes(case: ops.Case, sizes: ops.Sizes) -> list[Count]:
    """With the tensors that a case closes over as inputs: compiled graphs have no constants of this size."""
    cells = [cell for cell in getattr(case.run, "__closure__", None) or () if isinstance(cell.cell_contents, Tensor)]
    ids = ("visible_ids", "masked_ids")
    inputs = [tensor.detach().clone().requires_grad_(not case.forward_only) for tensor in case.inputs]
    kept = [cell.cell_contents for cell in cells]

    def run(own: list[Tensor], closed: list[Tensor], numbers: list[Tensor]) -> tuple[Tensor, ...]:
        for cell, tensor in zip(cells, closed, strict=True):
            cell.cell_contents = tensor
        with mock.patch.multiple(sizes, **dict(zip(ids, numbers, strict=True))):
            return tuple(ops.flat(case.run(*own)))

    try:
        return count(run, [inputs, kept, [getattr(sizes, name) for name in ids]])
    finally:
        for cell, tensor in zip(cells, kept, strict=True):
            cell.cell_contents = tensor


def count_steps(model: str, size: str, batch: int) -> list[dict[str, Any]]:
    """Tokenizer, forward, backward and optimizer of a whole step, for each way."""
    rows = []
    with FakeTensorMode(), mock.patch.object(nn.Module, "to", converted):
        cae = model_of(size)
        half = cae.encoder.grid**2 // 2
        tokenizer = fake_tokenizer()
        facts = {"model": model, "batch": batch, "flops_model": batch * pretraining_flops(cae, half)}
        facts["flops_all"] = facts["flops_model"] + batch * tokenizer.encode_flops(cae.encoder.grid, half)
        facts["parameters"] = sum(p.numel() for p in cae.parameters())

        # torch.compile leaves the optimizer's step to torch's fused kernel, as eager does.
        for way, function in (("ours", plain_step), ("eager", plain_step), ("original", original_step)):
            with as_on_a_gpu() if way == "ours" else reference_ops():
                parts = function(model_of(size), fake_tokenizer(), batch)
            counted = {name: part.total() | by_op(part) for name, part in parts.items()}
            rows.append(facts | {"way": way, "parts": counted})
            print_step(rows[-1])
        with reference_ops():
            compiled = compiled_step(size, batch, fake_tokenizer()) | {"optimizer": rows[1]["parts"]["optimizer"]}
        rows.append(facts | {"way": "compiled", "parts": compiled})
        print_step(rows[-1])
    return rows


def by_op(counter: Launches) -> dict[str, Any]:
    return {"by_op": {name: [counter.launches[name], moved] for name, moved in counter.moved.most_common(20)}}


def converted(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """nn.Module.to with new parameters: torch cannot change fake ones in place."""
    _, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)

    def convert(x: Tensor) -> Tensor:
        layout = {"memory_format": memory_format} if memory_format and x.ndim == 4 else {}
        return x.detach().to(dtype if dtype and x.is_floating_point() else x.dtype, **layout)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(convert(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else convert(buffer)
    return module


def model_of(size: str, depth: int | None = None) -> ContextAutoencoder:
    with mock.patch("cae_fast.models.cae.initialize"):  # it looks at the numbers that it draws
        return ContextAutoencoder(ModelConfig(size=size, depth=depth), 8192, predict_codes=True)


def fake_tokenizer() -> DalleTokenizer:
    return DalleTokenizer(DalleEncoder().eval(), None, CPU, torch.float16)


@contextmanager
def reference_ops() -> Iterator[None]:
    with mock.patch.dict(os.environ, {"CAE_KERNELS": "all=reference"}):
        yield


def step_inputs(grid: int, patch: int, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    ids = torch.zeros(batch, grid**2 // 2, dtype=torch.int64)
    return {
        "images": torch.zeros(batch, 3, grid * patch, grid * patch, dtype=dtype),
        "visible_ids": ids,
        "masked_ids": ids.clone(),
        "token_images": torch.zeros(batch, 3, 8 * grid, 8 * grid, dtype=torch.uint8),
    }


def plain_step(cae: ContextAutoencoder, tokenizer: DalleTokenizer, batch: int) -> dict[str, Launches]:
    """Ours, by whatever backends are chosen."""
    engine = Engine(cae, OptimConfig(), "bfloat16", CPU, accumulation=1)
    inputs = step_inputs(cae.encoder.grid, cae.shape.patch_size, batch, torch.bfloat16)
    shape = cae.shape
    keep = torch.ones(2 * (2 * shape.depth + shape.regressor_depth + shape.decoder_depth), batch)

    with Launches() as encoding:
        codes = tokenizer.encode(inputs["token_images"], inputs["masked_ids"])
    with Launches() as forward:
        losses = engine(inputs["images"], inputs["visible_ids"], inputs["masked_ids"], codes, keep)
    with Launches() as backward:
        engine.backward(losses.total)

    # Our AdamW is one kernel, counted by what it moves; the baselines' is torch's fused one.
    ours = os.environ.get("CAE_KERNELS") == ""
    parameters = sum(master.numel() for master in engine.masters)
    if not ours:
        engine.step = TorchAdamW(engine)  # type: ignore[method-assign]

    def by_kernel(*_: Any, **__: Any) -> None:
        update.add("adamw", FUSED_ADAMW * parameters)

    has_copies = mock.patch.object(AdamWState, "has_copies", return_value=True)  # it would ask for addresses
    kernel = mock.patch("cae_fast.training.engine.adamw", by_kernel) if ours else nullcontext()
    with kernel, has_copies, Launches() as update:
        engine.step(1e-4)
    return {"tokenizer": encoding, "forward": forward, "backward": backward, "optimizer": update}


def original_step(cae: ContextAutoencoder, tokenizer: DalleTokenizer, batch: int) -> dict[str, Launches]:
    def rates(rate: float, depth: int) -> list[float]:
        return [rate * i / (depth - 1) for i in range(depth)]

    with mock.patch("benchmarks.speed.original_step.drop_path_rates", rates):  # fake tensors have no numbers
        original = OriginalCAE.of(cae)
    grid = cae.encoder.grid
    inputs = step_inputs(grid, cae.shape.patch_size, batch, torch.float32)
    encoder = OriginalTokenizer(tokenizer.encoder)
    mask = torch.zeros(batch, grid**2, dtype=torch.bool)

    with Launches() as encoding:
        labels = encoder(torch.zeros(batch, 3, 8 * grid, 8 * grid), torch.float16)[mask]
    with Launches() as forward, torch.autocast("cpu", torch.float16):
        logits, latents, target = original(inputs["images"], mask)
        main = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss = main + 2 * torch.nn.functional.mse_loss(latents.float(), target.float())
    with Launches() as backward:
        loss.backward()

    # By the constants above: the scaler asks for numbers, which fake tensors do not have.
    update = Launches()
    parameters = sum(p.numel() for p in original.parameters() if p.requires_grad)
    for per_parameter, launches in (FOREACH_ADAMW, UNSCALE_AND_CLIP):
        update.add("foreach", per_parameter * parameters, launches)
    return {"tokenizer": encoding, "forward": forward, "backward": backward, "optimizer": update}


def compiled_step(size: str, batch: int, tokenizer: DalleTokenizer) -> dict[str, Count]:
    """Forward and backward at two depths of the encoder, continued in a straight line to the whole depth."""
    low, high = (compiled_passes_of_depth(size, batch, depth) for depth in COMPILED_DEPTHS)
    depth = model_of(size).shape.depth
    blocks = (depth - COMPILED_DEPTHS[0]) / (COMPILED_DEPTHS[1] - COMPILED_DEPTHS[0])
    parts = {}
    for name, first, second in zip(("forward", "backward"), low, high, strict=True):
        parts[name] = {key: round(first[key] + blocks * (second[key] - first[key])) for key in first}

    grid = 14 if size == "large" else 16
    inputs = step_inputs(grid, 8, batch, torch.bfloat16)
    holder = nn.Module()  # so that weights are inputs of the graph, not constants
    holder.encoder = tokenizer.encoder
    holder.forward = tokenizer.encode  # type: ignore[method-assign]
    encode = partial(torch.func.functional_call, holder)
    state = dict(holder.named_parameters())
    (encoding,) = count(encode, [state, (inputs["token_images"], inputs["masked_ids"])])
    return {"tokenizer": encoding} | parts


def compiled_passes_of_depth(size: str, batch: int, depth: int) -> list[Count]:
    cae = model_of(size, depth).to(torch.bfloat16)
    inputs = step_inputs(cae.encoder.grid, cae.shape.patch_size, batch, torch.bfloat16)
    state = {name: p.detach().requires_grad_() for name, p in cae.named_parameters()}
    state |= dict(cae.named_buffers())
    keep = torch.ones(2 * (2 * depth + 8), batch)
    codes = inputs["masked_ids"].clone()

    def run(weights: dict[str, Tensor], *given: Tensor) -> Tensor:
        return torch.func.functional_call(cae, weights, given).total

    return count(run, [state, inputs["images"], inputs["visible_ids"], inputs["masked_ids"], codes, keep])


def print_step(row: dict[str, Any]) -> None:
    parts = row["parts"]
    cells = (f"{name} {part['launches']} launches {part['bytes'] / 1e9:.1f} GB" for name, part in parts.items())
    total = {key: sum(part[key] for part in parts.values()) for key in ("launches", "bytes", "other_bytes")}
    print(
        f"{row['model']} {row['way']:9s} {total['launches']} launches, {total['bytes'] / 1e9:.1f} GB "
        f"(without products {total['other_bytes'] / 1e9:.1f}): {', '.join(cells)}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
