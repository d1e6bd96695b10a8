"""The program in processes of its own, as a user starts it, and what a run leaves behind."""

import json
import os
import socket
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_processes(command: list[str], count: int, folder: Path, **environment: str) -> list[subprocess.Popen]:
    """`python COMMAND` in `count` processes that find each other as a launcher would have them do it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    common = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONWARNINGS": "ignore"}
    common |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=os.environ | common | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
