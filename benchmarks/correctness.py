"""The tests that need a GPU, before anything is timed: pytest -m gpu, with a JSON record of how they ended.

python benchmarks/correctness.py --json correctness.json -- tests/kernels -k attention
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from record import record, save


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", default=["tests"], help="of pytest, after --")
    args = parser.parse_args(argv)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *args.options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = process.wait()
    if args.json:
        counts = {outcome: int(count) for count, outcome in re.findall(r"(\d+) (\w+)", lines[-1] if lines else "")}
        save(args.json, record("correctness", status=status, counts=counts, output=lines[-200:]))
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
