"""Prediction head and its loss: logits = x W^T + b, loss = mean(-log softmax(logits)[target]) in float32.

    d_logits = (softmax(logits) - onehot(target)) / count,  count = number of rows whose target is not IGNORED
    d_x = d_logits W,  d_W = d_logits^T x,  d_b = sum over rows of d_logits

cuBLAS makes the three products. One kernel holds a row of logits on chip and computes its loss, its top-1 hit and its
share of d_b, and overwrites it with its gradient, so the forward pass reads and writes each logit once and float32
logits never exist. The gradients are finished in the forward pass and multiplied by the upstream scalar, on the
device, in the backward pass; what stays in memory between the two is d_x, d_W and d_b.

Rounding: logits and d_logits are rounded to x's dtype once. With more than one chunk of rows, each chunk's d_W is
rounded to the weight's dtype, their sum is float32 and rounded once more. d_b is summed in float32 from unrounded
gradients. The order of all sums is fixed.

M rows, D width, V codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import backend
from .linear_argmax import linear_argmax
from .parts.registration import fused_op
from .parts.triton_language import tl, triton

LOGITS_BYTES = 25_088 * 8_192 * 2  # of one chunk: ViT-L at batch 256 in bfloat16 is one chunk of 0.41 GB
PROGRAMS = 264  # 2 for each of an H100's 132 processors; fixed, so that sums do not depend on the device
MOST_CODES = 16_384  # a row and its part of d_b in the registers of 16 warps
IGNORED = -100  # as in torch
_IGNORED = tl.constexpr(IGNORED)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # loss, accuracy, d_x, d_weight, d_bias; empty if unwanted


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weight, bias).to(torch.promote_types(x.dtype, torch.float32))  # (M, V)
    loss = F.cross_entropy(logits, target, ignore_index=IGNORED)
    with torch.no_grad():
        counted = target != IGNORED
        accuracy = ((logits.argmax(-1) == target) & counted).sum() / counted.sum()
    return loss, accuracy


def linear_cross_entropy_gradients_reference(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, with_gradients: bool
) -> Results:
    loss, accuracy = linear_cross_entropy_reference(x, weight, bias, target)
    if not with_gradients:
        return loss, accuracy, x.new_empty(0), x.new_empty(0), x.new_empty(0)

    counted = target != IGNORED
    d_logits = F.linear(x, weight, bias).to(loss.dtype).softmax(-1)
    d_logits -= F.one_hot(target.where(counted, 0), len(weight))
    d_logits = d_logits.mul_(torch.where(counted, 1 / counted.sum(), 0.0)[:, None]).to(x.dtype)  # (M, V)
    return loss, accuracy, d_logits @ weight, d_logits.t() @ x, d_logits.sum(0)


@triton.jit
def _kernel(
    logits,  # (rows, V), contiguous; becomes its gradient
    target, count,  # (rows,) int64; int64 scalar, the rows that count in all chunks
    statistics,  # (programs, 2) float32, sums of losses and hits
    d_bias,  # (programs, V) float32
    rows, codes,  # of this chunk; V
    HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    step = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    valid = column < codes
    scale = 1.0 / tl.load(count).to(tl.float32)
    loss = 0.0
    hits = 0.0
    total = tl.zeros((BLOCK,), tl.float32)

    for row in range(program, rows, step):
        here = logits + tl.cast(row, tl.int64) * codes
        x = tl.load(here + column, mask=valid, other=float("-inf")).to(tl.float32)
        code = tl.load(target + row)
        counted = code != _IGNORED
        # Read before the row is overwritten: the barriers of the reductions lie between.
        chosen = tl.load(here + code, mask=(code >= 0) & (code < codes), other=float("nan")).to(tl.float32)
        largest = tl.max(x, 0)
        if counted & (chosen == largest):
            hits += tl.where(tl.min(tl.where(x == largest, column, BLOCK), 0) == code, 1.0, 0.0)

        # Subtracting before scaling is exact near the largest logit, however large that is.
        weights = tl.exp2((x - largest) * LOG2_E)
        norm = tl.sum(weights, 0)
        loss += tl.where(counted, tl.log2(norm) * LN_2 - (chosen - largest), 0.0)
        if HAS_GRADIENT:
            unit = tl.where(counted, scale, 0.0)
            gradient = weights * (unit / norm) - tl.where(column == code.to(tl.int32), unit, 0.0)
            tl.store(here + column, gradient.to(logits.dtype.element_ty), mask=valid)
            total += gradient

    tl.store(statistics + 2 * program, loss)
    tl.store(statistics + 2 * program + 1, hits)
    if HAS_GRADIENT:
        tl.store(d_bias + program.to(tl.int64) * codes + column, total, mask=valid)


def _chunk_rows(rows: int, codes: int, element_size: int) -> int:
    """Rows of a chunk: as few chunks as LOGITS_BYTES allows, of equal multiples of 128 rows (at least one)."""
    most = max(LOGITS_BYTES // (codes * element_size) // 128, 1) * 128
    chunks = max(triton.cdiv(rows, most), 1)
    return max(min(triton.cdiv(triton.cdiv(rows, chunks), 128) * 128, rows), 1)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, with_gradients: bool) -> Results:
    (rows, _), codes = x.shape, len(weight)
    step = _chunk_rows(rows, codes, x.element_size())
    starts = range(0, rows, step)
    programs = min(PROGRAMS, step)
    buffer = x.new_empty(step, codes)
    count = (target != IGNORED).sum()
    statistics = x.new_empty(len(starts), programs, 2, dtype=torch.float32)  # loss and hits
    size = 1 if with_gradients else 0
    partial = x.new_empty(size * programs, codes, dtype=torch.float32)
    d_x, d_weight, d_bias = x.new_empty(size * rows, x.shape[1]), None, None

    for chunk, start in enumerate(starts):
        part = x[start : start + step]  # (rows of the chunk, D)
        logits = torch.addmm(bias, part, weight.t(), out=buffer[: len(part)])
        _launch(logits, target[start:], count=count, statistics=statistics[chunk], d_bias=partial)
        if with_gradients:  # by now `logits` holds their gradient
            torch.mm(logits, weight, out=d_x[start : start + step])
            d_weight = _sum(d_weight, logits.t() @ part, len(starts))
            d_bias = _sum(d_bias, partial.sum(0), len(starts))

    loss, hits = statistics.sum((0, 1)).unbind()
    if d_weight is None or d_bias is None:
        return loss / count, hits / count, d_x.flatten(), weight.new_empty(0), bias.new_empty(0)
    return loss / count, hits / count, d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _sum(total: Tensor | None, part: Tensor, parts: int) -> Tensor:
    """Running float32 sum; a sum of one part stays as it is."""
    if parts == 1:
        return part
    return part.float() if total is None else total.add_(part)


def _launch(logits: Tensor, target: Tensor, *, count: Tensor, statistics: Tensor, d_bias: Tensor) -> None:
    """One chunk; where there is room in d_bias, its logits become their gradient."""
    rows, codes = logits.shape
    block, num_warps, maxnreg = _settings(codes, logits.dtype)
    _kernel[(len(statistics),)](
        logits=logits, target=target, count=count, statistics=statistics, d_bias=d_bias, rows=rows, codes=codes,
        HAS_GRADIENT=len(d_bias) > 0, BLOCK=block, num_warps=num_warps, maxnreg=maxnreg,
    )  # fmt: skip


def _settings(codes: int, dtype: torch.dtype) -> tuple[int, int, int | None]:
    """Codes of a block, warps, registers of a thread: at most 128 let two programs of 8 warps share a processor, so
    that one computes while the other waits for memory (float32 would spill)."""
    block = max(triton.next_power_of_2(codes), 128)
    return block, min(max(block // 1024, 4), 16), 128 if dtype is torch.bfloat16 else None


def _fake(x, weight, bias, target, with_gradients):
    scalars = x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.float32)
    if with_gradients:
        return *scalars, x.new_empty(x.shape), weight.new_empty(weight.shape), torch.empty_like(bias)
    return *scalars, x.new_empty(0), weight.new_empty(0), bias.new_empty(0)


def _gradients(_, d_loss: Tensor | None, d_x: Tensor, d_weight: Tensor, d_bias: Tensor) -> dict[str, Tensor]:
    return {} if d_loss is None else {"x": d_x * d_loss, "weight": d_weight * d_loss, "bias": d_bias * d_loss}


_linear_cross_entropy = fused_op(
    "linear_cross_entropy",
    run=_forward,
    reference=linear_cross_entropy_gradients_reference,
    fake=_fake,
    save=lambda outputs, *_: outputs[2:],
    gradients=_gradients,
    differentiable=1,
)


def _liger(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's loss; it keeps no logits, so the accuracy costs one more product and argmax."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(x, weight, target, bias=bias, ignore_index=IGNORED)
    with torch.no_grad():
        counted = target != IGNORED
        hits = (linear_argmax(x, weight, bias) == target) & counted
    return loss, hits.sum() / counted.sum()


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the rows whose target is not -100 (IGNORED), and the share of them predicted right.

    x: (M, D); weight: (V, D); bias: (V,), bfloat16 or float32, one dtype; target: (M,) int64. Returns two float32
    scalars; accuracy has no gradient. Of equal logits the first is the prediction. Where every row is ignored both are
    NaN and the gradients zero, as in torch. A target outside [0, V) makes the kernel's loss NaN.
    Raises ValueError where the kernel cannot hold V codes or has no such dtype.
    """
    chosen = backend("linear_cross_entropy", x)
    if chosen == "reference":
        return linear_cross_entropy_reference(x, weight, bias, target)
    if chosen == "liger":
        return _liger(x, weight, bias, target)

    if len(weight) > MOST_CODES or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"linear_cross_entropy has {len(weight)} codes in {x.dtype}; its kernel takes at most {MOST_CODES} in "
            "bfloat16 or float32; for others set CAE_KERNELS=linear_cross_entropy=reference"
        )
    with_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    loss, accuracy, *_ = _linear_cross_entropy(x, weight, bias, target, with_gradients)
    return loss, accuracy
