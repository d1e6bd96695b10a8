"""The choice of the backend, and the trial that it rests on."""

import logging
import os
import time
from functools import partial

import pytest
import torch

from cae_fast.config import UserError
from cae_fast.data import backend, dali
from cae_fast.data import batches as loader_module
from cae_fast.data.backend import choose_backend, try_out
from cae_fast.data.index import build_index
from cae_fast.data.loader import pretrain_loader
from cae_fast.data.sampling import SamplingPlan
from cae_kernels import random_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_dali = pytest.mark.skipif(dali.why_not() is not None, reason="needs nvidia-dali: pip install 'cae-fast[data]'")


@pytest.fixture(scope="module")
def open_loader(tmp_path_factory, photograph, encode):
    root = tmp_path_factory.mktemp("images")
    for i in range(12):
        (root / f"{i}.jpg").write_bytes(encode(photograph(60, 80, i), "JPEG"))
    index = build_index(root, tmp_path_factory.mktemp("indexes") / "x.index", 10_000)
    plan = SamplingPlan(12, index.heights, index.widths, 4, 3, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
    mask = partial(random_mask, seed=0, height=4, width=4, num_masked=8)
    sizes = {"image_size": 32, "token_size": 16, "micro_batch_size": 4}
    return partial(pretrain_loader, index, plan, mask, rank=0, world_size=1, num_workers=0, **sizes)


@pytest.fixture
def said(caplog, monkeypatch):
    """What choose_backend says of a choice, with DALI installed."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(backend, "why_not", lambda: None)

    def choose(*arguments):
        caplog.clear()
        chosen = choose_backend(*arguments, lambda: None)
        (record,) = caplog.records
        assert record.message.startswith(f"data: backend {chosen}: ")
        return record.message.removeprefix("data: backend ")

    return choose


def test_as_configured_or_as_begun(said):
    assert said("cpu", None, CUDA) == "cpu: as data.backend says"
    assert said("pil", "dali", CUDA) == "pil: as data.backend says"  # whether a run may change it, resuming decides
    assert said("dali", None, CPU) == "dali: as data.backend says"
    assert said("auto", "dali", CPU) == "dali: the run began with it"
    assert said("auto", "cpu", CUDA) == "cpu: the run began with it"
    assert said("auto", None, CPU) == "cpu: without a GPU, DALI is slower"


def test_what_cannot_be(said, monkeypatch):
    with pytest.raises(UserError, match=r"data\.backend is 'gpu': set one of auto, dali, cpu, pil"):
        said("gpu", None, CPU)
    monkeypatch.setattr(backend, "why_not", lambda: "it is not there")
    assert said("auto", None, CUDA) == "cpu: it is not there"
    with pytest.raises(UserError, match=r"data\.backend is dali \(as data.backend says\): it is not there"):
        said("dali", None, CUDA)
    with pytest.raises(UserError, match=r"data\.backend is dali \(the run began with it\): it is not there"):
        said("auto", "dali", CPU)


def test_the_faster_one(said, monkeypatch):
    for result, expected in (
        ({"dali": 3000.4, "cpu": 900.2}, "dali: the faster one on these images, in images/s: dali 3000, cpu 900"),
        ({"dali": 300.0, "cpu": 900.0}, "cpu: the faster one on these images, in images/s: dali 300, cpu 900"),
        ("its process ended with status -11", "cpu: DALI failed its trial: its process ended with status -11"),
    ):
        monkeypatch.setattr(backend, "try_out", lambda trial, timeout, result=result: result)
        assert said("auto", None, CUDA) == expected


def test_a_crash_a_hang_and_an_error_stay_in_the_trial():
    assert try_out(os.abort, 60) == "its process ended with status -6"
    assert try_out(partial(int, "x"), 60) == "ValueError: invalid literal for int() with base 10: 'x'"
    began = time.monotonic()
    assert try_out(partial(time.sleep, 600), 0.5) == "no result after 0 s"
    assert time.monotonic() - began < 60


@needs_dali
def test_the_trial_measures_both_in_its_own_process(open_loader):
    rates = try_out(partial(backend._measure, open_loader, CPU, 0.3), 60)
    assert list(rates) == ["dali", "cpu"]
    assert min(rates.values()) > 10


@needs_dali
def test_wrong_pixels_fail_the_trial(open_loader, monkeypatch):
    right = loader_module.resized_crop
    monkeypatch.setattr(loader_module, "resized_crop", lambda *arguments: right(*arguments) // 2)
    assert "its pixels differ from the CPU path's by" in backend._measure(open_loader, CPU, 0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@needs_dali
def test_auto_on_a_gpu(open_loader, caplog):
    caplog.set_level(logging.INFO)
    chosen = choose_backend("auto", None, CUDA, open_loader)
    assert chosen in ("dali", "cpu")
    assert "the faster one on these images, in images/s: dali " in caplog.text
