"""adamw without the interpreter: the reference against torch, errors, apex's call, and a GPU if there is one."""

import sys
import types

import pytest
import torch

from cae_kernels.adamw import _apex, adamw, adamw_reference, adamw_state

SHAPES = [(3,), (85, 17), (), (1025,)]
DECAYS = [0.0, 0.05, 0.05, 0.0]
BETAS, EPS = (0.9, 0.98), 1e-8


def parameters(device="cpu", shapes=SHAPES):
    draw = torch.Generator(device).manual_seed(torch.randint(2**31, ()).item())
    return [torch.randn(shape, generator=draw, device=device) for shape in shapes]


def scalar(value, device="cpu"):
    return torch.tensor(value, device=device)


def torch_adamw(masters, lr, decays=DECAYS):
    copies = [torch.nn.Parameter(master.clone()) for master in masters]
    groups = [{"params": [copy], "weight_decay": decay} for copy, decay in zip(copies, decays, strict=True)]
    return copies, torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)


def twenty_steps(run, device="cpu", shapes=SHAPES, decays=DECAYS):
    """Masters after 20 steps of `run` and of torch, with clipping and one skipped step in between."""
    masters = parameters(device, shapes)
    copies, optimizer = torch_adamw(masters, 1e-2, decays)
    state = adamw_state(masters, [master.bfloat16() for master in masters], decays)
    for number in range(21):
        gradients, factor, skip = parameters(device, shapes), 0.37 + 0.1 * (number % 3), number == 7
        if skip:
            gradients[0][...] = float("inf")
        else:
            for copy, gradient in zip(copies, gradients, strict=True):
                copy.grad = gradient * factor
            optimizer.step()
        run(
            state,
            gradients,
            lr=1e-2,
            betas=BETAS,
            eps=EPS,
            clip_factor=scalar(factor, device),
            skip=scalar(skip, device),
        )
    assert state.step == 20
    assert all(torch.equal(weight, master.bfloat16()) for weight, master in zip(state.weights, masters, strict=True))
    return masters, [copy.detach() for copy in copies]


@pytest.mark.parametrize("run", [adamw, adamw_reference])
def test_twenty_steps_of_torch(run):
    for ours, theirs in zip(*twenty_steps(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_one_step_by_hand():
    master = torch.tensor([2.0])
    state = adamw_state([master], [master], [0.1])
    adamw(state, [torch.tensor([4.0])], lr=0.5, betas=(0.9, 0.99), eps=0.0, clip_factor=scalar(0.5), skip=scalar(0))
    torch.testing.assert_close(state.exp_avg[0], torch.tensor([0.2]))  # 0.1 * 2
    torch.testing.assert_close(state.exp_avg_sq[0], torch.tensor([0.04]))  # 0.01 * 4
    torch.testing.assert_close(master, torch.tensor([1.4]))  # 2 * (1 - 0.05) - 0.5 * (0.2 / 0.1) / sqrt(0.04 / 0.01)


def test_apex_gets_what_its_kernel_expects(monkeypatch):
    """A stand-in computes apex's multi_tensor_adam_capturable from the arguments in apex's order."""

    def kernel(noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay, inv_scale):
        assert noop.dtype == step.dtype == torch.int32
        assert lr.dtype == inv_scale.dtype == torch.float32
        assert mode == bias_correction == 1
        if noop.item() == 1:
            return
        for g, p, m, v in zip(*lists, strict=True):
            assert g.dtype == p.dtype == m.dtype == v.dtype == torch.float32
            g.mul_(inv_scale.item())
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g * g)
            corrected = v / (1 - beta2 ** step.item())
            p.sub_(lr.item() * (m / (1 - beta1 ** step.item()) / (corrected.sqrt() + eps) + decay * p))

    amp, folder = types.ModuleType("amp_C"), types.ModuleType("apex.multi_tensor_apply")
    amp.multi_tensor_adam_capturable = kernel
    folder.multi_tensor_applier = lambda op, noop, lists, *rest: op(noop, lists, *rest)
    for name, fake in (("amp_C", amp), ("apex", types.ModuleType("apex")), ("apex.multi_tensor_apply", folder)):
        monkeypatch.setitem(sys.modules, name, fake)

    for ours, theirs in zip(*twenty_steps(_apex), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_tensors_that_do_not_fit_are_refused():
    masters = parameters()
    state = adamw_state(masters, masters, DECAYS)
    settings = {"lr": 0.1, "betas": BETAS, "eps": EPS, "clip_factor": scalar(1.0), "skip": scalar(0.0)}
    with pytest.raises(ValueError, match="3 gradients of 4 parameters"):
        adamw(state, masters[:3], **settings)
    with pytest.raises(ValueError, match=r"gradients\[1\] must be contiguous, on cpu and of shape \(85, 17\)"):
        adamw(state, [masters[0], torch.zeros(17, 85).T, *masters[2:]], **settings)
    with pytest.raises(ValueError, match=r"gradients\[2\] is torch.bfloat16; all must have the same of"):
        adamw(state, [*masters[:2], masters[2].bfloat16(), masters[3]], **settings)
    with pytest.raises(ValueError, match=r"masters\[0\] is torch.float64"):
        adamw_state([masters[0].double()], [masters[0]], [0.0])
    with pytest.raises(ValueError, match=r"weights\[0\] must be contiguous, on cpu and of shape \(3,\)"):
        adamw_state([masters[0]], [masters[3]], [0.0])
    with pytest.raises(ValueError, match="4 masters, 4 weights, 1 weight decays"):
        adamw_state(masters, masters, [0.0])


GPU_SHAPES = [(1024, 1024), (1023,), (), (4096, 1280), (588,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_twenty_steps_of_torch_on_a_gpu():
    decays = [0.05, 0.0, 0.0, 0.05, 0.0]
    for ours, theirs in zip(*twenty_steps(adamw, "cuda", GPU_SHAPES, decays), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_step_does_not_wait_for_the_gpu():
    masters = parameters("cuda", GPU_SHAPES)
    state = adamw_state(masters, [master.bfloat16() for master in masters], [0.0] * len(masters))
    settings = {"lr": 0.1, "betas": BETAS, "eps": EPS, "clip_factor": scalar(1.0, "cuda"), "skip": scalar(0.0, "cuda")}
    adamw(state, parameters("cuda", GPU_SHAPES), **settings)  # builds the tables
    gradients = parameters("cuda", GPU_SHAPES)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw(state, gradients, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
