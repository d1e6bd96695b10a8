"""A classifier's optimizer, its head's choice, on float32 master weights, with layer decay."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cae_fast.config import ClassifyOptimConfig
from cae_fast.evaluation.classifier import BatchNorm, Classifier
from cae_fast.training.distributed import World
from cae_fast.training.engine import StepResult
from cae_fast.training.optim import clip_factor, decays, layer_decay_scales, layer_id, squared_norm, trainable


def parameter_groups(named: dict[str, nn.Parameter], optim: ClassifyOptimConfig, depth: int) -> list[dict[str, Any]]:
    """Groups with `lr_scale`, by layer and weight decay, of the parameters of a Classifier with `depth` blocks.

    Layer ids as in BEiT and the original code: 0 class token and patch embedding, i + 1 block i (its bias table, too),
    depth + 1 the head with its norm; the scale is layer_decay ** (depth + 1 - id). timm's param_groups_layer_decay
    counts the layers that a model without head has, which makes every scale one power too large.
    """
    scales = layer_decay_scales(optim.layer_decay, depth)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        scale = scales[layer_id(name.removeprefix("encoder."), depth)]
        decayed = decays(name, parameter) and not name.endswith("cls_token")
        settings = {"lr_scale": scale, "weight_decay": optim.weight_decay if decayed else 0.0, "always_adapt": decayed}
        groups.setdefault((scale, decayed), {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


class ClassifierOptimizer:
    """Updates a classifier's trainable parameters through float32 masters, which are the parameters where they can be.

    Nothing in a step waits for the device. Where loss or gradient are not finite, the step's gradient counts as 0.
    Processes average their gradients in float32; weights and running statistics are the same on all of them.
    """

    def __init__(self, model: Classifier, optim: ClassifyOptimConfig, world: World | None = None):
        self.world = World() if world is None else world
        self.parameters = dict(trainable(model))
        self.masters = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in self.parameters.items()
        }
        self.buffers = dict(model.head.named_buffers())  # running statistics
        self.norms = [module for module in model.head.modules() if isinstance(module, BatchNorm)]
        self.clip = optim.clip_grad_norm
        self.groups = parameter_groups(self.masters, optim, len(model.encoder.blocks))
        self.optimizer = model.head.make_optimizer(self.groups, optim)

    @torch.no_grad()
    def step(self, loss: Tensor, lr: float) -> StepResult:
        """Clip, update and clear the gradients; `loss`, the mean over processes, is only looked at."""
        # Gradients of the masters, averaged over processes in float32.
        for name, master in self.masters.items():
            parameter = self.parameters[name]
            if parameter is not master:
                assert parameter.grad is not None, f"{name} got no gradient"
                master.grad, parameter.grad = parameter.grad.float(), None
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        assert len(gradients) == len(self.masters), "a trainable parameter got no gradient"
        self.world.average(gradients)

        # Where something is not finite, the step counts as one with gradient 0; the host does not ask.
        norm = squared_norm(gradients).sqrt().float()
        finite = (norm + loss).isfinite()
        factor = clip_factor(norm, self.clip).nan_to_num() * finite
        for gradient in gradients:
            gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(factor)
        for layer in self.norms:
            if layer.seen:
                layer.update(self.world.gather(torch.stack(layer.seen)), finite)
                layer.seen.clear()

        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, master in self.masters.items():
            if self.parameters[name] is not master:
                self.parameters[name].copy_(master)
        return StepResult(norm, 1.0 - finite.float())

    def weights(self) -> dict[str, Tensor]:
        """What is trained, in float32, and the head's buffers, on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in (self.masters | self.buffers_by_name()).items()}

    def buffers_by_name(self) -> dict[str, Tensor]:
        return {f"head.{name}": tensor for name, tensor in self.buffers.items()}

    def state_items(self) -> Iterable[tuple[str, Tensor]]:
        """Training state: `param/NAME`, `buffer/NAME`, and the optimizer's, as `momentum_buffer/NAME`."""
        state = {f"param/{name}": master.detach() for name, master in self.masters.items()}
        state |= {f"buffer/{name}": tensor for name, tensor in self.buffers_by_name().items()}
        for name, master in self.masters.items():
            state |= {f"{key}/{name}": value for key, value in self.optimizer.state[master].items()}
        return state.items()

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_items()`; raises KeyError or RuntimeError when it belongs to another classifier."""
        for key, tensors in (("param", self.masters), ("buffer", self.buffers_by_name())):
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{key}/{name}"])
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)
        for label, value in state.items():
            key, name = label.split("/")
            if key not in ("param", "buffer"):
                self.optimizer.state[self.masters[name]][key] = value.to(self.masters[name].device)
