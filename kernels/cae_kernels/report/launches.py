"""Launches of a training step: ViT-L/16 at batch 256 (98 of 196 patches masked), ViT-H/14 at batch 128 (128 of 256).

Listed is every launch that differs from the others in more than its number of rows.
"""

from collections.abc import Iterator
from typing import Any

import torch

from ..adamw import CHUNK, PIECE
from ..adamw import NUM_WARPS as ADAMW_WARPS
from ..adamw import _kernel as adamw_kernel
from ..attention import NUM_WARPS as ATTENTION_WARPS
from ..attention import _backward_kernel as attention_backward
from ..attention import _forward_kernel as attention_forward
from ..attention import constants_of
from ..bias_relu import BLOCK as BIAS_RELU_BLOCK
from ..bias_relu import NUM_WARPS as BIAS_RELU_WARPS
from ..bias_relu import _kernel as bias_relu_kernel
from ..block_mask import _block_kernel
from ..cross_attention import KEYS
from ..cross_attention import NUM_WARPS as CROSS_WARPS
from ..cross_attention import STAGES as CROSS_STAGES
from ..cross_attention import _backward_kernel as cross_backward
from ..cross_attention import _forward_kernel as cross_forward
from ..drop_path import BLOCK as DROP_PATH_BLOCK
from ..drop_path import _kernel as drop_path_kernel
from ..gather_tokens import IDS
from ..gather_tokens import LAUNCH as GATHER_LAUNCH
from ..gather_tokens import _backward_kernel as gather_backward
from ..gather_tokens import _forward_kernel as gather_forward
from ..linear_argmax import FLOAT_LAUNCH, HALF_LAUNCH, SELECT_BLOCK, splits_of
from ..linear_argmax import _kernel as argmax_kernel
from ..linear_argmax import _select_kernel as select_kernel
from ..linear_cross_entropy import PROGRAMS as CROSS_ENTROPY_PROGRAMS
from ..linear_cross_entropy import _kernel as cross_entropy_kernel
from ..linear_cross_entropy import settings as cross_entropy_settings
from ..linear_gelu import BACKWARD_TILE, FORWARD_TILE, forward_grid, strips_of
from ..linear_gelu import NUM_WARPS as GELU_WARPS
from ..linear_gelu import _backward_kernel as gelu_backward
from ..linear_gelu import _forward_kernel as gelu_forward
from ..parts.attention_tiles import most_registers, split_width, tile_rows
from ..parts.philox import STREAM_DROP_PATH, STREAM_MASK
from ..parts.rows import BACKWARD_LAUNCH, FORWARD_LAUNCH, STAGES, SUM_COLUMNS, SUM_ROWS, _sum_rows_kernel, block_of
from ..parts.triton_language import tl, triton
from ..qkv_norm import _backward_kernel as qkv_backward
from ..qkv_norm import _forward_kernel as qkv_forward
from ..random_mask import _random_kernel
from ..residual_norm import _backward_kernel as residual_backward
from ..residual_norm import _forward_kernel as residual_forward
from ..squared_error import NUM_WARPS as ERROR_WARPS
from ..squared_error import PROGRAMS as ERROR_PROGRAMS
from ..squared_error import _backward_kernel as error_backward
from ..squared_error import _forward_kernel as error_forward
from ..squared_error import tile_of as error_tile
from .spec import Spec

CODES = 8192
ROW_VALUES = "mean, 1 / std, drop-path factor and patch number: one value a row"


def collect(text: str = "") -> list[Spec]:
    """The launches whose names contain `text`, ordered by op."""
    ops = (
        *(_adamw, _attention, _bias_relu, _cross_attention, _drop_path, _gather_tokens, _linear_argmax),
        *(_linear_cross_entropy, _linear_gelu, _masks, _norms, _squared_error),
    )
    return [spec for op in ops for spec in op() if text in spec.name]


def _pointers(kind: str, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, f"*{kind}:16")


def _integers(**values: int) -> dict[str, Any]:
    """Triton compiles for multiples of 16 apart from other integers."""
    return {name: "i32:16" if value % 16 == 0 else "i32" for name, value in values.items()}


