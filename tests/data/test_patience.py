"""Troubles of the machine: waited for, never taken for bad images."""

import errno
import os
import resource
import subprocess
import sys
import threading

import fsspec
import numpy as np
import pytest
import torch

from cae_fast.config import UserError
from cae_fast.data import folder as folder_module
from cae_fast.data import patience
from cae_fast.data import shards as shards_module
from cae_fast.data.folder import Folder
from cae_fast.data.index import build_index, find_source, open_index
from cae_fast.data.loader import labelled_loader, pretrain_loader
from cae_fast.data.masking import no_mask
from cae_fast.data.patience import patiently
from cae_fast.data.sampling import SamplingPlan
from cae_fast.data.shards import Shards

TROUBLES = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.ECONNRESET)
NUM_IMAGES = 12


@pytest.fixture
def waits(monkeypatch):
    """The waits of a test, which takes none."""
    taken = []
    monkeypatch.setattr(patience.time, "sleep", taken.append)
    return taken


@pytest.fixture
def images(tmp_path, photograph, encode):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for i in range(NUM_IMAGES):
        (tmp_path / "images" / "cat" / f"{i:02}.png").write_bytes(encode(photograph(20, 30, i), "PNG"))
    return tmp_path / "images"


@pytest.fixture
def tars(images, tmp_path):
    for i in range(3):
        names = [f"{n:02}.png" for n in range(4 * i, 4 * i + 4)]
        (tmp_path / "tars").mkdir(exist_ok=True)
        subprocess.run(["tar", "cf", tmp_path / "tars" / f"{i}.tar", "-C", images / "cat", *names], check=True)
    return tmp_path / "tars"


def load(index, num_workers=0):
    plan = SamplingPlan(len(index), index.heights, index.widths, 4, 3, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    settings = {"image_size": 24, "token_size": None, "start_step": 0, "stop_step": 9, "rank": 0, "world_size": 1}
    return list(
        pretrain_loader(index, plan, no_mask, micro_batch_size=4, num_workers=num_workers, pin_memory=False, **settings)
    )


def failing(error, times, function, counter=None):
    """`function`, that fails `times` times first."""
    counter = [] if counter is None else counter

    def call(*arguments, **options):
        if len(counter) < times:
            counter.append(1)
            raise error() if error is MemoryError else OSError(error, os.strerror(error))
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("error", [*TROUBLES, MemoryError])
def test_waits_and_goes_on(waits, error):
    assert patiently("x", failing(error, 3, lambda: 7)) == 7
    assert waits == pytest.approx([0.1, 0.2, 0.4])


@pytest.mark.parametrize("error", [*TROUBLES, MemoryError])
def test_gives_up_with_one_line(waits, error):
    with pytest.raises(UserError, match=r"^x: cannot be read: .*; tried again for 13 s$"):
        patiently("x", failing(error, 100, lambda: 7))
    assert sum(waits) == pytest.approx(12.7)


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EACCES, errno.ELOOP, errno.EISDIR])
def test_what_is_the_files_fault_is_not_waited_for(waits, error):
    with pytest.raises(OSError, match=os.strerror(error)):
        patiently("x", failing(error, 1, lambda: 7))
    assert waits == []


@pytest.mark.parametrize("error", [*TROUBLES, MemoryError])
@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_passing_troubles_change_nothing(images, tars, tmp_path, waits, monkeypatch, error, kind):
    source = find_source([str(images if kind == "folder" else tars)])
    index = build_index(source, tmp_path / "x.index", 10_000)
    expected = load(index)
    assert_same_index_and_batches(source, tmp_path, monkeypatch, error, index, expected)
    assert len(waits) > 0


def assert_same_index_and_batches(source, tmp_path, monkeypatch, error, index, expected):
    for module, place in ((folder_module, "open_file"), (folder_module.os, "stat"), (folder_module.os, "scandir")):
        with monkeypatch.context() as patch:
            patch.setattr(module, place, failing(error, 5, getattr(module, place)))
            again = build_index(source, tmp_path / "again.index", 10_000) if place == "open_file" else index
            states = source.states()
        assert again.fingerprint == index.fingerprint
        assert again.num_bad == 0
        assert states == index.states
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "read", failing(error, 5, type(source).read))
        batches = load(index)
    for batch, right in zip(batches, expected, strict=True):
        assert batch.replaced == []
        assert torch.equal(batch.images, right.images)


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE, MemoryError])
@pytest.mark.parametrize("source", [Folder, Shards])
def test_lasting_troubles_end_the_run(images, tars, tmp_path, waits, monkeypatch, error, source):
    index = build_index(find_source([str(images if source is Folder else tars)]), tmp_path / "x.index", 10_000)
    monkeypatch.setattr(source, "read", failing(error, 10**6, source.read))
    for num_workers in (0, 1):
        with pytest.raises(UserError, match="cannot be read: .*; tried again for 13 s"):
            load(index, num_workers)
        with pytest.raises(UserError, match="cannot be read: .*; tried again for 13 s"):
            list(labelled_loader(index, 24, 4, num_workers))


