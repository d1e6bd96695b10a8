"""The optimizer step of the baselines: torch's own fused AdamW, used as well as plain torch allows.

bf16 weights with float32 masters, as ours: under autocast, float32 parameters would be cast in every forward pass and
their gradients in every backward pass, which moves more. torch's fused kernel wants gradients of the masters' type, so
one multi-tensor copy makes float32 ones in buffers that are kept (6 bytes a parameter). The norm is taken of the bf16
gradients (2), clipping is the kernel's `grad_scale` and not a pass (the kernel reads and writes 16 each), a skipped
step its `found_inf`; a last multi-tensor copy rounds the weights (6). 46 bytes a parameter; ours moves 30.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cae_fast.training.engine import Engine, StepResult
from cae_fast.training.optim import clip_factor, squared_norm


class TorchAdamW:
    """In place of an engine's `step`: the same update of the same masters, moments and weights."""

    def __init__(self, engine: Engine):
        state = engine.adamw
        self.engine, self.copies = engine, engine.parameters[0].dtype != torch.float32
        self.float32 = [torch.empty_like(master) for master in state.masters] if self.copies else []
        self.steps = [torch.zeros_like(state.step) for _ in state.masters]

    @torch.no_grad()
    def __call__(self, lr: float) -> StepResult:
        engine, state = self.engine, self.engine.adamw
        assert engine.loss_sum is not None, "step() without backward()"
        gradients = [p.grad for p in engine.parameters if p.grad is not None]
        assert len(gradients) == len(engine.parameters), "a trainable parameter got no gradient"

        # Nothing is read by the host: the kernel takes the clip factor and the skip from the device.
        norm = squared_norm(gradients).sqrt().float()
        skipped = 1.0 - (norm + engine.loss_sum).isfinite().float()
        scale = clip_factor(norm, engine.clip).reciprocal()
        if self.copies:
            torch._foreach_copy_(self.float32, gradients)
            gradients = self.float32

        # A call for each weight decay: the kernel takes one.
        for decay in dict.fromkeys(state.weight_decays):
            own = [index for index, value in enumerate(state.weight_decays) if value == decay]
            masters, grads, exp_avg, exp_avg_sq, steps = (
                [tensors[index] for index in own]
                for tensors in (state.masters, gradients, state.exp_avg, state.exp_avg_sq, self.steps)
            )
            adamw(
                masters,
                grads,
                exp_avg,
                exp_avg_sq,
                max_exp_avg_sqs=[],
                state_steps=steps,
                fused=True,
                grad_scale=scale,
                found_inf=skipped,
                amsgrad=False,
                beta1=engine.betas[0],
                beta2=engine.betas[1],
                lr=lr,
                weight_decay=decay,
                eps=engine.eps,
                maximize=False,
            )

        if self.copies:
            torch._foreach_copy_(state.weights, state.masters)
        return self._cleared(norm, skipped)

    def _cleared(self, norm: Tensor, skipped: Tensor) -> StepResult:
        for parameter in self.engine.parameters:
            parameter.grad = None
        self.engine.loss_sum = None
        return StepResult(norm, skipped)