def _adamw() -> Iterator[Spec]:
    scalars = ("lr", "beta1", "share1", "log_beta1", "beta2", "share2", "log_beta2", "eps")
    signature = _pointers("i64", "addresses", "sizes", "chunk_tensors", "chunk_starts") | {"num_tensors": "i32"}
    signature |= _pointers("fp32", "decays", "clip_factor", "skip", "step") | dict.fromkeys(scalars, "fp32")
    signature |= {"ALIGNED": True, "CHUNK": CHUNK, "PIECE": PIECE}
    for model, parameters in (("ViT-L", 412_320_768), ("ViT-H", 798_427_392)):
        for name, gradient, weight in (("bf16", tl.bfloat16, tl.bfloat16), ("fp32", tl.float32, None)):
            yield Spec(
                f"adamw {model} {name}",
                adamw_kernel,
                signature | {"GRADIENT": gradient, "WEIGHT": weight},
                num_warps=ADAMW_WARPS,
                num_stages=3,
                programs=triton.cdiv(parameters, CHUNK),
                bytes=28 * parameters,
                narrow="a parameter's last chunk has a mask of unknown length",
            )


def _attention() -> Iterator[Spec]:
    """98 patches and a class token; 128 and a class token; 128 in the decoder."""
    strides = ("image", "row", "part", "head")
    for model, batch, n, heads, width in (
        ("ViT-L", 256, 99, 16, 64),
        ("ViT-H", 128, 129, 16, 80),
        ("ViT-H decoder", 128, 128, 16, 80),
    ):
        constants = constants_of(n, heads, width)
        common = dict.fromkeys(strides, "i32:16") | _integers(n=n) | {"scale": "fp32"} | constants
        forward = common | _pointers("bf16", "qkv", "out")
        backward = common | _pointers("bf16", "dout", "qkv", "dqkv")
        backward |= dict.fromkeys(("dout_image", "dout_row", "dout_head"), "i32:16")
        registers = {"maxnreg": most_registers(constants["ROWS"], split_width(width))}
        for name, kernel, signature, products, passes, options in (
            ("forward", attention_forward, forward, 2, 4, registers),
            ("backward", attention_backward, backward, 5, 7, {}),
        ):
            yield Spec(
                f"attention {name} {model}",
                kernel,
                signature,
                num_warps=ATTENTION_WARPS[constants["ROWS"]],
                num_stages=3,
                programs=batch * heads,
                bytes=passes * 2 * batch * n * heads * width,
                flops=products * 2 * batch * heads * n * n * width,
                options=options,
                narrow="the class token's rows" if constants["EXTRA"] else "",
            )


def _bias_relu() -> Iterator[Spec]:
    """DALL-E's encoder for 256 images of 112 px: every kind of launch in the first group, and the last one."""
    for name, channels, side, residual, total, pool in (
        ("hidden", 64, 112, False, False, False),
        ("input", 256, 112, False, True, False),
        ("block", 256, 112, True, True, False),
        ("pool", 256, 112, True, True, True),
        ("last", 2048, 14, True, False, False),
    ):
        elements = 256 * channels * side**2
        size = elements // 4 if pool else elements
        signature = _pointers("fp16", "x", "bias", "out") | {"size": "i32:16", "height": "i32", "width": "i32"}
        signature |= {"residual": "*fp16:16" if residual else None, "total": "*fp16:16" if total else None}
        yield Spec(
            f"bias_relu {name} {channels}",
            bias_relu_kernel,
            signature | {"CHANNELS": channels, "POOL": pool, "BLOCK": BIAS_RELU_BLOCK[pool]},
            num_warps=BIAS_RELU_WARPS,
            num_stages=1,
            programs=triton.cdiv(size, BIAS_RELU_BLOCK[pool]),
            bytes=2 * ((1 + residual) * elements + (1 + total) * size),
        )


