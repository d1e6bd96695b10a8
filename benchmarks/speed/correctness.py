"""The tests that need a GPU, before anything is timed: pytest -m gpu, with every outcome written as it comes.

python -m benchmarks.speed.correctness --json correctness.json -- tests/kernels -k attention

Tests run in a process of their own. One that leaves the GPU unusable (an illegal address) or takes longer than --limit
fails and ends that process; a new one goes on behind it. What passed before on this device, with this source, is not
run again. Exits with 1 where a test or the collection failed, and where a GPU is there but no test ran.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.record import device_lost, earlier, record, save

MARKED = ["-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", "--continue-on-collection-errors"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", action="store_true", help="run also what passed before")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a test")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", default=["tests"], help="of pytest, after --")
    args = parser.parse_args(argv)
    if args.child:
        return int(pytest.main([*MARKED, *args.options], plugins=[Recorder(args.json)]))

    with tempfile.TemporaryDirectory() as folder:
        path = args.json or Path(folder) / "correctness.json"
        before = None if args.again else earlier(path)
        kept = {name: test for name, test in before["tests"].items() if test["outcome"] == "passed"} if before else {}
        if kept:
            print(f"{path}: {len(kept)} tests passed before; --again runs them again", flush=True)
        found = record("correctness", tests=kept, errors={}, running=None, counts={})
        save(path, found)
        while run_child(path, args):
            pass
        return verdict(path)


def run_child(path: Path, args: argparse.Namespace) -> bool:
    """Run what has no outcome yet; True where a test ended that before the others had their turn."""
    command = [sys.executable, "-m", "benchmarks.speed.correctness", "--child", "--json", str(path), "--"]
    child = subprocess.Popen([*command, *args.options])
    running, since = None, time.monotonic()
    while child.poll() is None:
        time.sleep(0.5)
        test = earlier_or_empty(path).get("running")
        if test != running:
            running, since = test, time.monotonic()
        if running and time.monotonic() - since > args.limit:
            child.kill()
            child.wait()

    # A test that was running when its process ended has failed; all others have their outcome.
    found = earlier_or_empty(path)
    test = found.get("running")
    if test:
        slow = time.monotonic() - since > args.limit
        why = f"took longer than {args.limit:.0f} s" if slow else f"its process ended with status {child.returncode}"
        found["tests"][test] = {"outcome": "failed", "seconds": time.monotonic() - since, "message": why}
    found |= {"status": child.returncode, "running": None}
    lost = bool(found.pop("lost", False)) or bool(test)
    save(path, found)
    return lost


def earlier_or_empty(path: Path) -> dict[str, Any]:
    return earlier(path) or {}


def verdict(path: Path) -> int:
    """0 where tests ran and none failed; without a GPU it is enough that they were found."""
    found = earlier_or_empty(path)
    tests = found["tests"].values()
    counts = Counter(test["outcome"] for test in tests)
    ran, needed = counts["passed"] + counts["failed"], torch.cuda.is_available()
    failed = counts["failed"] or found["errors"] or found["status"] not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)
    failed = failed or not (ran if needed else tests)
    save(path, found | {"counts": dict(counts)})

    parts = [f"{ran} ran", *(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))]
    unread = f"{len(found['errors'])} files could not be read"
    print(f"GPU tests: {found.get('collected', 0)} found, {', '.join(parts)}; {unread}", flush=True)
    if needed and not ran:
        print("no GPU test ran: nothing is known to be correct")
    return 1 if failed else 0


class Recorder:
    """A pytest plugin: skips what has an outcome in the file, and writes each outcome there as it comes."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, earlier_or_empty(path)
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.found["errors"][report.nodeid] = str(report.longrepr)[-2000:]

    @pytest.hookimpl(trylast=True)  # after -m and -k have chosen
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.found["collected"] = len(items)
        done = [item for item in items if item.nodeid in self.found["tests"]]
        items[:] = [item for item in items if item.nodeid not in self.found["tests"]]
        config.hook.pytest_deselected(items=done)
        save(self.path, self.found)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.found["running"] = nodeid
        save(self.path, self.found)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        test = {"outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            test["message"] = str(report.longrepr)[-2000:]
        self.found["tests"][report.nodeid] = test
        if report.failed and device_lost():
            self.found["lost"] = True
            if self.session is not None:
                self.session.shouldstop = "the GPU is unusable to this process"

    def pytest_runtest_logfinish(self) -> None:
        self.found["running"] = None
        self.found["counts"] = dict(Counter(test["outcome"] for test in self.found["tests"].values()))
        save(self.path, self.found)


if __name__ == "__main__":
    sys.exit(main())
