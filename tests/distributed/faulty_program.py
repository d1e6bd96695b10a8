"""The program with something that happens in one process before a step: FAULT=KIND:RANK:STEP in the environment.

Only in a launcher's first attempt: what it starts again is healthy.
"""

import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from cae_fast.cli import main
from cae_fast.commands import pretrain

kind, rank, step = os.environ["FAULT"].split(":")
sound = pretrain.take_step


def happen(run_dir: Path) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise RuntimeError("a fault for the test")
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "full":  # what is there can be read, but nothing more be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    elif kind == "remove":
        shutil.rmtree(run_dir)
    elif kind == "replace":
        shutil.rmtree(run_dir)
        run_dir.write_text("not a folder")


def take_step(job, inputs, number, lr):
    if number == int(step) and job.run.world.rank == int(rank):
        happen(job.run.run_dir)
    return sound(job, inputs, number, lr)


if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    pretrain.take_step = take_step
sys.exit(main())
