"""The CUDA path of a whole step at real sizes, without a GPU: fake tensors on "cuda", kernel launches recorded.

Inputs, forward pass and optimizer run on fake CUDA tensors. torch's backward pass needs a real device, so there the
tensors are fake ones of the CPU, with the same kernels chosen.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cae_fast.commands.pretrain import make_inputs, take_step
from cae_fast.config import ModelConfig, OptimConfig
from cae_fast.data.loader import Batch
from cae_fast.data.normalize import Normalize
from cae_fast.models.cae import ContextAutoencoder
from cae_fast.models.dalle import DalleEncoder, DalleTokenizer
from cae_fast.models.targets import make_encode
from cae_fast.training.engine import PRECISIONS, Engine
from cae_kernels import dispatch
from cae_kernels.adamw import AdamWState

triton = pytest.importorskip("triton")
JITFunction = triton.runtime.jit.JITFunction
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SEED = 2**40 + 3


class Launch:
    """Stands for `kernel[grid]`: checks what would be launched, and keeps it."""

    def __init__(self, kernel: Any, grid: Any, device: torch.device, seen: dict[str, list[dict]]):
        self.kernel, self.grid, self.device, self.seen = kernel, grid, device, seen

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        name = f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"
        assert set(values) == set(names), f"{name} lacks {set(names) - set(values)}"
        grid = self.grid(values) if callable(self.grid) else self.grid
        x, y, z = (*grid, 1, 1)[:3]
        assert 1 <= x < 2**31, (name, grid)
        assert 1 <= y < 2**16, (name, grid)
        assert 1 <= z < 2**16, (name, grid)
        for argument, value in values.items():
            if isinstance(value, Tensor):
                assert value.device.type == self.device.type, (name, argument, value.device)
                # Storage begins at a multiple of 256 bytes: vector loads are as wide as the offset in it allows.
                assert value.storage_offset() * value.element_size() % 16 == 0, (name, argument)
            elif type(value) is int:
                assert abs(value) < 2**63, (name, argument, value)
        self.seen[name].append(values)


class Copies(TorchDispatchMode):
    """What crosses between host and device, and what makes the host wait."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.to_device: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        assert name not in self.WAITS, f"{name} waits for the device"
        out = func(*args, **kwargs)
        before = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        after = {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        assert not ("cuda" in before and "cpu" in after), f"{name} reads from the device"
        if before == {"cpu"} and "cuda" in after:
            self.to_device.append((name, bool(kwargs.get("non_blocking"))))
        return out


def moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """nn.Module.to with new parameters: torch cannot change fake ones in place."""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)

    def convert(x: Tensor) -> Tensor:
        layout = {"memory_format": memory_format} if memory_format and x.ndim == 4 else {}
        return x.detach().to(device=device, dtype=dtype if dtype and x.is_floating_point() else x.dtype, **layout)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(convert(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else convert(buffer)
    return module


def no_addresses(state: AdamWState, gradients: list[Tensor]) -> None:
    """Fake tensors have none."""
    count = 5 * len(gradients)
    state._addresses = (0,) * count
    state._tables["addresses"] = torch.zeros(count, dtype=torch.int64, device=state.step.device)


@contextmanager
def fake_gpu(device: torch.device) -> Iterator[dict[str, list[dict]]]:
    """Fake tensors, Triton chosen for every op, launches kept by the kernel's name."""
    seen: dict[str, list[dict]] = defaultdict(list)

    def launch(kernel: Any, grid: Any) -> Launch:
        return Launch(kernel, grid, device, seen)

    with ExitStack() as stack:
        for patch in (
            mock.patch.object(nn.Module, "to", moved),
            mock.patch.object(JITFunction, "__getitem__", launch),
            mock.patch.object(dispatch, "why_not", return_value=None),
            mock.patch.dict(dispatch._choices, clear=True),
            mock.patch.dict("os.environ", {"CAE_KERNELS": ""}),
            mock.patch("cae_kernels.adamw._refresh_addresses", no_addresses),
            mock.patch.object(AdamWState, "has_copies", lambda s: s.weights[0] is not s.masters[0]),
            mock.patch("cae_fast.models.cae.initialize"),  # it looks at the numbers that it draws
            mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
            FakeTensorMode(allow_non_fake_inputs=False),
        ):
            stack.enter_context(patch)
        yield seen


def make_job(size: str, precision: str, device: torch.device, checkpointing: bool = False) -> SimpleNamespace:
    """What a step of `cae-fast pretrain` reads, with DALL-E's tokenizer."""
    model = ContextAutoencoder(ModelConfig(size=size), 8192, predict_codes=True)
    model.checkpoint_blocks(checkpointing)
    shape = model.shape
    branches = 2 * (2 * shape.depth + shape.regressor_depth + shape.decoder_depth)
    engine = Engine(model, OptimConfig(), precision, device, 1)
    return SimpleNamespace(
        model=model,
        engine=engine,
        dtype=PRECISIONS[precision],
        normalize=Normalize([0.4] * 3, [0.2] * 3, device),
        encode=make_encode(DalleTokenizer(DalleEncoder(), None, device, torch.float16), compiled=False),
        drop_path_rates=torch.full((branches,), 0.1, device=device),
        run=SimpleNamespace(
            config=SimpleNamespace(train=SimpleNamespace(seed=SEED)), world=engine.world, device=device
        ),
    )


def make_batch(job: SimpleNamespace, size: int) -> Batch:
    grid, patch = job.model.encoder.grid, job.model.shape.patch_size
    images, view = (torch.zeros(size, 3, side, side, dtype=torch.uint8) for side in (grid * patch, 8 * grid))
    ids = torch.zeros(size, grid**2 // 2, dtype=torch.int64)
    return Batch(images, view, ids, ids, torch.arange(size), torch.arange(size))


def kernels_of(seen: dict[str, list[dict]]) -> set[str]:
    return {name.partition(".")[0] for name in seen}


@pytest.mark.parametrize(
    ("size", "batch", "precision"), [("large", 256, "bfloat16"), ("huge", 128, "bfloat16"), ("base", 32, "float32")]
)
def test_inputs_forward_and_optimizer_on_cuda(size, batch, precision):
    with fake_gpu(CUDA) as seen:
        job = make_job(size, precision, CUDA)
        for step in range(2):
            with Copies() as copies, torch.no_grad():
                inputs = make_inputs(job, make_batch(job, batch))
            assert {blocking for _, blocking in copies.to_device} == {True}, "a copy from the host waits for it"
            with Copies() as copies:
                losses = job.engine(*inputs)
                job.engine.loss_sum = losses.total.detach()
                for parameter in job.engine.parameters:
                    parameter.grad = torch.zeros_like(parameter)
                result = job.engine.step(1e-4)
            assert step == 0 or not copies.to_device, "tables are copied in the first step only"
            assert {value.device for value in (*losses, *result)} == {CUDA}
        assert {tensor.device for tensor in job.engine.masters + job.engine.parameters} == {CUDA}
    made = {"gather_tokens", "residual_norm", "linear_gelu", "drop_path", "adamw", "bias_relu", "linear_argmax"}
    if precision == "bfloat16":  # in float32 attention goes to torch's scaled_dot_product_attention
        made |= {"attention", "cross_attention"}
    assert made <= kernels_of(seen)


@pytest.mark.parametrize(("size", "batch", "checkpointing"), [("large", 256, False), ("huge", 64, True)])
def test_backward_launches(size, batch, checkpointing):
    with fake_gpu(CPU) as seen:
        job = make_job(size, "bfloat16", CPU, checkpointing)
        with torch.no_grad():
            inputs = make_inputs(job, make_batch(job, batch))
        metrics = take_step(job, [inputs], 0, 1e-4)
        assert set(metrics) == {"loss", "loss_main", "loss_align", "accuracy", "grad_norm", "skipped"}
    backward = {name for name in seen if "backward" in name}
    depth = job.model.shape.depth
    for op in ("attention", "cross_attention", "residual_norm", "linear_gelu", "gather_tokens"):
        assert any(name.startswith(op) for name in backward), op
    launched = len(seen["attention._backward_kernel"])
    assert launched == depth + job.model.shape.decoder_depth
    forward = len(seen["attention._forward_kernel"])
    assert forward == (3 if checkpointing else 2) * depth + (2 if checkpointing else 1) * job.model.shape.decoder_depth


def test_activations_of_the_tokenizer_are_those_of_a_part_of_the_batch():
    """All launches of the tokenizer see at most 64 images."""
    with fake_gpu(CUDA) as seen, torch.no_grad():
        job = make_job("base", "bfloat16", CUDA)
        targets = make_inputs(job, make_batch(job, 160)).targets
        assert targets.shape == (160, 98)
    images = {len(v) for name, calls in seen.items() if "bias_relu" in name for v in calls[0].values() if _maps(v)}
    assert images
    assert max(images) <= 64


def _maps(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4