def _cross_attention() -> Iterator[Spec]:
    """98 queries to 98 + 98 keys, and 128 to 128 + 128."""
    inputs = ("query", "k_visible", "v_visible", "k_masked", "v_masked")
    results = ("d_query", "dk_visible", "dv_visible", "dk_masked", "dv_masked")
    strides = [f"{tensor}_{axis}" for tensor in ("query", "visible", "masked") for axis in ("image", "row", "head")]
    for model, batch, n, heads, width in (("ViT-L", 256, 98, 16, 64), ("ViT-H", 128, 128, 16, 80)):
        (first, second), rows = split_width(width), tile_rows(n)
        common = _pointers("bf16", *inputs) | dict.fromkeys(strides, "i32:16") | _integers(n_visible=n, n_masked=n)
        common |= {"scale": "fp32", "H": heads, "C": width, "C1": first, "C2": second, "ROWS": rows}
        forward = common | {"out": "*bf16:16", "KEYS": KEYS, "STAGES": CROSS_STAGES}
        backward = common | _pointers("bf16", "dout", *results) | {"VISIBLE": rows}
        backward |= dict.fromkeys(("dout_image", "dout_row", "dout_head"), "i32:16")
        registers = {"maxnreg": most_registers(rows, (first, second))}
        narrow = "the last 16 columns of 64 keys: 8 bytes a thread" if second else ""
        for name, kernel, signature, products, passes, options, reason in (
            ("forward", cross_forward, forward, 2, 6, registers, narrow),
            ("backward", cross_backward, backward, 5, 11, {}, ""),
        ):
            yield Spec(
                f"cross_attention {name} {model}",
                kernel,
                signature,
                num_warps=CROSS_WARPS[rows],
                num_stages=3,
                programs=batch * heads,
                bytes=passes * 2 * batch * n * heads * width,
                flops=products * 2 * batch * heads * n * 2 * n * width,
                options=options,
                narrow=reason,
            )


def _drop_path() -> Iterator[Spec]:
    """ViT-L: 24 + 4 + 4 blocks of two branches, the regressor's of two as well."""
    signature = {"positions": "*i64:16"} | _pointers("fp32", "rates", "scales")
    signature |= {"seed_low": "i32", "seed_high": "i32", "batch": "i32:16", "branches": "i32:16"}
    yield Spec(
        "drop_path ViT-L B256",
        drop_path_kernel,
        signature | {"STREAM": STREAM_DROP_PATH, "BLOCK": DROP_PATH_BLOCK},
        num_warps=4,
        num_stages=1,
        programs=32,
        bytes=256 * 8 + 64 * 256 * 4,
        narrow="one number a branch and sample, 64 KB in all",
    )


def _gather_tokens() -> Iterator[Spec]:
    sizes = ("num_patches", "visible_tokens", "masked_tokens", "visible_stride", "masked_stride")
    for model, batch, patches, width in (("ViT-L", 256, 196, 1024), ("ViT-H", 128, 256, 1280)):
        visible, block = patches // 2, block_of(width)
        tile, num_warps = GATHER_LAUNCH[block]
        constants = {"D": width, "BLOCK": block, "ROWS": tile}
        forward = _pointers("bf16", "patches", "cls_token", "pos_embed", "visible", "masked") | constants
        forward |= _pointers("i64", "visible_ids", "masked_ids") | {"batch": "i32:16"} | dict.fromkeys(sizes, "i32")
        backward = _pointers("bf16", "d_visible", "d_patches") | {"visible_ids": "*i64:16", "IDS": IDS} | constants
        backward |= dict.fromkeys(("num_visible", "num_patches", "ids_stride"), "i32")
        for name, kernel, signature, programs, rows in (
            ("forward", gather_forward, forward, 2 * triton.cdiv(batch * (visible + 1), tile), 2 * (patches + 1)),
            ("backward", gather_backward, backward, batch * triton.cdiv(patches, tile), patches + visible),
        ):
            yield Spec(
                f"gather_tokens {name} {model}",
                kernel,
                signature,
                num_warps=num_warps,
                num_stages=3,
                programs=programs,
                bytes=2 * batch * width * rows,
                narrow="patch numbers: one value a row",
            )


