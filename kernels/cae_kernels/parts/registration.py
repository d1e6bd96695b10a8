"""Registration of a fused op: one call makes all that torch has to know about it.

Under torch.compile an op must be a registered one (torch.ops.cae.NAME) with a fake, which gives shapes, and autograd;
in eager mode a plain autograd.Function costs 10 to 20 us less a call. Both are made from the same functions here.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, infer_schema

from ..dispatch import custom_ops_wanted
from .triton_language import INTERPRETED

Function = Callable[..., Any]


@dataclass
class FusedOp:
    """What fused_op makes: call it with the inputs of `run`, one by one; it returns what `run` returns."""

    run: Function
    back: Function | None
    registered: CustomOpDef
    registered_back: CustomOpDef | None
    names: list[str]  # of the inputs
    save: Function | None
    gradients: Function | None
    differentiable: int | None

    def __call__(self, *inputs: Any) -> Any:
        if custom_ops_wanted():
            return self.registered(*inputs)
        return _Eager.apply(self, *inputs) if self.has_backward() else self.run(*inputs)

    def has_backward(self) -> bool:
        return self.back is not None or self.gradients is not None

    def remember(self, ctx: Any, inputs: tuple, output: Any) -> None:
        """After the forward pass: what the backward pass gets. torch calls it by these argument names."""
        outputs = output if isinstance(output, tuple) else (output,)
        saved = inputs if self.save is None else self.save(outputs, *inputs)
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in saved))
        ctx.others = [None if isinstance(value, Tensor) else value for value in saved]

        if self.differentiable is not None:
            ctx.mark_non_differentiable(*outputs[self.differentiable :])
        # An op that knows what to do without a gradient gets None instead of zeros made and read for it.
        ctx.set_materialize_grads(self.gradients is None)

    def pull(self, back: Function | None, ctx: Any, d_outputs: tuple) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs, None where there is none."""
        tensors = ctx.saved_tensors  # read once: activation checkpointing gives each of them once
        saved = [other if tensor is None else tensor for tensor, other in zip(tensors, ctx.others, strict=True)]

        if self.gradients is not None:
            found = self.gradients(back, *d_outputs[: self.differentiable], *saved)
        elif back is not None:
            first = back(*d_outputs, *saved)
            first = first if isinstance(first, tuple) else (first,)
            found = dict(zip(self.names[: len(first)], first, strict=True))
        return tuple(found.get(name) for name in self.names)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: FusedOp, *inputs):
        ctx.op = op
        output = op.run(*inputs)
        op.remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *d_outputs):
        return None, *ctx.op.pull(ctx.op.back, ctx, d_outputs)


def fused_op(
    name: str,
    *,
    run: Function,
    reference: Function,
    fake: Function,
    back: Function | None = None,
    back_reference: Function | None = None,
    save: Function | None = None,
    gradients: Function | None = None,
    differentiable: int | None = None,
) -> FusedOp:
    """Register `cae::NAME` and, where there is `back`, `cae::NAME_backward`; their schemas come from annotations.

    run: launches the forward kernels: inputs -> a tensor or a tuple of them, none of them an input.
    reference: the same in plain torch, where Triton does not run. fake: the same outputs, uninitialized.
    back: gradients of outputs, then what was saved -> contiguous gradients, by default of the first inputs.
    back_reference: the same in plain torch; it gives the shapes too.
    save(outputs, *inputs): tensors and constants for the backward pass, by default all inputs.
    gradients(back, gradients of outputs, *saved): dict from inputs' names to gradients where `back` alone is not
    enough; the gradient of an output that is not used is None (without `gradients`: zeros).
    differentiable: how many of the outputs have gradients, by default all; the rest are marked.
    A last parameter annotated with a NamedTuple stands for the fields of it.
    """
    run, back, gradients = _spread(run), back and _spread(back), gradients and _spread(gradients)
    registered, registered_back = _register(name, run, _spread(reference), _spread(fake)), None
    if back and back_reference:
        dense = _contiguous(_spread(back_reference))
        registered_back = _register(f"{name}_backward", back, dense, dense)
    names = list(inspect.signature(run).parameters)
    op = FusedOp(run, back, registered, registered_back, names, save, gradients, differentiable)
    if op.has_backward():
        registered.register_autograd(
            lambda ctx, *d_outputs: op.pull(registered_back, ctx, d_outputs), setup_context=op.remember
        )
    return op


def _register(name: str, run: Function, reference: Function, fake: Function) -> CustomOpDef:
    op = custom_op(f"cae::{name}", reference, mutates_args=(), schema=infer_schema(run, mutates_args=()))
    for device in ("cuda", "cpu") if INTERPRETED else ("cuda",):
        op.register_kernel(device, run)
    op.register_fake(fake)
    return op


def _contiguous(function: Function) -> Function:
    def dense(*inputs: Any) -> Any:
        found = function(*inputs)
        return tuple(x.contiguous() for x in found) if isinstance(found, tuple) else found.contiguous()

    return dense


def _spread(function: Function) -> Function:
    """`function` with the fields of a NamedTuple, its last parameter, as parameters of their own."""
    signature = inspect.signature(function)
    *first, last = signature.parameters.values()
    pack = last.annotation
    if not hasattr(pack, "_fields"):
        return function

    def spread(*values: Any) -> Any:
        return function(*values[: len(first)], pack(*values[len(first) :]))

    fields = [last.replace(name=name, annotation=kind) for name, kind in pack.__annotations__.items()]
    spread.__signature__ = signature.replace(parameters=[*first, *fields])  # type: ignore[attr-defined]
    return spread
