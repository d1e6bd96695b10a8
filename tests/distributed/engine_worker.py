"""One process of an engine's test: trains a small model in the ways named, process 0 writes what came out.

python engine_worker.py OUT_DIR CASES_JSON; cases: {name: {settings of `Case`}}.
"""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cae_fast.config import ModelConfig, OptimConfig, PretrainConfig, TrainConfig
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.training.distributed import World, joined, read_world
from cae_fast.training.zero_engine import AnyEngine, make_engine
from cae_kernels import drop_path_scales, random_mask
from host_reads import NoHostReads

CPU = torch.device("cpu")
GLOBAL_BATCH = 8
PATCHES = 16


@dataclass
class Case:
    zero: int = 0
    precision: str = "float32"
    accumulation: int = 1
    steps: int = 10
    clip: float = 1.0
    align: bool = True
    offload: bool = False
    activation_checkpointing: bool = False
    overlay: str | None = None
    watched: bool = False
    """Fail where the last step waits for the device."""
    poison: int | None = None
    """A step in which the last process's images hold a NaN."""
    even: bool = False
    """Widths that are multiples of 16, else some that 2 and 4 do not divide."""
    load: str | None = None
    seed: int = 0


def make(case: Case, world: World) -> AnyEngine:
    torch.manual_seed(case.seed)
    shape = ModelConfig(size="tiny", image_size=16, depth=2, regressor_depth=2, decoder_depth=2, drop_path_rate=0.3)
    shape.embed_dim, shape.decoder_embed_dim = (48, 32) if case.even else (36, 28)
    shape.num_heads, shape.decoder_num_heads = (4, 4) if case.even else (5, 3)
    model = ContextAutoencoder(shape, 48, predict_codes=False, alignment_weight=2.0 if case.align else 0.0)
    model.checkpoint_blocks(case.activation_checkpointing)
    train = TrainConfig(
        zero=case.zero,
        precision=case.precision,
        global_batch_size=GLOBAL_BATCH,
        offload_optimizer=case.offload,
        deepspeed=case.overlay,
    )
    config = PretrainConfig(train=train, optim=OptimConfig(clip_grad_norm=case.clip))
    return make_engine(model, config, CPU, case.accumulation, world)


def images_of(positions: torch.Tensor) -> torch.Tensor:
    draws = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(int(i))) for i in positions]
    return torch.stack(draws)


def micro_batches(case: Case, step: int, world: World, rates: torch.Tensor):
    share = GLOBAL_BATCH // world.size
    first = step * GLOBAL_BATCH + world.rank * share
    for positions in torch.arange(first, first + share).split(share // case.accumulation):
        images = images_of(positions)
        visible_ids, masked_ids = random_mask(positions, seed=0, height=4, width=4, num_masked=8)
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        targets = patches.gather(1, masked_ids[..., None].expand(-1, -1, 48))
        if step == case.poison and world.rank == world.size - 1:
            images[0, 0, 0, 0] = torch.nan
        kind = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
        yield images.to(kind), visible_ids, masked_ids, targets, drop_path_scales(0, positions, rates)


def run(case: Case, world: World) -> tuple[dict, dict[str, torch.Tensor]]:
    engine = make(case, world)
    start = 0
    if case.load is not None:
        state = load_file(case.load)
        start = int(state["step"])
        engine.load_state(state)
    rates = torch.tensor(engine.module.branch_rates())
    result: dict[str, list] = {"losses": [], "norms": [], "skipped": []}
    for step in range(start, case.steps):
        losses = []
        batches = list(micro_batches(case, step, world, rates))
        with NoHostReads() if case.watched and step == case.steps - 1 else nullcontext():
            for inputs in batches:
                total = engine(*inputs).total
                engine.backward(total)
                losses.append(total.detach())
            norm, skipped = engine.step(1e-3)
        result["losses"].append(world.mean(torch.stack(losses).mean()).item())
        result["norms"].append(norm.item())
        result["skipped"].append(skipped.item())
    state = {name: tensor.detach().cpu().clone() for name, tensor in engine.state_items()}
    model = engine.model_state()
    if case.zero:
        engine.engine.destroy()
    return result, state | {f"model/{name}": tensor.clone() for name, tensor in model.items()}


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    with joined(read_world(), CPU, 60.0, alone=False) as world:
        for name, settings in cases.items():
            result, tensors = run(Case(**settings), world)
            (out / f"{name}.rank{world.rank}.json").write_text(json.dumps(result))
            if world.main:
                save_file(tensors, out / f"{name}.safetensors")
            world.on_main(lambda: None)  # the next case may load this one's file


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
