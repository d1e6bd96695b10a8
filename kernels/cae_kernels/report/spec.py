"""What `python -m cae_kernels.report` has to know about a kernel to compile it and to say how fast it can be."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One launch of one kernel; launches.py lists them.

    name: op, model and what distinguishes the launch. kernel: the @triton.jit function.
    signature: per argument a type ("*bf16:16" pointer aligned to 16 bytes, "i32:16" integer divisible by 16, "i32",
    "fp32", ...) or, for constexpr arguments, the value. Triton adds ":16" at run time by itself; without it, no load
    is wide. programs: size of the grid. flops, bytes: useful work and compulsory traffic of the whole launch.
    options: further compiler options. narrow: why loads and stores of less than 16 bytes are right, "" if they are not.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    _: KW_ONLY
    num_warps: int
    num_stages: int
    programs: int
    bytes: int
    flops: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    narrow: str = ""
