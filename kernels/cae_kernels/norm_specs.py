"""Launches of the kernels that normalize rows, for `python -m cae_kernels.report`."""

from typing import Any

from . import qkv_norm_kernels
from .norm_rows import BACKWARD_LAUNCH, FORWARD_LAUNCH, STAGES, SUM_COLUMNS, SUM_ROWS, _sum_rows_kernel, block_of
from .report_spec import Spec
from .residual_norm import _backward_kernel, _forward_kernel

BYTES = {"bf16": 2, "fp32": 4}
NARROW = "mean, 1 / std, drop-path factor and patch number: one value a row"
FLOAT32 = "*fp32:16"


def integer(value: int) -> str:
    return "i32:16" if value % 16 == 0 else "i32"


def spec(name: str, kernel: Any, arguments: tuple, launch: tuple[int, int], traffic: int, **more: str) -> Spec:
    """arguments: the kernel's, in its order; launch: num_warps and programs; traffic: bytes."""
    signature = dict(zip(kernel.arg_names, arguments, strict=True))
    return Spec(name, kernel, signature, launch[0], 3, launch[1], 0, traffic, narrow=more.get("narrow", NARROW))


def report_specs() -> list[Spec]:
    """Every launch of a training step that differs in more than its row count; ViT-L B = 256 and ViT-H B = 128."""
    specs = []
    for model, batch, visible, width in (("ViT-L", 256, 98, 1024), ("ViT-H", 128, 128, 1280)):
        specs += _residual_specs(f"{model} bf16", batch, visible + 1, width, "bf16", "bf16")
        specs += _residual_specs(f"{model} float32 stream", batch, visible + 1, width, "fp32", "bf16")
        specs += _qkv_specs(f"{model} masked", batch, visible, width, True)
        specs += _qkv_specs(f"{model} context", batch, visible, width, False)
        programs = BACKWARD_LAUNCH[block_of(width)][2]
        sizes = (FLOAT32, "*bf16:16", integer(programs), "i32:16", "i32:16", width, SUM_ROWS, SUM_COLUMNS)
        traffic = programs * width * 3 * 4
        specs.append(spec(f"sum_rows {model}", _sum_rows_kernel, sizes, (4, width // SUM_COLUMNS * 3), traffic))
    return specs


def _residual_specs(name: str, batch: int, tokens: int, width: int, stream: str, branch: str) -> list[Spec]:
    """residual_norm inside a model, after its last block (the residual stream is not used), and layer_norm."""
    specs, rows, block = [], batch * tokens, block_of(width)
    x, y, one, both = f"*{stream}:16", f"*{branch}:16", BYTES[branch] * rows * width, BYTES[stream] * rows * width
    sizes = integer(rows), integer(tokens), integer(tokens * width), "i32:16"
    tile, warps = FORWARD_LAUNCH[block]
    launch, constants = (warps, -(-rows // tile)), (width, block, tile)
    update = (x, y, y, FLOAT32, y, y, x, y, FLOAT32, *sizes, "fp32", *constants)
    plain = (x, None, None, None, y, y, x, y, FLOAT32, *sizes, "fp32", *constants)
    specs.append(spec(f"residual_norm forward {name}", _forward_kernel, update, launch, 2 * (one + both)))
    specs.append(spec(f"layer_norm forward {name}", _forward_kernel, plain, launch, one + both))
    tile, warps, programs = BACKWARD_LAUNCH[block]
    launch, outs = (warps, programs), (x, y, FLOAT32, *sizes, width, block, tile, STAGES)
    inputs: tuple = (y, x, y, y, FLOAT32, y, FLOAT32, *outs)
    specs.append(spec(f"residual_norm backward {name}", _backward_kernel, (x, *inputs), launch, 3 * (one + both)))
    specs.append(spec(f"residual_norm last {name}", _backward_kernel, (None, *inputs), launch, 3 * one + 2 * both))
    inputs = None, y, x, None, None, None, y, FLOAT32, *outs
    specs.append(spec(f"layer_norm backward {name}", _backward_kernel, inputs, launch, one + 2 * both))
    return specs


def _qkv_specs(name: str, batch: int, tokens: int, width: int, masked: bool) -> list[Spec]:
    """The regressor's norms: of its masked queries after a residual update, and of the visible context."""
    rows, block = batch * tokens, block_of(width)
    y, ids = "*bf16:16", "*i64:16"
    branch, gamma, keep, q = (y, y, FLOAT32, y) if masked else (None, None, None, None)
    sizes = integer(rows), integer(tokens), integer((tokens + (not masked)) * width), "i32:16", integer(tokens)
    tile, warps = FORWARD_LAUNCH[block]
    inputs = y, branch, gamma, keep, y, ids
    forward = (*inputs, q, q, y, y, y, y, y, y, y, y, FLOAT32, *sizes, "fp32", width, block, tile)
    stream = 2 * rows * width
    kernel, launch = qkv_norm_kernels.forward_kernel, (warps, -(-rows // tile))
    specs = [spec(f"qkv_norm forward {name}", kernel, forward, launch, stream * (6 if masked else 3))]
    tile, warps, programs = BACKWARD_LAUNCH[block]
    d_x_new = y if masked else None
    backward = (d_x_new, q, y, y, *inputs, q, y, y, FLOAT32, y, y, FLOAT32, *sizes, width, block, tile, STAGES)
    kernel, launch = qkv_norm_kernels.backward_kernel, (warps, programs)
    return [*specs, spec(f"qkv_norm backward {name}", kernel, backward, launch, stream * (8 if masked else 4))]
