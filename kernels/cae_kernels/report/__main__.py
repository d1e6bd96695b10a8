"""What every Triton kernel becomes on a GPU, found without one.

  python -m cae_kernels.report [-k TEXT] [--arch 80 90 100] [--json FILE]

Compiles the launches listed in launches.py (ViT-L at batch 256, ViT-H at batch 128) and prints
registers, spills, shared memory, blocks of a multiprocessor, tensor-core instructions, widths of loads and stores,
useful work, compulsory bytes, and the time that an H100 needs at least for those.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..parts.triton_language import HAVE_TRITON, INTERPRETED, triton
from .compile import Compiled, ToolMissing, compile_spec
from .launches import collect
from .spec import Spec

# Assumed of an H100 SXM until measured: bfloat16 products at a step's shapes, and reading and writing memory.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 600e12, 2.6e12
COLUMNS = {"kernel": 52, "sm": 4, "regs": 5, "spill": 6, "shared": 8, "blocks": 7, "tensor cores": 14}
COLUMNS |= {"loads B": 26, "stores B": 20, "GFLOP": 8, "MB": 8, "floor us": 9}  # widths


def floor_seconds(spec: Spec) -> float:
    """The least time of a launch on an H100: that of its work or of its bytes, whichever is longer."""
    return max(spec.flops / FLOPS_PER_SECOND, spec.bytes / BYTES_PER_SECOND)


def _row(spec: Spec, architecture: int, compiled: Compiled) -> list[str]:
    def widths(counts: dict[int, int]) -> str:
        return " ".join(f"{count}x{width}" for width, count in counts.items()) or "-"

    loads = widths(compiled.loads) + (f" {compiled.bulk} bulk" if compiled.bulk else "")
    return [
        spec.name,
        str(architecture),
        str(compiled.registers),
        str(compiled.spills),
        str(compiled.shared),
        str(compiled.blocks),
        " ".join(f"{count} {kind}" for kind, count in compiled.tensor.items()) or "-",
        loads,
        widths(compiled.stores),
        f"{spec.flops / 1e9:.1f}",
        f"{spec.bytes / 1e6:.1f}",
        f"{floor_seconds(spec) * 1e6:.1f}",
    ]


def _line(cells: Iterable[str]) -> str:
    first, *others = (f"{cell:<{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))
    return " ".join((first, *others)).rstrip()


def _record(spec: Spec, architecture: int, compiled: Compiled) -> dict:
    numbers = {"programs": spec.programs, "num_warps": spec.num_warps, "flops": spec.flops, "bytes": spec.bytes}
    return {
        "name": spec.name,
        "architecture": architecture,
        "triton": triton.__version__,
        **numbers,
        "floor_seconds": floor_seconds(spec),
        **asdict(compiled),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cae_kernels.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="TEXT", default="", help="only kernels whose name contains this")
    parser.add_argument("--arch", type=int, nargs="+", choices=(80, 90, 100), default=[90], help="default: 90 (sm_90a)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there too")
    return parser


def _why_impossible() -> str | None:
    if not HAVE_TRITON:
        return "triton is not installed"
    return "unset TRITON_INTERPRET: interpreted kernels cannot be compiled" if INTERPRETED else None


def _write(path: Path, records: list[dict]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    """Print the report. Returns 0, 1 if a kernel did not compile, 2 if nothing can be compiled here."""
    args = _parser().parse_args(arguments)
    specs = [] if (impossible := _why_impossible()) else collect(args.k)
    if not specs:
        print(f"report: {impossible or f'no kernel is named like {args.k!r}'}", file=sys.stderr)
        return 2

    peaks = f"{FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s and {BYTES_PER_SECOND / 1e12:.1f} TB/s"
    print(f"triton {triton.__version__}; floor: an H100 at {peaks}; widths: instructions x bytes of a thread")
    print(_line(COLUMNS))

    records, failed = [], 0
    for spec in specs:
        for architecture in args.arch:
            try:
                compiled = compile_spec(spec, architecture)
            except ToolMissing as error:
                print(f"report: {error}", file=sys.stderr)
                return 2
            except Exception as error:  # whatever the compiler raises; the other kernels are reported all the same
                failed += 1
                print(f"{spec.name} sm_{architecture} does not compile: {type(error).__name__}: {error}")
                continue
            print(_line(_row(spec, architecture, compiled)), flush=True)
            records.append(_record(spec, architecture, compiled))

    if args.json:
        _write(args.json, records)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
