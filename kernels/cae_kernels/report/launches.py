"""Launches of a training step: ViT-L/16 at batch 256 (98 of 196 patches masked), ViT-H/14 at batch 128 (128 of 256).

Listed is every launch that differs from the others in more than its number of rows. Ops run on tensors without memory,
and what they would launch is recorded, so kernels are compiled for the arguments they get.

B images, n tokens, D width.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..parts.triton_language import triton
from .spec import Spec

MODELS = (("ViT-L", 256, 98, 1024, 64), ("ViT-H", 128, 128, 1280, 80))  # B, masked (as many visible), D, head width
HEADS, CODES = 16, 8192
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
KINDS = {BF16: "*bf16:16", FP16: "*fp16:16", FP32: "*fp32:16", torch.int64: "*i64:16", torch.int32: "*i32:16"}
ROW_VALUES = "mean, 1 / std, drop-path factor and patch number: one value a row"


def collect(text: str = "") -> list[Spec]:
    """The launches whose names contain `text`, ordered by op."""
    ops = (
        *(_adamw, _attention, _bias_relu, _cross_attention, _drop_path, _gather_tokens, _linear_argmax),
        *(_linear_cross_entropy, _linear_gelu, _masks, _norms, _squared_error),
    )
    return [spec for op in ops for spec in op() if text in spec.name]


def _spec(name: str, run: Callable[[], Any], moved: int, narrow: str = "", *, flops: int = 0, number: int = 0) -> Spec:
    """Launch `number` of those that `run` makes; moved: its compulsory bytes."""
    launches: list[tuple[Any, dict[str, Any], tuple[int, ...]]] = []

    def record(kernel: Any, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        launches.append((kernel, arguments, grid))

    with mock.patch.object(triton.runtime.JITFunction, "run", record):
        run()
    kernel, arguments, grid = launches[number]
    options = {key: value for key, value in arguments.items() if key not in kernel.arg_names}
    return Spec(
        name,
        kernel,
        {parameter.name: _kind(parameter, arguments[parameter.name]) for parameter in kernel.params},
        num_warps=options.pop("num_warps", 4),
        num_stages=options.pop("num_stages", 3),
        programs=math.prod(grid),
        bytes=moved,
        flops=flops,
        options={key: value for key, value in options.items() if value is not None},
        narrow=narrow,
    )


def _kind(parameter: Any, value: Any) -> Any:
    """What Triton compiles for: types, multiples of 16, and constants, 1 among them."""
    if isinstance(value, Tensor):
        return KINDS[value.dtype]
    if parameter.is_constexpr or value is None:
        return value
    if isinstance(value, float):
        return "fp32"
    if parameter.do_not_specialize:
        return "i32"
    return 1 if value == 1 else "i32:16" if value % 16 == 0 else "i32"


def _op(name: str) -> Any:
    """The module of an op; in the package, its name is the function's."""
    return import_module(f"cae_kernels.{name}")


def _new(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _adamw() -> Iterator[Spec]:
    op, masters = _op("adamw"), [torch.zeros(5), torch.zeros(7)]  # the kernel takes tables of addresses
    step = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-8, "clip_factor": torch.zeros(()), "skip": torch.zeros(())}
    for model, parameters in (("ViT-L", 412_320_768), ("ViT-H", 798_427_392)):
        for name, weights in (("bf16", [master.to(BF16) for master in masters]), ("fp32", masters)):
            state = op.adamw_state(masters, weights, [0.0, 0.0])
            narrow = "a parameter's last chunk has a mask of unknown length"
            spec = _spec(f"adamw {model} {name}", partial(op._launch, state, weights, **step), 28 * parameters, narrow)
            yield replace(spec, programs=triton.cdiv(parameters, op.CHUNK))


def _attention() -> Iterator[Spec]:
    """A class token and 98 or 128 patches; 128 patches in the decoder."""
    op = _op("attention")
    for model, batch, n, width in (("ViT-L", 256, 99, 64), ("ViT-H", 128, 129, 80), ("ViT-H decoder", 128, 128, 80)):
        out, qkv = _new(batch, n, HEADS, width), _new(batch, n, 3, HEADS, width)
        narrow = "the class token's rows" if op.tile_of(n)[1] else ""
        stream, product = 2 * out.numel(), 2 * out.numel() * n  # bytes of a pass; FLOPs
        forward, backward = partial(op._forward, qkv, 0.1), partial(op._backward, out, qkv, 0.1)
        yield _spec(f"attention forward {model}", forward, 4 * stream, narrow, flops=2 * product)
        yield _spec(f"attention backward {model}", backward, 7 * stream, narrow, flops=5 * product)


