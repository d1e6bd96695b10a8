"""Inputs of steps: the same numbers, in the right order, on CUDA from a stream of their own."""

import pytest
import torch

from cae_fast.data.loader import Batch
from cae_fast.training.inputs import StepInputs, grouped, inputs_ahead


def batch(position: int, device: str = "cpu") -> Batch:
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    positions = torch.tensor([position])
    return Batch(torch.full((1, 3, 2, 2), position, dtype=torch.uint8), None, ids, ids, positions, positions)


def inputs(batch: Batch) -> StepInputs:
    images = batch.images.float() * 2
    return StepInputs(images, batch.visible_ids, batch.masked_ids, images.sum()[None], images[0, 0])


def test_every_step_once_and_the_next_batch_is_asked_for_after_the_step_began():
    """A batch that never comes must not hold up the step before it, whose inputs are there."""
    events = []

    def steps():
        for k in range(3):
            events.append(("asked", k))
            yield [batch(2 * k), batch(2 * k + 1)]

    def make(item: Batch) -> StepInputs:
        events.append(("made", int(item.positions)))
        assert not torch.is_grad_enabled()
        return inputs(item)

    for k, (micro_batches, waited) in enumerate(inputs_ahead(steps(), make, torch.device("cpu"))):
        events.append(("step", k))
        assert [part.targets.item() for part in micro_batches] == [48.0 * k, 48.0 * k + 24]
        assert waited >= 0
        assert torch.is_grad_enabled()
    assert events == [
        *[("asked", 0), ("made", 0), ("made", 1), ("step", 0)],
        *[("asked", 1), ("made", 2), ("made", 3), ("step", 1)],
        *[("asked", 2), ("made", 4), ("made", 5), ("step", 2)],
    ]


def test_no_steps():
    assert list(inputs_ahead((step for step in ()), inputs, torch.device("cpu"))) == []


def test_the_loaders_error_comes_through():
    def steps():
        yield [batch(0)]
        raise ValueError("no more files")

    ahead = inputs_ahead(steps(), inputs, torch.device("cpu"))
    assert next(ahead)[0][0].images.shape == (1, 3, 2, 2)
    with pytest.raises(ValueError, match="no more files"):
        next(ahead)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_streams_under_load_give_the_same_numbers():
    """Each step's inputs take long to make and each step long to read them: wrong waiting or early reuse shows."""
    device, size = torch.device("cuda"), 2048
    weight = torch.randn(size, size, device=device) / size**0.5

    def make(item: Batch) -> StepInputs:
        item = item.to(device)
        images = torch.full((size, size), float(item.positions), device=device)
        for _ in range(20):
            images = images @ weight
        images = images.zero_().add_(item.images.flatten()[0])
        return StepInputs(images, item.visible_ids, item.masked_ids, images.clone(), images[0].clone())

    steps = ([batch(k).pin_memory()] for k in range(30))
    seen = []
    for (part,), _ in inputs_ahead(steps, make, device):
        busy = weight
        for _ in range(20):
            busy = busy @ weight
        seen.append((part.images + part.targets + 0 * busy).double().mean())
    assert torch.stack(seen).tolist() == [2.0 * k for k in range(30)]


def test_groups_and_the_loader_ends_with_the_steps():
    closed = []

    def loader():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    groups = grouped(loader(), 3)
    ahead = inputs_ahead(groups, lambda number: (torch.tensor(number),), torch.device("cpu"))
    assert [int(part[0]) for part in next(ahead)[0]] == [0, 1, 2]
    ahead.close()
    assert closed == [True]
    assert list(grouped((i for i in range(4)), 2)) == [[0, 1], [2, 3]]
