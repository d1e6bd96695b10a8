"""Compiles a kernel for an architecture without a GPU or a driver and reads what came out of the machine code."""

import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from ..parts.triton_language import triton
from .spec import Spec

SHARED_MEMORY = {80: 164, 90: 228, 100: 228}  # KiB of a multiprocessor; one block may use 1 KiB less
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor
RESERVED = {80: 1024, 90: 1024, 100: 1024}  # bytes of shared memory that the system takes from every block
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)")
TENSOR_CORES = {"HGMMA": "wgmma", "QGMMA": "wgmma", "IGMMA": "wgmma", "HMMA": "mma", "UTCHMMA": "tcgen05"}
MEMORY = {"LDG": "loads", "LDGSTS": "loads", "STG": "stores"}


class ToolMissing(RuntimeError):
    """A program that Triton's wheel should carry is not there."""


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture.

    registers: of a thread. spills: local loads and stores plus bytes of stack. shared: bytes of a block.
    blocks: resident blocks of a multiprocessor. tensor: tensor-core instructions by kind (wgmma, mma, tcgen05).
    loads, stores: global memory instructions by width in bytes. bulk: TMA copies.
    """

    registers: int
    spills: int
    shared: int
    blocks: int
    tensor: dict[str, int]
    loads: dict[int, int]
    stores: dict[int, int]
    bulk: int

    def narrow_share(self) -> float:
        """Of the bytes that one pass over the code moves, the share that moves less than 16 bytes at a time."""
        moved = Counter(self.loads) + Counter(self.stores)
        total = sum(width * count for width, count in moved.items())
        return sum(width * count for width, count in moved.items() if width < 16) / total if total else 0.0


def _compile(spec: Spec, architecture: int):
    from triton.backends.compiler import GPUTarget

    options = {"enable_fp_fusion": True, **spec.options, "num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return triton.compile(_source(spec), target=GPUTarget("cuda", architecture, 32), options=options)


def compile_ptx(spec: Spec, architecture: int) -> str:
    """The kernel in NVIDIA's virtual assembly."""
    return _compile(spec, architecture).asm["ptx"]


def compile_spec(spec: Spec, architecture: int) -> Compiled:
    """Compile for sm_80, sm_90a or sm_100a. Raises ToolMissing, and what the compiler raises."""
    kernel = _compile(spec, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))

    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    registers, stack = _resources(usage)
    counts = _count(code)
    return Compiled(
        registers=registers,
        spills=stack + counts["spill"],
        shared=shared,
        blocks=_resident_blocks(registers, shared, warps, architecture),
        tensor={kind: counts[kind] for kind in dict.fromkeys(TENSOR_CORES.values()) if counts[kind]},
        loads={width: counts["loads", width] for width in (32, 16, 8, 4, 2, 1) if counts["loads", width]},
        stores={width: counts["stores", width] for width in (32, 16, 8, 4, 2, 1) if counts["stores", width]},
        bulk=counts["bulk"],
    )


def _source(spec: Spec):
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in spec.kernel.params]
    if set(names) != set(spec.signature):
        difference = sorted(set(names) ^ set(spec.signature))
        raise ValueError(f"{spec.name}: the signature and the kernel's arguments differ in {', '.join(difference)}")

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(spec.kernel.params):
        value = spec.signature[parameter.name]
        if parameter.is_constexpr or not isinstance(value, str):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name], _, divisor = value.partition(":")
        if divisor:
            attributes[(index,)] = [["tt.divisibility", int(divisor)]]
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=attributes)


def tool(name: str) -> str:
    """Path of a program of Triton's wheel, or of the one that TRITON_<NAME>_PATH names."""
    try:
        path = getattr(triton.knobs.nvidia, name).path
    except (RuntimeError, AttributeError) as error:
        raise ToolMissing(f"{name} is missing: reinstall triton, or set TRITON_{name.upper()}_PATH") from error
    return path


def _cuobjdump(option: str, path: str) -> str:
    folder = os.path.dirname(tool("nvdisasm"))  # cuobjdump looks for it in PATH
    environment = os.environ | {"PATH": folder + os.pathsep + os.environ.get("PATH", "")}
    done = subprocess.run([tool("cuobjdump"), option, path], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip()}")
    return done.stdout


def _resources(usage: str) -> tuple[int, int]:
    """Registers of a thread and bytes of stack."""
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {usage.strip()!r}")
    return int(match[1]), int(match[2])


def _count(code: str) -> Counter:
    counts: Counter = Counter()
    for name, modifiers in INSTRUCTION.findall(code):
        if name in TENSOR_CORES:
            counts[TENSOR_CORES[name]] += 1
        elif name in MEMORY:
            counts[MEMORY[name], _width(modifiers)] += 1
        elif name in ("LDL", "STL"):
            counts["spill"] += 1
        elif name in ("UTMALDG", "UTMASTG", "UBLKCP"):
            counts["bulk"] += 1
    return counts


def _width(modifiers: str) -> int:
    """Bytes that a thread moves with one instruction, from its modifiers (.E.128, .E.U16, ...)."""
    parts = modifiers.split(".")
    for bits in (256, 128, 64):
        if str(bits) in parts:
            return bits // 8
    for bits in (16, 8):
        if f"U{bits}" in parts or f"S{bits}" in parts:
            return bits // 8
    return 4


def _resident_blocks(registers: int, shared: int, warps: int, architecture: int) -> int:
    per_warp = math.ceil(max(registers, 1) * 32 / 256) * 256  # registers are given out in units of 256
    by_registers = 4 * (REGISTERS // 4 // per_warp) // warps
    per_block = math.ceil((shared + RESERVED[architecture]) / 128) * 128
    by_shared = SHARED_MEMORY[architecture] * 1024 // per_block
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)