def test_lasting_troubles_end_a_scan(images, tmp_path, waits, monkeypatch):
    monkeypatch.setattr(folder_module, "open_file", failing(errno.EIO, 10**6, folder_module.open_file))
    with pytest.raises(UserError, match="cannot be read: Input/output error"):
        build_index(images, tmp_path / "x.index", 10_000)
    assert not (tmp_path / "x.index").exists()


@pytest.mark.parametrize("kind", ["folder", "tars"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_are_away_for_a_moment(images, tars, tmp_path, kind, num_workers):
    root = images if kind == "folder" else tars
    index = build_index(find_source([str(root)]), tmp_path / "x.index", 10_000)
    expected = load(index)
    shards_module._opened.cache_clear()
    root.rename(tmp_path / "away")
    timer = threading.Timer(1.0, (tmp_path / "away").rename, [root])
    timer.start()
    batches = load(index, num_workers)
    timer.join()
    for batch, right in zip(batches, expected, strict=True):
        assert batch.replaced == []
        assert torch.equal(batch.images, right.images)


def test_images_that_stay_away(images, tmp_path, waits):
    index = build_index(images, tmp_path / "x.index", 10_000)
    (images / "cat").rename(tmp_path / "away")
    with pytest.raises(UserError, match="its folder is gone or empty"):
        load(index)
    (images / "cat").mkdir()  # as where nothing is mounted
    with pytest.raises(UserError, match="its folder is gone or empty"):
        load(index)
    (tmp_path / "away" / "00.png").rename(images / "cat" / "00.png")
    waits.clear()
    with pytest.raises(FileNotFoundError):  # the disk is there: this image is gone for good
        index.read(1)
    assert waits == []


FEW = """
import sys
from pathlib import Path
from cae_fast.data.index import build_index, find_source
from cae_fast.data.shards import MAX_OPEN_FILES
index = build_index(find_source([sys.argv[1]]), Path(sys.argv[2]), 10_000)
for _ in range(2):
    for i in range(len(index)):
        index.read(i)
print(MAX_OPEN_FILES, len(index), index.num_bad)
"""


def test_the_cache_of_open_tars_keeps_to_the_limit_of_descriptors(tars, tmp_path):
    content = (tars / "0.tar").read_bytes()
    for i in range(3, 80):
        (tars / f"{i}.tar").write_bytes(content)

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    command = [sys.executable, "-c", FEW, str(tars), str(tmp_path / "x.index")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        command, preexec_fn=limit, env=environment, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert output.split() == ["16", "320", "0"]


def test_a_stale_descriptor_is_opened_again(tars, tmp_path, waits, monkeypatch):
    index = build_index(find_source([str(tars)]), tmp_path / "x.index", 10_000)
    content = index.read(0)
    monkeypatch.setattr(shards_module.os, "pread", failing(errno.ESTALE, 1, os.pread))
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        index.read(0)
    assert shards_module._opened.cache_info().currsize == 0
    assert np.array_equal(open_index(index.folder).read(0), content)


@pytest.mark.parametrize("times", [3, 10**6])
def test_a_network_in_trouble(tars, tmp_path, waits, monkeypatch, times):
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe_file(f"/unsteady/{i}.tar", (tars / f"{i}.tar").read_bytes())
    source = find_source(["memory://unsteady"])
    index = build_index(source, tmp_path / "x.index", 10_000)
    content = index.read(0)

    class Reset(Exception):
        """As each package for a protocol has its own."""

    def unsteady(function, failed):
        def call(*arguments, **options):
            if len(failed) < times:
                failed.append(1)
                raise Reset("connection reset")
            return function(*arguments, **options)

        return call

    for name in ("open", "info", "cat_file"):
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), name, unsteady(getattr(type(memory), name), []))
            use = {
                "open": lambda: build_index(source, tmp_path / "again.index", 10_000).fingerprint == index.fingerprint,
                "info": lambda: source.states() == index.states,
                "cat_file": lambda: patiently("x", lambda: index.read(0)) == content,
            }[name]
            if times == 3:
                assert use()
            else:
                with pytest.raises(UserError, match="cannot be read: Reset: connection reset; tried again for 13 s"):
                    use()