def _bias_relu() -> Iterator[Spec]:
    """DALL-E's encoder for 256 images of 112 px: every kind of launch in the first group, and the last one."""
    op = _op("bias_relu")
    for name, channels, side, with_residual, with_total, pool in (
        ("hidden", 64, 112, False, False, False),
        ("input", 256, 112, False, True, False),
        ("block", 256, 112, True, True, False),
        ("pool", 256, 112, True, True, True),
        ("last", 2048, 14, True, False, False),
    ):
        x, bias = _new(256, side, side, channels, dtype=FP16).permute(0, 3, 1, 2), _new(channels, dtype=FP16)
        out = op._new(x, pool)
        moved = 2 * ((1 + with_residual) * x.numel() + (1 + with_total) * out.numel())
        residual, total = x if with_residual else None, out if with_total else None
        run = partial(op._launch, x, bias, residual, total=total, out=out, pool=pool)
        yield _spec(f"bias_relu {name} {channels}", run, moved)


def _cross_attention() -> Iterator[Spec]:
    """As many masked queries as visible and as masked keys."""
    op = _op("cross_attention")
    for model, batch, n, _, width in MODELS:
        x = _new(batch, n, HEADS, width)
        stream, product, inputs = 2 * x.numel(), 2 * x.numel() * 2 * n, op.Inputs(*(x,) * 5, 0.1)
        narrow = "the last 16 columns of 64 keys: 8 bytes a thread" if width == 80 else ""
        forward, backward = partial(op._forward, inputs), partial(op._backward, x, inputs)
        yield _spec(f"cross_attention forward {model}", forward, 6 * stream, narrow, flops=2 * product)
        yield _spec(f"cross_attention backward {model}", backward, 11 * stream, flops=5 * product)


def _drop_path() -> Iterator[Spec]:
    """ViT-L: 24 + 4 + 4 blocks of two branches, the regressor's of two as well."""
    run = partial(_op("drop_path")._launch, 1, _new(256, dtype=torch.int64), _new(64, dtype=FP32))
    narrow = "one number a branch and sample, 64 KB in all"
    yield _spec("drop_path ViT-L B256", run, 256 * 8 + 64 * 256 * 4, narrow)


def _gather_tokens() -> Iterator[Spec]:
    op, narrow = _op("gather_tokens"), "patch numbers: one value a row"
    for model, batch, n, width, _ in MODELS:
        patches, ids, row = _new(batch, 2 * n, width), _new(batch, n, dtype=torch.int64), 2 * batch * width
        forward = partial(op._forward, patches, ids, ids, _new(1, 1, width), _new(2 * n + 1, width))
        backward = partial(op._backward, _new(batch, n + 1, width), ids, 2 * n, BF16, BF16)
        yield _spec(f"gather_tokens forward {model}", forward, row * 2 * (2 * n + 1), narrow)
        yield _spec(f"gather_tokens backward {model}", backward, row * 3 * n, narrow)


