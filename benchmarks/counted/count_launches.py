"""Kernel launches and bytes of a piece of eager PyTorch, counted without running it.

Every ATen op that is dispatched and makes or changes a tensor counts as one launch (the fewest it can be: some ops
launch more), reads each of its inputs once and writes each of its results once. Views launch nothing. Under
FakeTensorMode nothing is computed, so real shapes cost nothing.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cae_kernels import dispatch

aten = torch.ops.aten
NO_LAUNCH = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
NO_LAUNCH |= {"lift_fresh", "lift_fresh_copy", "alias", "is_nonzero", "empty_permuted"}
WRITTEN_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "_foreach_copy_", "_foreach_zero_"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "addmv", "mv", "addbmm"}
# Launches of our registered ops beyond the first: partial sums that a second kernel adds up (and their rounding).
MORE_LAUNCHES = {
    "residual_norm_backward": 1,
    "qkv_norm_backward": 1,
    "gather_tokens_backward": 1,
    "bias_gelu_backward": 2,
    "squared_error": 2,
    "linear_argmax": 1,
}


def stored_bytes(tensor: Tensor) -> int:
    """Of the elements there are: a dimension of stride 0 repeats one."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= int(size) if stride or not size else 1
    return count * tensor.element_size()


class Launches(TorchDispatchMode):
    """Counts while it is on. `launches` and `moved` (bytes) by op name; `total()` sums."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def add(self, name: str, moved: int, launches: int = 1) -> None:
        self.launches[name] += launches
        self.moved[name] += moved

    def total(self) -> dict[str, int]:
        """Launches, bytes, and bytes of everything but matrix products and convolutions."""
        other = sum(moved for name, moved in self.moved.items() if name not in PRODUCTS)
        return {"launches": self.launches.total(), "bytes": self.moved.total(), "other_bytes": other}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            return self.chosen(args[0], args[1][0])
        if func in (aten.index_put.default, aten.index_put_.default) and args[1][0].dtype == torch.bool:
            return self.put_back(*args[:3])
        out = func(*args, **kwargs)
        self.count(func, args, kwargs, out)
        return out

    def count(self, func: Any, args: Any, kwargs: dict, out: Any) -> None:
        name = func._schema.name.partition("::")[2]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        returns = [r.alias_info for r in func._schema.returns]
        is_view = bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
        if name in NO_LAUNCH or is_view:
            return

        read, written = [], []
        for argument, value in zip(func._schema.arguments[: len(args)], args, strict=True):
            changed = argument.alias_info is not None and argument.alias_info.is_write
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            written += tensors if changed else []
            read += [] if changed and name in WRITTEN_ONLY else tensors
        read += [leaf for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor)]
        # Results that alias an argument are written where that argument is.
        if not any(alias is not None for alias in returns):
            written += results
        if not written:
            return

        if name == "linear_cross_entropy":
            self.cross_entropy(args)
        unique = {id(tensor): tensor for tensor in read}.values()
        moved = sum(map(stored_bytes, unique)) + sum(map(stored_bytes, written))
        self.add(name, moved, 1 + MORE_LAUNCHES.get(name, 0))

    def cross_entropy(self, args: Any) -> None:
        """What the op does inside: logits by a product, made into their gradient in place, two products of that."""
        x, weight, _, target = args[:4]
        logits = len(x) * len(weight) * x.element_size()
        self.add("linear_cross_entropy", 2 * logits + 8 * len(target), 6)  # count, statistics, sums, rounding
        self.add("mm", 3 * logits + 2 * x.nbytes + 2 * weight.nbytes, 3)
        self.moved["linear_cross_entropy"] -= 2 * (x.nbytes + weight.nbytes)  # the op's own inputs and results

    def chosen(self, source: Tensor, mask: Tensor) -> Tensor:
        """Half of the rows, by a boolean mask: its places are found first, then rows are copied."""
        out = source.new_empty(mask.numel() // 2, *source.shape[mask.ndim :])
        places = 8 * mask.ndim * len(out)
        self.add("nonzero", mask.numel() + places)
        self.add("index", places + 2 * stored_bytes(out))
        return out

    def put_back(self, target: Tensor, masks: Any, values: Tensor) -> Tensor:
        places = 8 * masks[0].ndim * len(values)
        self.add("nonzero", masks[0].numel() + places)
        self.add("index_put", places + 3 * stored_bytes(values))
        return target


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Our ops choose their Triton kernels and are dispatched as registered ops, on fake tensors of the CPU."""
    modules = [module for name, module in sys.modules.items() if name.startswith("cae_kernels.")]
    modules = [module for module in modules if module is not dispatch and hasattr(module, "custom_ops_wanted")]
    patches: list[Any] = [mock.patch.object(dispatch, "why_not", return_value=None)]
    patches += [mock.patch.object(m, "custom_ops_wanted", return_value=True) for m in modules]
    patches.append(mock.patch.dict(dispatch._choices, clear=True))
    patches.append(mock.patch.dict("os.environ", {"CAE_KERNELS": ""}))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
