"""What a pretraining step reads, on CUDA made while the step before it runs.

B micro-batch, S image side, Nv visible, Nm masked, P values of a patch, D width, L residual branches.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Inputs = TypeVar("Inputs", bound=Sequence[Tensor])


class StepInputs(NamedTuple):
    """One micro-batch, in the order of the model's arguments."""

    images: Tensor
    """Normalized, in the type of the training (B, 3, S, S)."""
    visible_ids: Tensor
    """int64 (B, Nv)."""
    masked_ids: Tensor
    """int64 (B, Nm)."""
    targets: Tensor
    """float32 pixels (B, Nm, P) or features (B, Nm, D), or codes int64 (B, Nm)."""
    keep: Tensor
    """Drop-path factors float32 (L, B)."""


def grouped(items: Generator[Item, None, None], size: int) -> Generator[list[Item], None, None]:
    """Lists of `size` items: the micro-batches of each step. Closes what it reads."""
    with closing(items):
        while group := list(islice(items, size)):
            yield group


def inputs_ahead(
    steps: Generator[list[Item], None, None], make_inputs: Callable[[Item], Inputs], device: torch.device
) -> Generator[tuple[list[Inputs], float], None, None]:
    """For every step its micro-batches' inputs, and the seconds that the host spent waiting for the data.

    A step's inputs are handed over as soon as they are there; only then, with that step launched, the next batch is
    asked for: a late batch never delays a step whose inputs are ready. On CUDA `make_inputs` (the copy to the device,
    the tokenizer and all else) runs on a stream of its own, beside the step before. Closes what it reads.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # it wrote the tokenizer's weights

    with closing(steps):
        while True:
            began = time.perf_counter()
            batches = next(steps, None)
            waited = time.perf_counter() - began
            if batches is None:
                return

            with torch.cuda.stream(stream), torch.no_grad(), torch.profiler.record_function("inputs"):
                inputs = [make_inputs(batch) for batch in batches]
            if stream is not None:
                hand_over(inputs, stream.record_event(), torch.cuda.current_stream(device))
            del batches  # a batch that stays pinned, or on the device, while the step runs helps nobody
            yield inputs, waited


def hand_over(inputs: Sequence[Sequence[Tensor]], ready: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Let `stream` read tensors of another stream: after `ready`, and with their memory kept until it is done."""
    stream.wait_event(ready)
    for tensor in (tensor for part in inputs for tensor in part):
        tensor.record_stream(stream)