def _linear_argmax() -> Iterator[Spec]:
    """Requested rows of the DALL-E tokenizer's head (2048 -> 8192)."""
    op, narrow = _op("linear_argmax"), "row numbers and bias, once per row block and tile of codes"
    for model, batch, n, _, _ in MODELS:
        rows, count = _new(batch * n, dtype=torch.int64), batch * n
        for name, dtype in (("fp16", FP16), ("bf16", BF16), ("fp32", FP32)):
            x, weight, bias = (_new(*shape, dtype=dtype) for shape in ((2 * count, 2048), (CODES, 2048), (CODES,)))
            run, moved = partial(op._forward, x, weight, bias, rows), (count + CODES) * 2048 * dtype.itemsize
            yield _spec(f"linear_argmax {model} {name}", run, moved, narrow, flops=2 * count * 2048 * CODES)
            if dtype is FP16:
                splits, _ = op._splits(triton.cdiv(count, op.HALF_LAUNCH[0]), CODES // op.HALF_LAUNCH[1])
                why, moved = "a block has two numbers for each thread", count * (8 * splits + 8)
                yield _spec(f"linear_argmax select {model}", run, moved, why, number=1)


def _linear_cross_entropy() -> Iterator[Spec]:
    """On the logits, with gradients and without."""
    op, narrow = _op("linear_cross_entropy"), "a row's target and its logit are single numbers"
    for model, batch, n, _, _ in MODELS:
        target, count = (_new(*shape, dtype=torch.int64) for shape in ((batch * n,), ()))
        for name, dtype in (("bf16", BF16), ("fp32", FP32)):
            logits = _new(batch * n, CODES, dtype=dtype)
            for kind, gradient in (("gradient", True), ("evaluation", False)):
                partials = _new(op.PROGRAMS * gradient, CODES, dtype=FP32)
                statistics = _new(op.PROGRAMS, 2, dtype=FP32)
                run = partial(op._launch, logits, target, count=count, statistics=statistics, d_bias=partials)
                moved = logits.nbytes * (1 + gradient) + partials.nbytes
                yield _spec(f"linear_cross_entropy {model} {name} {kind}", run, moved, narrow)


def _linear_gelu() -> Iterator[Spec]:
    """F = 4 D, with the class token."""
    op = _op("linear_gelu")
    for model, batch, n, width, _ in MODELS:
        pre, bias = _new(batch * (n + 1), 4 * width), _new(4 * width)
        forward, backward = partial(op._forward, pre, bias), partial(op._backward, pre, pre, bias)
        partials = 4 * 4 * width * op._strips(*pre.shape)[0]
        narrow = "the bias and its partial sum, once a program"
        yield _spec(f"linear_gelu forward {model}", forward, 2 * pre.nbytes, "the bias, once a tile")
        yield _spec(f"linear_gelu backward {model}", backward, 3 * pre.nbytes + partials, narrow)


def _masks() -> Iterator[Spec]:
    narrow = "ids go where their ranks say, a few KB an image"
    for model, batch, n, _, _ in MODELS:
        positions, side = _new(batch, dtype=torch.int64), math.isqrt(2 * n)
        grid = {"height": side, "width": side, "num_masked": n}
        law = {"min_block": 16, "max_block": n, "min_aspect": 0.3, "max_proposals": 4096}
        block = partial(_op("block_mask")._launch, positions, seed=1, **grid, **law)
        random = partial(_op("random_mask")._launch, positions, 1, 2 * n, n)
        for name, run in (("block_mask", block), ("random_mask", random)):
            yield _spec(f"{name} {model} B{batch}", run, 8 * batch * (2 * n + 1), narrow)


def _norms() -> Iterator[Spec]:
    for model, batch, n, width, _ in MODELS:
        yield from _residual_norm(f"{model} bf16", _new(batch, n + 1, width))
        yield from _residual_norm(f"{model} float32 stream", _new(batch, n + 1, width, dtype=FP32))
        yield from _qkv_norm(f"{model} masked", _new(batch, n, width), masked=True)
        yield from _qkv_norm(f"{model} context", _new(batch, n + 1, width)[:, 1:], masked=False)

        programs = _op("parts.rows").BACKWARD_LAUNCH[_op("parts.rows").block_of(width)][2]
        run = partial(_op("parts.rows").sum_rows, _new(3, programs, width, dtype=FP32), BF16)
        yield _spec(f"sum_rows {model}", run, programs * width * 3 * 4, ROW_VALUES)


def _residual_norm(name: str, x: Tensor) -> Iterator[Spec]:
    """residual_norm inside a model, after its last block (the residual stream is not used), and layer_norm."""
    op, (batch, _, width) = _op("residual_norm"), x.shape
    y, vector, stats = x.to(BF16), _new(width), _new(2, *x.shape[:2], dtype=FP32)
    one, both = y.nbytes, x.nbytes  # a pass over the branch, over the stream
    update = op.Inputs(x=x, branch=y, gamma=vector, keep=_new(batch, dtype=FP32), weight=vector, bias=vector, eps=1e-6)
    plain = update._replace(branch=None, gamma=None, keep=None)
    for kind, run, moved in (
        ("residual_norm forward", partial(op._forward, update), 2 * (one + both)),
        ("layer_norm forward", partial(op._forward, plain), one + both),
        ("residual_norm backward", partial(op._backward, x, y, stats, update), 3 * (one + both)),
        ("residual_norm last", partial(op._backward, None, y, stats, update), 3 * one + 2 * both),
        ("layer_norm backward", partial(op._backward, None, y, stats, plain), one + 2 * both),
    ):
        yield _spec(f"{kind} {name}", run, moved, ROW_VALUES)


def _qkv_norm(name: str, x: Tensor, *, masked: bool) -> Iterator[Spec]:
    """The regressor's norms: of its masked queries after a residual update, and of the visible context."""
    op, (batch, n, width) = _op("qkv_norm"), x.shape
    vector, grad, stats = _new(width), _new(*x.shape), _new(4, batch, n, dtype=FP32)
    inputs = op.Inputs(x, grad, vector, _new(batch, dtype=FP32), _new(2 * n, width), _new(batch, n, dtype=torch.int64),
                       *(vector,) * 6, 1e-6)  # fmt: skip
    if not masked:
        inputs = inputs._replace(branch=None, gamma=None, keep=None, weight_q=None, bias_q=None)
    forward, optional = partial(op._forward, inputs), grad if masked else None
    backward = partial(op._backward, optional, optional, grad, grad, stats, inputs)
    yield _spec(f"qkv_norm forward {name}", forward, grad.nbytes * (6 if masked else 3), ROW_VALUES)
    yield _spec(f"qkv_norm backward {name}", backward, grad.nbytes * (8 if masked else 4), ROW_VALUES)


def _squared_error() -> Iterator[Spec]:
    op = _op("squared_error")
    for model, batch, n, width, _ in MODELS:
        prediction, target = _new(batch, n, width), _new(batch, n + 1, width)[:, 1:]
        forward = partial(op._forward, prediction, target)
        backward = partial(op._backward, _new(dtype=FP32), prediction, target)
        yield _spec(f"squared_error forward {model} B{batch}", forward, 2 * prediction.nbytes)
        yield _spec(f"squared_error backward {model} B{batch}", backward, 3 * prediction.nbytes)
