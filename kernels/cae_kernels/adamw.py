"""AdamW over all parameters in one launch (Loshchilov and Hutter, arXiv 1711.05101, Algorithm 2), without a host sync.

With g = clip_factor * gradient, t the number of steps taken, and all arithmetic in float32:
    p = (1 - lr * decay) p,   m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,
    p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps),   weight = p in the weight's type.
Where skip is set nothing changes, t neither. Reads 14 and writes 14 bytes a parameter with bfloat16 weights and
gradients. Tensors are found through tables of their addresses; a program updates CHUNK elements of one of them.

P parameter tensors, C chunks of all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from .dispatch import backend
from .parts.triton_language import tl, triton

CHUNK = 1024
NUM_WARPS = 4
PIECE = 32 * NUM_WARPS  # one element a thread


@dataclass
class AdamWState:
    """What AdamW keeps between steps. All tensors are contiguous and on one device; lists are in parameter order.

    masters: float32 parameters. weights: their rounded copies, or the masters themselves.
    exp_avg, exp_avg_sq: float32, in the masters' shapes. weight_decays: P numbers. step: float32 scalar.
    """

    masters: list[Tensor]
    weights: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    weight_decays: list[float]
    step: Tensor
    _tables: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _addresses: tuple[int, ...] = field(default=(), repr=False)

    def has_copies(self) -> bool:
        return self.weights[0].data_ptr() != self.masters[0].data_ptr()


def adamw_state(masters: Sequence[Tensor], weights: Sequence[Tensor], weight_decays: Sequence[float]) -> AdamWState:
    """State before the first step. masters: float32; weights: the same tensors, or copies in another type.

    Raises ValueError for tensors that are not contiguous, masters that are not float32, and lists of other lengths.
    """
    masters, weights = [tensor.detach() for tensor in masters], [tensor.detach() for tensor in weights]
    if not len(masters) == len(weights) == len(weight_decays) > 0:
        raise ValueError(f"adamw: {len(masters)} masters, {len(weights)} weights, {len(weight_decays)} weight decays")
    _check("masters", masters, masters, (torch.float32,))
    _check("weights", weights, masters, (torch.float32, torch.bfloat16))
    moments = [[torch.zeros_like(tensor) for tensor in masters] for _ in range(2)]
    step = torch.zeros((), dtype=torch.float32, device=masters[0].device)
    return AdamWState(masters, weights, moments[0], moments[1], list(weight_decays), step)


def _check(name: str, tensors: Sequence[Tensor], masters: Sequence[Tensor], types: tuple[torch.dtype, ...]) -> None:
    if len(tensors) != len(masters):
        raise ValueError(f"adamw: {len(tensors)} {name} of {len(masters)} parameters")
    device, dtype = masters[0].device, tensors[0].dtype
    for index, (tensor, master) in enumerate(zip(tensors, masters, strict=True)):
        if tensor.shape != master.shape or tensor.device != device or not tensor.is_contiguous():
            shape = tuple(master.shape)
            raise ValueError(f"adamw: {name}[{index}] must be contiguous, on {device} and of shape {shape}")
        if tensor.dtype not in types or tensor.dtype != dtype:
            raise ValueError(f"adamw: {name}[{index}] is {tensor.dtype}; all must have the same of {types}")


def adamw_reference(
    state: AdamWState,
    gradients: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    clip_factor: Tensor,
    skip: Tensor,
) -> None:
    """torch's fused AdamW, a group for each weight decay; found_inf is how GradScaler has it skip on the device."""
    found_inf = (skip != 0).float()
    scaled = torch._foreach_mul([gradient.float() for gradient in gradients], clip_factor)

    for decay in dict.fromkeys(state.weight_decays):
        own = [index for index, value in enumerate(state.weight_decays) if value == decay]
        torch_adamw(
            [state.masters[index] for index in own],
            [scaled[index] for index in own],
            [state.exp_avg[index] for index in own],
            [state.exp_avg_sq[index] for index in own],
            [],
            [state.step.clone() for _ in own],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=decay,
            eps=eps,
            maximize=False,
        )

    state.step += 1.0 - found_inf
    if state.has_copies():
        torch._foreach_copy_(state.weights, state.masters)


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _update(
    addresses, num_tensors,  # of one tensor, in a table of five rows of P; P
    start, size,  # first element of this block; elements of the tensor
    decay, clip_factor, step, lr, beta1, share1, log_beta1, beta2, share2, log_beta2, eps,  # as of the kernel
    GRADIENT: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = start + tl.arange(0, BLOCK)
    inside = tl.full((BLOCK,), True, tl.int1) if FULL else offsets < size
    gradient = _pointer(addresses, GRADIENT, ALIGNED) + offsets
    master = _pointer(addresses + num_tensors, tl.float32, ALIGNED) + offsets
    exp_avg = _pointer(addresses + 2 * num_tensors, tl.float32, ALIGNED) + offsets
    exp_avg_sq = _pointer(addresses + 3 * num_tensors, tl.float32, ALIGNED) + offsets

    g = tl.load(gradient, mask=inside, other=0.0).to(tl.float32) * clip_factor
    p = tl.load(master, mask=inside, other=0.0)
    m = beta1 * tl.load(exp_avg, mask=inside, other=0.0) + share1 * g
    v = beta2 * tl.load(exp_avg_sq, mask=inside, other=0.0) + share2 * g * g
    # In float64: 1 - beta^t of the first steps would lose half of its float32 digits.
    correction1 = (1.0 - tl.exp(step.to(tl.float64) * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(step.to(tl.float64) * log_beta2)).to(tl.float32)
    denominator = tl.sqrt_rn(v) * (1.0 / tl.sqrt_rn(correction2)) + eps
    p = p * (1.0 - lr * decay) - lr / correction1 * tl.div_rn(m, denominator)

    tl.store(exp_avg, m, mask=inside)
    tl.store(exp_avg_sq, v, mask=inside)
    tl.store(master, p, mask=inside)
    if WEIGHT is not None:
        weight = _pointer(addresses + 4 * num_tensors, WEIGHT, ALIGNED) + offsets
        tl.store(weight, p.to(WEIGHT), mask=inside)


@triton.jit
def _kernel(
    addresses,  # (5, P) int64: of gradients, masters, exp_avg, exp_avg_sq, weights
    sizes, decays,  # (P,) int64, float32
    chunk_tensors, chunk_starts,  # (C,) int64: the tensor of each chunk and its first element there
    num_tensors,  # P
    clip_factor, skip, step,  # scalars on the device
    lr, beta1, share1, log_beta1, beta2, share2, log_beta2, eps,  # share = 1 - beta
    GRADIENT: tl.constexpr, WEIGHT: tl.constexpr,  # types; None where weights are the masters
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr,  # all addresses are multiples of 16
):  # fmt: skip
    if tl.load(skip) == 0:
        chunk = tl.program_id(0)
        tensor = tl.load(chunk_tensors + chunk)
        start = tl.multiple_of(tl.load(chunk_starts + chunk), CHUNK)
        size, decay = tl.load(sizes + tensor), tl.load(decays + tensor)
        factor, taken = tl.load(clip_factor), tl.load(step)
        own = addresses + tensor

        # A mask of unknown length makes every access narrow: only in what is left of a tensor after whole chunks.
        if start + CHUNK <= size:
            _update(
                addresses=own, num_tensors=num_tensors, start=start, size=size, decay=decay, clip_factor=factor,
                step=taken, lr=lr, beta1=beta1, share1=share1, log_beta1=log_beta1, beta2=beta2, share2=share2,
                log_beta2=log_beta2, eps=eps,
                GRADIENT=GRADIENT, WEIGHT=WEIGHT, ALIGNED=ALIGNED, FULL=True, BLOCK=CHUNK,
            )  # fmt: skip
        else:
            for piece in range(start, size, PIECE):
                _update(
                    addresses=own, num_tensors=num_tensors, start=piece, size=size, decay=decay, clip_factor=factor,
                    step=taken, lr=lr, beta1=beta1, share1=share1, log_beta1=log_beta1, beta2=beta2, share2=share2,
                    log_beta2=log_beta2, eps=eps,
                    GRADIENT=GRADIENT, WEIGHT=WEIGHT, ALIGNED=ALIGNED, FULL=False, BLOCK=PIECE,
                )  # fmt: skip


def _tables(state: AdamWState) -> dict[str, Tensor]:
    device = state.masters[0].device
    sizes = [tensor.numel() for tensor in state.masters]
    chunks = [(index, start) for index, size in enumerate(sizes) for start in range(0, size, CHUNK)]
    numbers, starts = zip(*chunks, strict=True)
    return {
        "sizes": torch.tensor(sizes, device=device),  # (P,)
        "decays": torch.tensor(state.weight_decays, dtype=torch.float32, device=device),  # (P,)
        "chunk_tensors": torch.tensor(numbers, device=device),  # (C,)
        "chunk_starts": torch.tensor(starts, device=device),  # (C,)
    }


def _refresh_addresses(state: AdamWState, gradients: Sequence[Tensor]) -> None:
    """The table of addresses, copied to the device again only when a tensor has moved, without waiting for it."""
    lists = gradients, state.masters, state.exp_avg, state.exp_avg_sq, state.weights
    addresses = tuple(tensor.data_ptr() for tensors in lists for tensor in tensors)
    if addresses == state._addresses:
        return
    table = torch.tensor(addresses)  # (5 * P,)
    if state.step.is_cuda:
        table = table.pin_memory().to(state.step.device, non_blocking=True)
    state._tables["addresses"], state._addresses = table, addresses


def _launch(state: AdamWState, gradients: Sequence[Tensor], *, lr, betas, eps, clip_factor, skip) -> None:
    state._tables = state._tables or _tables(state)
    _refresh_addresses(state, gradients)
    state.step += skip == 0

    kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
    _kernel[(len(state._tables["chunk_tensors"]),)](
        **state._tables,
        num_tensors=len(state.masters),
        clip_factor=clip_factor,
        skip=skip,
        step=state.step,
        lr=lr,
        beta1=betas[0],
        share1=1.0 - betas[0],
        log_beta1=_log(betas[0]),
        beta2=betas[1],
        share2=1.0 - betas[1],
        log_beta2=_log(betas[1]),
        eps=eps,
        GRADIENT=kinds[gradients[0].dtype],
        WEIGHT=kinds[state.weights[0].dtype] if state.has_copies() else None,
        ALIGNED=not any(address % 16 for address in state._addresses),
        CHUNK=CHUNK,
        PIECE=PIECE,
        num_warps=NUM_WARPS,
    )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e4


def _apex(state: AdamWState, gradients: Sequence[Tensor], *, lr, betas, eps, clip_factor, skip) -> None:
    """The kernel of NVIDIA apex's FusedAdam(capturable=True); float32 gradients are overwritten by clipped ones."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    state.step += skip == 0
    skipped, steps = (skip != 0).to(torch.int32).view(1), state.step.to(torch.int32).view(1)
    rate = torch.full((1,), lr, dtype=torch.float32, device=state.step.device)
    lists = [gradient.float() for gradient in gradients], state.masters, state.exp_avg, state.exp_avg_sq

    for decay in dict.fromkeys(state.weight_decays):
        group = [
            [tensor for tensor, own in zip(tensors, state.weight_decays, strict=True) if own == decay]
            for tensors in lists
        ]
        multi_tensor_applier(
            amp_C.multi_tensor_adam_capturable,
            skipped,
            group,
            rate,
            *betas,
            eps,
            steps,
            1,  # decoupled weight decay
            1,  # bias correction
            decay,
            clip_factor.view(1),
        )

    if state.has_copies():
        torch._foreach_copy_(state.weights, state.masters)


@torch.no_grad()
def adamw(
    state: AdamWState,
    gradients: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    clip_factor: Tensor,
    skip: Tensor,
) -> None:
    """One step of AdamW, in place: masters, moments, weights and the step counter of `state`.

    gradients: in the order of the state's lists, all bfloat16 or all float32, contiguous, unscaled.
    clip_factor: float32 scalar on the device, what gradients are multiplied by. skip: scalar on the device, any type;
    where it is not 0, nothing changes. Raises ValueError for gradients that do not fit the parameters.
    It is not a registered op: an optimizer step is never part of a graph of torch.compile.
    """
    _check("gradients", gradients, state.masters, (torch.float32, torch.bfloat16))
    run = {"triton": _launch, "reference": adamw_reference, "apex": _apex}[backend("adamw", state.step)]
    run(state, gradients, lr=lr, betas=betas, eps=eps, clip_factor=clip_factor, skip=skip)
