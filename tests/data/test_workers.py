"""Worker processes that die, and shared memory that is too small for them."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
import torch
from torch.utils.data import Dataset

from cae_fast.config import UserError
from cae_fast.data import workers
from cae_fast.data.index import build_index
from cae_fast.data.loader import labelled_loader, pretrain_loader
from cae_fast.data.masking import no_mask
from cae_fast.data.sampling import SamplingPlan
from cae_fast.data.workers import data_loader, worker_items


class Numbers(Dataset):
    """Tensors; a place below 0 is a batch that cannot be handed on."""

    def __getitem__(self, place):
        return (lambda: None) if place < 0 else torch.full((1000,), place)


@pytest.fixture
def index(tmp_path, photograph, encode):
    (tmp_path / "images").mkdir()
    for i in range(8):
        (tmp_path / "images" / f"{i}.png").write_bytes(encode(photograph(20, 30, i), "PNG"))
    return build_index(tmp_path / "images", tmp_path / "x.index", 10_000)


def pretrain(index, **changes):
    plan = SamplingPlan(len(index), index.heights, index.widths, 4, 3, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    settings = {"image_size": 24, "token_size": 12, "start_step": 0, "stop_step": 1000, "rank": 0, "world_size": 1}
    settings |= {"micro_batch_size": 4, "num_workers": 2, "pin_memory": False}
    return pretrain_loader(index, plan, no_mask, **(settings | changes))


def assert_names_the_remedy(error):
    for part in ("/dev/shm", "data.num_workers=0", "--shm-size"):
        assert part in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["pretrain", "labelled"])
def test_a_worker_that_is_killed_ends_the_run(index, kind):
    before = signal.getsignal(signal.SIGCHLD)
    many = list(range(8)) * 1000
    batches = pretrain(index) if kind == "pretrain" else labelled_loader(index, 24, 4, 2, sample_ids=many)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(1)  # nothing is raised here, in the middle of a step
    with pytest.raises(UserError, match="a worker process ended .status -9") as error:
        list(batches)
    assert_names_the_remedy(error.value)
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_batch_that_cannot_be_handed_on_ends_the_run(capfd):
    items = list(worker_items(data_loader(Numbers(), [0, 1, -1, 3, 4], 1, batch_bytes=8000)))
    assert [int(item[0]) for item in items[:-1]] in ([], [0], [0, 1])  # what the worker had handed on when it died
    assert isinstance(items[-1], UserError)
    assert "a worker process ended (status 1" in str(items[-1])
    assert_names_the_remedy(items[-1])
    assert capfd.readouterr().err == ""  # no worker's traceback


def test_errors_of_the_program_stay_what_they_are():
    class Failing(Numbers):
        def __getitem__(self, place):
            raise RuntimeError("deliberate")

    with pytest.raises(RuntimeError, match="deliberate"):
        list(worker_items(data_loader(Failing(), [0], 1, batch_bytes=0)))


def test_shared_memory_is_looked_at_first(index, monkeypatch):
    monkeypatch.setattr(workers, "_shared_memory", lambda: (64 << 20, 64 << 20))
    with pytest.raises(UserError, match=r"data\.num_workers=2: the workers' queues need 90 MB") as error:
        pretrain(index, image_size=1000, token_size=707)  # (2 * 2 + 1) * 4 * 3 * (1000**2 + 707**2) = 90 MB
    assert_names_the_remedy(error.value)
    with pytest.raises(UserError, match=r"data\.num_workers=2") as error:
        list(labelled_loader(index, 2000, 4, 2))
    pretrain(index, image_size=1000, token_size=707, num_workers=0).close()
    pretrain(index).close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # four that fit alone, but not together
    with pytest.raises(UserError, match=r"queues need 75 MB"):
        pretrain(index, image_size=560, token_size=None)


FULL = """
import sys
from test_workers import Numbers
from cae_fast.data.workers import data_loader, worker_items
import torch

class Large(Numbers):
    def __getitem__(self, place):
        return torch.zeros(300_000)

items = list(worker_items(data_loader(Large(), range(20), 2, batch_bytes=0)))
print(items[-1])
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare, to mount")
def test_shared_memory_that_is_full(tmp_path):
    mount = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} -c '{FULL}'"
    path = os.pathsep.join([*sys.path, os.path.dirname(__file__)])
    command = ["unshare", "-m", "bash", "-c", mount]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    if "mount" in result.stderr or "unshare" in result.stderr:
        pytest.skip(f"needs the right to mount: {result.stderr.strip()}")
    assert "status 28, No space left on device" in result.stdout
    assert_names_the_remedy(result.stdout.strip())
    assert "Traceback" not in result.stderr


def test_workers_end_with_their_reader():
    with closing(worker_items(data_loader(Numbers(), range(100), 2, batch_bytes=8000))) as items:
        next(items)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []
