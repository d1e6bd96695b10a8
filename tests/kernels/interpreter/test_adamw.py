"""adamw's Triton kernel against torch's own AdamW and against the reference."""

import pytest
import torch
from repair import OutOfBounds, reachable

from cae_kernels.adamw import CHUNK, adamw, adamw_reference, adamw_state

SHAPES = [(3,), (CHUNK,), (2, CHUNK + 1), (85, 17), ()]
DECAYS = [0.0, 0.05, 0.05, 0.3, 0.0]
BETAS, EPS = (0.9, 0.98), 1e-8


def parameters():
    return [torch.randn(shape) for shape in SHAPES]


def tensors(state):
    return [*state.masters, *state.weights, *state.exp_avg, *state.exp_avg_sq]


def step(state, gradients, lr=1e-2, clip_factor=1.0, skip=0.0, betas=BETAS):
    with reachable(*tensors(state), *gradients):
        settings = {"lr": lr, "betas": betas, "eps": EPS}
        adamw(state, gradients, **settings, clip_factor=torch.tensor(clip_factor), skip=torch.tensor(skip))


def torch_adamw(masters, betas=BETAS):
    copies = [torch.nn.Parameter(master.clone()) for master in masters]
    groups = [{"params": [copy], "weight_decay": decay} for copy, decay in zip(copies, DECAYS, strict=True)]
    return copies, torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=EPS, fused=True)


@pytest.mark.parametrize("betas", [(0.9, 0.98), (0.9, 0.999), (0.0, 0.5)])
def test_twenty_steps_of_torch(betas):
    masters = parameters()
    copies, optimizer = torch_adamw(masters, betas)
    state = adamw_state(masters, masters, DECAYS)
    for number in range(20):
        lr, clip_factor = 1e-2 / (1 + number), 1.0 if number % 2 else 0.37
        gradients = [torch.randn(shape) * 10.0 ** (number % 5 - 3) for shape in SHAPES]
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = gradient * clip_factor
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        step(state, gradients, lr, clip_factor, betas=betas)
    for master, copy, m, v in zip(masters, copies, state.exp_avg, state.exp_avg_sq, strict=True):
        torch.testing.assert_close(master, copy.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(m, optimizer.state[copy]["exp_avg"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(v, optimizer.state[copy]["exp_avg_sq"], rtol=1e-6, atol=1e-6)
    assert state.step.item() == 20


def test_bfloat16_in_the_order_of_the_engine():
    """Gradients widened, then clipped in float32; masters updated, then rounded to nearest even."""
    weights = [tensor.bfloat16() for tensor in parameters()]
    state = adamw_state([weight.float() for weight in weights], weights, DECAYS)
    copies, optimizer = torch_adamw(state.masters)
    for _ in range(5):
        gradients = [torch.randn(shape).bfloat16() for shape in SHAPES]
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = gradient.float() * 0.3
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        step(state, gradients, 1e-3, 0.3)
    for master, weight, copy in zip(state.masters, weights, copies, strict=True):
        torch.testing.assert_close(master, copy.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(weight, master.bfloat16())


def test_the_reference_makes_the_same_step():
    masters, gradients = parameters(), parameters()
    state = adamw_state(masters, [master.bfloat16() for master in masters], DECAYS)
    clones = [tensor.clone() for tensor in masters]
    other = adamw_state(clones, [clone.bfloat16() for clone in clones], DECAYS)
    for skip in (0.0, 1.0, 0.0):
        step(state, gradients, skip=skip)
        settings = {"lr": 1e-2, "betas": BETAS, "eps": EPS}
        adamw_reference(other, gradients, **settings, clip_factor=torch.tensor(1.0), skip=torch.tensor(skip))
    assert state.step == other.step == 2
    for ours, theirs in zip(tensors(state), tensors(other), strict=True):
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=1e-6 if ours.dtype is torch.float32 else 1e-2, atol=1e-6
        )


def test_a_skipped_step_changes_nothing():
    masters = parameters()
    state = adamw_state(masters, [master.bfloat16() for master in masters], DECAYS)
    step(state, parameters())
    before = [tensor.clone() for tensor in tensors(state)]
    step(state, [torch.full(shape, float("nan")) for shape in SHAPES], clip_factor=float("nan"), skip=1.0)
    assert all(map(torch.equal, before, tensors(state)))
    assert state.step == 1


def test_moved_gradients_are_found():
    masters = [torch.zeros(8)]
    state = adamw_state(masters, masters, [0.0])
    for gradient in (torch.ones(8), -torch.ones(8)):
        step(state, [gradient], betas=(0.0, 0.0))
    torch.testing.assert_close(masters[0], torch.zeros(8))


def test_addresses_that_are_not_aligned():
    memory = torch.randn(101)
    masters = [memory[1:]]
    copies, optimizer = torch_adamw([masters[0], *parameters()[1:]])
    state = adamw_state(masters, masters, [0.0])
    gradient = torch.randn(101)[1:]
    copies[0].grad = gradient.clone()
    optimizer.param_groups[0]["lr"] = 1e-2
    first = memory[0].clone()
    optimizer.step()
    step(state, [gradient])
    torch.testing.assert_close(masters[0], copies[0].detach(), rtol=1e-6, atol=1e-6)
    assert memory[0] == first


def test_every_element_is_written_and_nothing_else_is_read(written):
    masters, gradients = parameters(), parameters()
    state = adamw_state(masters, [master.bfloat16() for master in masters], DECAYS)
    step(state, gradients)
    written(*tensors(state))
    with pytest.raises(OutOfBounds), reachable(*tensors(state), *gradients[:-1]):
        adamw(state, gradients, lr=0.1, betas=BETAS, eps=EPS, clip_factor=torch.tensor(1.0), skip=torch.tensor(0.0))
