"""Kernel launches and bytes of what torch.compile would launch on an H100, counted without one.

AOTAutograd traces the function at its real shapes on fake tensors and cuts it into a forward and a backward graph;
Inductor lowers each for a CUDA device with an H100's properties and its scheduler fuses. Every node that the scheduler
would launch counts once, with the bytes it says it reads and writes. Nothing is generated, compiled or run. Attention
stays one kernel (torch's scaled_dot_product_attention), as it does on a GPU.

This follows Inductor's internals of torch 2.11 to 2.13; `count` raises what they raise where they are others.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import ir
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
aten = torch.ops.aten
PRODUCT_OPS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}


@torch.library.custom_op("cae_benchmark::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, n, C) each; stands for a fused attention kernel, which keeps a log-sum-exp (B, H, n)."""
    raise NotImplementedError("only its shapes are used")


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("cae_benchmark::attend_backward", mutates_args=())
def attend_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("only its shapes are used")


@attend_backward.register_fake
def _(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    return like(query), like(key), like(value)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


attend.register_autograd(lambda ctx, dout, _: attend_backward(dout, *ctx.saved_tensors), setup_context=_save)


def count(function: Callable[..., Any], inputs: list[Tensor]) -> list[dict[str, int]]:
    """Launches, bytes, and bytes of all but products, forward and, where inputs want gradients, backward.

    inputs: fake tensors of the CPU, under their FakeTensorMode. function: returns tensors.
    """
    found: list[dict[str, int]] = []

    def capture(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        found.append(scheduled(graph, example_inputs, is_backward=bool(found)))
        return make_boxed_func(graph.forward)

    def partition(joint: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        return min_cut_rematerialization_partition(joint_graph_passes(joint), joint_inputs, **options)

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return attend(query, key, value)[0]

    # Attention stays one op, as on a GPU.
    fake_constants = mock.patch("torch._dynamo.utils.assert_no_fake_params_or_buffers")  # what a case closes over
    with fake_constants, mock.patch.object(F, "scaled_dot_product_attention", attention):
        compiled = aot_function(
            function,
            fw_compiler=capture,
            bw_compiler=capture,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        outputs = compiled(*inputs)
        outputs = [out for out in (outputs if isinstance(outputs, tuple | list) else [outputs]) if out.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return found


def scheduled(graph: torch.fx.GraphModule, example_inputs: Any, is_backward: bool) -> dict[str, int]:
    """What Inductor's scheduler would launch for a graph of the CPU's fake tensors, were they on an H100."""
    mode = next(x.fake_mode for x in example_inputs if isinstance(x, FakeTensor))
    graph = copied(graph)

    with as_an_h100(), torch.no_grad(), V.set_fake_mode(mode):

        def on_cuda(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            with mode:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

        inputs = [on_cuda(x) for x in example_inputs]
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = node.kwargs | {"device": torch.device("cuda", 0)}
            # Not propagated anew: without a GPU's libraries, convolutions there would choose another layout.
            node.meta["val"] = tree_map(on_cuda, node.meta.get("val"))

        # Its in-place writes into views need a device; Inductor makes scatters of slices pointwise anyway.
        with mock.patch("torch._inductor.fx_passes.post_grad.reinplace_inplaceable_ops"):
            post_grad_passes(graph, is_inference=False)

        convolves = any(node.target is torch.ops.aten.convolution.default for node in graph.graph.nodes)
        lowering = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward, layout_opt=convolves)
        with V.set_graph_handler(lowering), DebugContext():
            lowering.run(*inputs)
            lowering._update_scheduler()
            return tally(lowering.scheduler.nodes)


def copied(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Another graph of the same nodes, so that the CPU's stays as it is."""
    nodes = torch.fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    return torch.fx.GraphModule(graph, nodes)


def tally(nodes: Any) -> dict[str, int]:
    total = {"launches": 0, "bytes": 0, "other_bytes": 0}
    for node in nodes:
        kinds = [type(part.node) for part in node.get_nodes()]
        moved = node.get_read_write_buffers_sizes()
        launches = 0 if type(node).__name__ == "NopKernelSchedulerNode" or kinds == [ir.MultiOutput] else 1
        origins = {origin.target for part in node.get_nodes() if part.node for origin in part.node.get_origins()}
        product = issubclass(kinds[0], ir.ExternKernel) and bool(origins & PRODUCT_OPS)
        total["launches"] += launches
        total["bytes"] += moved
        total["other_bytes"] += 0 if product else moved
    return total


@contextmanager
def as_an_h100() -> Iterator[None]:
    """Inductor asks torch.cuda for properties only."""
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_get_device_properties": lambda device: H100,
        "get_device_capability": lambda device=None: (9, 0),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", answer, create=True))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
        yield
