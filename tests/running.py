"""The program in processes of its own, as a user starts it, and what a run leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


class Program:
    """`cae-fast COMMAND small.yaml` in a folder."""

    def __init__(self, command: str):
        self.command = command

    def start(self, folder: Path, *overrides: str, **popen) -> subprocess.Popen:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "cae_fast", self.command, "small.yaml", *overrides],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **popen,
        )

    def finish(self, folder: Path, *overrides: str, status: int = 0) -> str:
        """Its output; asserts its exit status."""
        process = self.start(folder, *overrides)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == status, output
        return output


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