def _linear_argmax() -> Iterator[Spec]:
    """Requested rows of the DALL-E tokenizer's head (2048 -> 8192)."""
    for model, count in (("ViT-L", 256 * 98), ("ViT-H", 128 * 128)):
        for dtype, size, launch in (("fp16", 2, HALF_LAUNCH), ("bf16", 2, HALF_LAUNCH), ("fp32", 4, FLOAT_LAUNCH)):
            rows, codes, width, num_warps, num_stages = launch
            row_blocks = triton.cdiv(count, rows)
            splits, _ = splits_of(row_blocks, triton.cdiv(CODES, codes))
            signature = _pointers(dtype, "x", "weight", "bias") | {"rows": "*i64:16", "values": "*fp32:16"}
            signature |= {"indices": "*i32:16", "WIDTH": 2048, "HAS_BIAS": True, "HAS_ROWS": True}
            signature |= dict.fromkeys(("count", "codes", "x_stride", "tiles"), "i32:16")
            yield Spec(
                f"linear_argmax {model} {dtype}",
                argmax_kernel,
                signature | {"TILE_ROWS": rows, "TILE_CODES": codes, "TILE_WIDTH": width},
                num_warps=num_warps,
                num_stages=num_stages,
                programs=row_blocks * splits,
                bytes=(count + CODES) * 2048 * size,
                flops=2 * count * 2048 * CODES,
                narrow="row numbers and bias, once per row block and tile of codes",
            )

        splits, _ = splits_of(triton.cdiv(count, HALF_LAUNCH[0]), CODES // HALF_LAUNCH[1])
        signature = {"values": "*fp32:16", "indices": "*i32:16", "out": "*i64:16", "count": "i32:16", "splits": "i32"}
        yield Spec(
            f"linear_argmax select {model}",
            select_kernel,
            signature | {"BLOCK": SELECT_BLOCK},
            num_warps=4,
            num_stages=1,
            programs=triton.cdiv(count, SELECT_BLOCK),
            bytes=count * (8 * splits + 8),
            narrow="a block has two numbers for each thread",
        )


def _linear_cross_entropy() -> Iterator[Spec]:
    """On the logits, with gradients and without."""
    for model, rows in (("ViT-L", 256 * 98), ("ViT-H", 128 * 128)):
        for dtype, kind, size in ((torch.bfloat16, "bf16", 2), (torch.float32, "fp32", 4)):
            block, num_warps, maxnreg = cross_entropy_settings(CODES, dtype)
            signature = _pointers(kind, "logits") | _pointers("i64", "target", "count") | {"BLOCK": block}
            signature |= _pointers("fp32", "statistics", "d_bias") | {"rows": "i32:16", "codes": "i32:16"}
            for gradient in (True, False):
                yield Spec(
                    f"linear_cross_entropy {model} {kind} {'gradient' if gradient else 'evaluation'}",
                    cross_entropy_kernel,
                    signature | {"HAS_GRADIENT": gradient},
                    num_warps=num_warps,
                    num_stages=1,
                    programs=CROSS_ENTROPY_PROGRAMS,
                    bytes=rows * CODES * size * (1 + gradient) + gradient * CROSS_ENTROPY_PROGRAMS * CODES * 4,
                    options={} if maxnreg is None else {"maxnreg": maxnreg},
                    narrow="a row's target and its logit are single numbers",
                )


def _linear_gelu() -> Iterator[Spec]:
    """99 tokens, F = 4096; 129 tokens, F = 5120."""
    for model, rows, columns in (("ViT-L", 256 * 99, 4096), ("ViT-H", 128 * 129, 5120)):
        common = _pointers("bf16", "pre", "bias") | {"rows": "i32:16", "columns": "i32:16"}
        row_tiles, column_tiles = forward_grid(rows, columns)
        yield Spec(
            f"linear_gelu forward {model}",
            gelu_forward,
            common | {"out": "*bf16:16", **FORWARD_TILE},
            num_warps=GELU_WARPS,
            num_stages=1,
            programs=row_tiles * column_tiles,
            bytes=2 * 2 * rows * columns,
            narrow="the bias, once a tile",
        )
        strips, _, column_tiles = strips_of(rows, columns)
        yield Spec(
            f"linear_gelu backward {model}",
            gelu_backward,
            common
            | _pointers("bf16", "d_out", "d_pre")
            | {"partial": "*fp32:16", "strip_rows": "i32", **BACKWARD_TILE},
            num_warps=GELU_WARPS,
            num_stages=1,
            programs=strips * column_tiles,
            bytes=3 * 2 * rows * columns + 4 * strips * columns,
            narrow="the bias and its partial sum, once a program",
        )


def _masks() -> Iterator[Spec]:
    shared = _pointers("i64", "positions", "visible_ids", "masked_ids")
    shared |= {"seed_low": "i32", "seed_high": "i32", "STREAM": STREAM_MASK, "BLOCK": 256}
    law = {"MIN_BLOCK": 16.0, "LOG_SLOPE": 1.2, "LOG_START": -0.6, "MAX_PROPOSALS": 4096}
    for model, batch, side, masked in (("ViT-L B256", 256, 14, 98), ("ViT-H B128", 128, 16, 128)):
        grid = {"HEIGHT": side, "WIDTH": side, "MAX_BLOCK": float(masked)}
        for name, kernel, constants in (
            ("block_mask", _block_kernel, law | grid),
            ("random_mask", _random_kernel, {"N": side * side}),
        ):
            yield Spec(
                f"{name} {model}",
                kernel,
                shared | constants | {"NUM_MASKED": masked},
                num_warps=1,
                num_stages=1,
                programs=batch,
                bytes=8 * batch * (side * side + 1),
                options={"enable_fp_fusion": False},
                narrow="ids go where their ranks say, a few KB an image",
            )


def _norms() -> Iterator[Spec]:
    for model, batch, visible, width in (("ViT-L", 256, 98, 1024), ("ViT-H", 128, 128, 1280)):
        yield from _residual_norm(f"{model} bf16", batch, visible + 1, width, stream="bf16")
        yield from _residual_norm(f"{model} float32 stream", batch, visible + 1, width, stream="fp32")
        yield from _qkv_norm(f"{model} masked", batch, visible, width, masked=True)
        yield from _qkv_norm(f"{model} context", batch, visible, width, masked=False)

        programs = BACKWARD_LAUNCH[block_of(width)][2]
        signature = {"x": "*fp32:16", "out": "*bf16:16", "set_stride": "i32:16", "row_stride": "i32:16"}
        yield Spec(
            f"sum_rows {model}",
            _sum_rows_kernel,
            signature | _integers(rows=programs) | {"D": width, "ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS},
            num_warps=4,
            num_stages=3,
            programs=width // SUM_COLUMNS * 3,
            bytes=programs * width * 3 * 4,
            narrow=ROW_VALUES,
        )


def _residual_norm(name: str, batch: int, tokens: int, width: int, *, stream: str) -> Iterator[Spec]:
    """residual_norm inside a model, after its last block (the residual stream is not used), and layer_norm."""
    rows, block = batch * tokens, block_of(width)
    one, both = 2 * rows * width, (2 if stream == "bf16" else 4) * rows * width  # bytes of a pass, of the stream's
    common = _integers(rows=rows, tokens=tokens, batch_stride=tokens * width) | {"row_stride": "i32:16"}
    common |= _pointers(stream, "x") | _pointers("bf16", "weight") | _pointers("fp32", "stats")
    common |= {"D": width, "BLOCK": block}
    update = _pointers("bf16", "branch", "gamma") | _pointers("fp32", "keep")
    plain = dict.fromkeys(update)

    tile, num_warps = FORWARD_LAUNCH[block]
    forward = common | _pointers("bf16", "bias", "normed") | _pointers(stream, "x_new") | {"eps": "fp32", "ROWS": tile}
    for op, arguments, moved in (
        ("residual_norm", update, 2 * (one + both)),
        ("layer_norm", plain, one + both),
    ):
        launch = _norm_launch(num_warps, triton.cdiv(rows, tile), moved)
        yield Spec(f"{op} forward {name}", residual_forward, forward | arguments, **launch)

    tile, num_warps, programs = BACKWARD_LAUNCH[block]
    backward = common | _pointers(stream, "d_x") | _pointers("bf16", "d_normed", "d_branch")
    backward |= {"partial": "*fp32:16", "ROWS": tile, "STAGES": STAGES, "d_x_new": None}
    for op, arguments, moved in (
        ("residual_norm backward", update | _pointers(stream, "d_x_new"), 3 * (one + both)),
        ("residual_norm last", update, 3 * one + 2 * both),
        ("layer_norm backward", plain, one + 2 * both),
    ):
        launch = _norm_launch(num_warps, programs, moved)
        yield Spec(f"{op} {name}", residual_backward, backward | arguments, **launch)


def _qkv_norm(name: str, batch: int, tokens: int, width: int, *, masked: bool) -> Iterator[Spec]:
    """The regressor's norms: of its masked queries after a residual update, and of the visible context."""
    rows, block, moved = batch * tokens, block_of(width), 2 * batch * tokens * width
    common = _integers(rows=rows, tokens=tokens, ids_stride=tokens, batch_stride=(tokens + (not masked)) * width)
    common |= {"row_stride": "i32:16", "ids": "*i64:16", "stats": "*fp32:16", "D": width, "BLOCK": block}
    common |= _pointers("bf16", "x", "pos_embed", "weight_k", "weight_v")
    optional = _pointers("bf16", "branch", "gamma", "weight_q") | _pointers("fp32", "keep")
    common |= optional if masked else dict.fromkeys(optional)

    tile, num_warps = FORWARD_LAUNCH[block]
    forward = common | _pointers("bf16", "bias_k", "bias_v", "x_new", "q", "k", "v") | {"eps": "fp32", "ROWS": tile}
    forward["bias_q"] = forward["weight_q"]
    launch = _norm_launch(num_warps, triton.cdiv(rows, tile), moved * (6 if masked else 3))
    yield Spec(f"qkv_norm forward {name}", qkv_forward, forward, **launch)

    tile, num_warps, programs = BACKWARD_LAUNCH[block]
    backward = common | _pointers("bf16", "d_k", "d_v", "d_x", "d_branch") | {"partial": "*fp32:16", "ROWS": tile}
    backward |= {"STAGES": STAGES, "d_q": common["weight_q"], "d_x_new": common["branch"]}
    launch = _norm_launch(num_warps, programs, moved * (8 if masked else 4))
    yield Spec(f"qkv_norm backward {name}", qkv_backward, backward, **launch)


def _norm_launch(num_warps: int, programs: int, moved: int) -> dict[str, Any]:
    return {"num_warps": num_warps, "num_stages": 3, "programs": programs, "bytes": moved, "narrow": ROW_VALUES}


def _squared_error() -> Iterator[Spec]:
    for model, batch, tokens, width in (("ViT-L B256", 256, 98, 1024), ("ViT-H B128", 128, 128, 1280)):
        (rows, block), count = error_tile(width), batch * tokens
        shared = _pointers("bf16", "prediction", "target") | _integers(num_rows=count, num_tokens=tokens)
        shared |= {"batch_stride": "i32:16", "token_stride": "i32:16", "share": "fp32"}
        shared |= {"D": width, "ROWS": rows, "BLOCK": block}
        backward = shared | {"grad": "*fp32:16", "out": "*bf16:16"}
        for name, kernel, signature, programs, passes in (
            ("forward", error_forward, shared | {"partial": "*fp32:16"}, ERROR_PROGRAMS, 2),
            ("backward", error_backward, backward, triton.cdiv(count, rows), 3),
        ):
            yield Spec(
                f"squared_error {name} {model}",
                kernel,
                signature,
                num_warps=ERROR_WARPS,
                num_stages=3,
                programs=programs,
                bytes=passes * 2 * count * width,
            )
