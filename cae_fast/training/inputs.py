"""What a pretraining step reads, made on the device while the step before it runs.

B micro-batch, S image side, Nv visible, Nm masked, P values of a patch, D width, L residual branches.
"""

import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cae_fast.data.loader import Batch


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


def inputs_ahead(
    steps: Iterator[list[Batch]], make_inputs: Callable[[Batch], StepInputs], device: torch.device
) -> Generator[tuple[list[StepInputs], float], None, None]:
    """For every step its micro-batches' inputs, and the seconds spent waiting for the data.

    The copy to the device, the tokenizer and all else in `make_inputs` run one step ahead; on CUDA on a stream of
    their own, so that they fill what the step leaves idle.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(device))  # it wrote the tokenizer's weights

    def start_next() -> tuple[list[StepInputs], float] | None:
        with torch.cuda.stream(stream), torch.no_grad():
            began = time.perf_counter()
            batches = next(steps, None)
            waited = time.perf_counter() - began
            if batches is None:
                return None
            with torch.profiler.record_function("inputs"):
                return [make_inputs(batch.to(device)) for batch in batches], waited

    current = start_next()
    while current is not None:
        ready = None if stream is None else stream.record_event()
        following = start_next()
        if ready is not None:
            hand_over(current[0], ready, torch.cuda.current_stream(device))
        yield current
        current = following


def hand_over(inputs: list[StepInputs], ready: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Let `stream` read tensors of another stream: after `ready`, and with their memory kept until it is done."""
    stream.wait_event(ready)
    for tensor in (tensor for part in inputs for tensor in part):
        tensor.record_stream(stream)
