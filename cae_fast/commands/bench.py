"""Measure this machine with the benchmarks of a source checkout; their own options follow the name.

cae-fast bench ops -k attention
cae-fast bench step --tiny
cae-fast bench step --help
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import cae_fast
from cae_fast.config import UserError

SCRIPTS = {"ops": "ops.py", "step": "train_step.py", "data": "data_loading.py", "tokenizer": "tokenizer.py"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=list(SCRIPTS), help="kernels, whole steps, data loading, tokenizer")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="--json FILE (default bench_NAME.json) and others")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status of the benchmark: 1 where something in it failed."""
    root = Path(cae_fast.__file__).resolve().parents[1]
    script = root / "benchmarks" / SCRIPTS[args.benchmark]
    if not script.is_file():
        raise UserError(f"there is no {script}: benchmarks are in a source checkout, installed with pip install -e .")
    options = list(args.options)
    if not {"-h", "--help"} & set(options) and not any(option.split("=")[0] == "--json" for option in options):
        options += ["--json", f"bench_{args.benchmark}.json"]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, str(script), *options], env=os.environ | {"PYTHONPATH": path}).returncode
