"""Engines against each other: stages, numbers of processes, accumulation, skipped steps, states of one in another.

The truth is the plain engine in one process, which the golden steps of the original code test.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from running import ROOT, start_processes

pytest.importorskip("deepspeed", reason="needs the deepspeed package: pip install 'cae-fast[distributed]'")
pytestmark = pytest.mark.slow

WORKER = str(ROOT / "tests/distributed/engine_worker.py")
STAGES = (0, 1, 2, 3)
HALF = 3
STEPS = 10
# Every weight is shared out and given back after use; by default, tensors as small as these stay whole.
PARTITION_ALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
BF16 = {"precision": "bfloat16", "steps": 5}


class Runs:
    """What the cases of a run gave: losses and so on of every process, and the final training state."""

    def __init__(self, folder: Path, processes: int, cases: dict[str, dict[str, Any]]):
        self.folder = folder
        workers = start_processes([WORKER, str(folder), json.dumps(cases)], processes, folder)
        for worker in workers:
            output, _ = worker.communicate(timeout=400)
            assert worker.returncode == 0, output

    def result(self, name: str, rank: int = 0) -> dict[str, list[float]]:
        return json.loads((self.folder / f"{name}.rank{rank}.json").read_text())

    def losses(self, name: str) -> list[float]:
        return self.result(name)["losses"]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("two")
    overlay = folder / "partition_all.json"
    overlay.write_text(json.dumps({"zero_optimization": PARTITION_ALL}))
    whole: dict[str, dict[str, Any]] = {f"float{stage}": {"zero": stage, "steps": STEPS} for stage in STAGES}
    whole["partitioned"] = {"zero": 3, "steps": STEPS, "overlay": str(overlay)}
    whole["checkpointed"] = whole["partitioned"] | {"activation_checkpointing": True}
    whole["no_align"] = {"zero": 3, "steps": 3, "overlay": str(overlay), "align": False}
    whole["accumulated0"] = {"zero": 0, "accumulation": 2, "steps": 5}
    whole["accumulated2"] = {"zero": 2, "accumulation": 2, "steps": 5}
    whole |= {f"poisoned{stage}": {"zero": stage, "steps": 4, "poison": 2} for stage in STAGES}
    whole |= {f"offloaded{stage}": {"zero": stage, "steps": 5, "offload": True} for stage in (1, 3)}
    for name, file in (("shipped", "zero1_8xh100"), ("overlapped", "zero1_8xh100_overlap")):
        whole[name] = {"zero": 1, **BF16, "overlay": str(ROOT / f"configs/deepspeed/{file}.json")}
    whole |= {f"bf16_{stage}": {"zero": stage, **BF16} for stage in (0, 1, 2)}
    whole |= {f"half{stage}": {"zero": stage, **BF16, "steps": HALF} for stage in STAGES}
    loads = {"0to1": (0, 1), "1to2": (1, 2), "2to3": (2, 3), "3to0": (3, 0)}
    for name, (saved, loaded) in loads.items():
        file = str(folder / f"half{saved}.safetensors")
        whole[name] = {"zero": loaded, **BF16, "load": file, "seed": 9}
    return Runs(folder, 2, whole)


@pytest.fixture(scope="module")
def one(tmp_path_factory, two) -> Runs:
    cases: dict[str, dict[str, Any]] = {"plain": {"steps": STEPS}, "checkpointed": {"activation_checkpointing": True}}
    # torch's AdamW rounds the last elements of a tensor otherwise on a CPU: where its vectors do not fill the tensor.
    even = {**BF16, "even": True}
    cases |= {f"bf16_{stage}": {"zero": stage, **even} for stage in (0, 1, 2)}
    cases |= {f"bf16_accumulated{stage}": {"zero": stage, "accumulation": 2, **even} for stage in (0, 1)}
    cases |= {f"watched{stage}": {"zero": stage, **BF16, "steps": 3, "watched": True} for stage in (1, 2)}
    cases["no_align"] = {"steps": 3, "align": False}
    cases["poisoned"] = {"steps": 4, "poison": 2}
    for stage in (0, 3):
        cases[f"of_two{stage}"] = {"load": str(two.folder / f"half{stage}.safetensors"), "seed": 9, **BF16}
    return Runs(tmp_path_factory.mktemp("one"), 1, cases)


@pytest.fixture(scope="module")
def four(tmp_path_factory, two) -> Runs:
    file = str(two.folder / "half2.safetensors")
    loaded = {f"loaded{stage}": {"zero": stage, **BF16, "steps": HALF, "load": file, "seed": 9} for stage in STAGES}
    return Runs(tmp_path_factory.mktemp("four"), 4, loaded | {"went_on": {"zero": 2, **BF16, "load": file}})


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Weights within float32's rounding, blown up by Adam where gradients are nearly zero: by norms, not elements."""
    assert a.keys() == b.keys()
    for name in (name for name in a if name.startswith(("param/", "model/")) and not name.endswith("norm_k.bias")):
        assert (a[name] - b[name]).norm() <= 1e-5 * b[name].norm() + 1e-5, name


@pytest.mark.parametrize("name", ["float0", "float1", "float2", "float3", "partitioned", "checkpointed"])
def test_two_processes_are_one(one, two, name):
    losses, truth = two.losses(name), one.losses("plain")
    assert max(abs(a - b) for a, b in zip(losses, truth, strict=True)) < 1e-6 * max(truth)
    assert truth[-1] < 0.7 * truth[0]
    # Clipping and Adam would hide a wrong scale from the losses.
    assert two.result(name)["norms"] == pytest.approx(one.result("plain")["norms"], rel=1e-5)
    close(two.tensors(name), one.tensors("plain"))
    assert two.result(name, 0) == two.result(name, 1)


def test_a_model_without_alignment_runs_the_encoder_once(one, two):
    assert two.losses("no_align") == pytest.approx(one.losses("no_align"), rel=1e-6)
    close(two.tensors("no_align"), one.tensors("no_align"))


def test_activation_checkpointing_computes_the_same(one):
    same(one.tensors("checkpointed"), one.tensors("plain"))


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_of_one_process_is_the_plain_engine_bit_for_bit(one, stage):
    assert one.result(f"bf16_{stage}") == one.result("bf16_0")
    same(one.tensors(f"bf16_{stage}"), one.tensors("bf16_0"))


def test_bfloat16_accumulation_is_the_plain_engine_bit_for_bit(one):
    same(one.tensors("bf16_accumulated1"), one.tensors("bf16_accumulated0"))


def test_bfloat16_of_two_processes_is_the_same_in_stages_1_and_2(two):
    assert two.result("bf16_1") == two.result("bf16_2")
    same(two.tensors("bf16_1"), two.tensors("bf16_2"))
    same(two.tensors("bf16_1"), two.tensors("shipped"))
    same(two.tensors("bf16_1"), two.tensors("overlapped"))
    assert two.losses("bf16_0") == pytest.approx(two.losses("bf16_1"), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 2])
def test_accumulation_is_the_larger_batch(one, two, stage):
    assert two.losses(f"accumulated{stage}") == pytest.approx(one.losses("plain")[:5], rel=1e-6)
    assert two.result(f"accumulated{stage}")["norms"] == pytest.approx(one.result("plain")["norms"][:5], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_all_skip_a_step_that_is_not_finite_on_one(one, two, stage):
    results = [two.result(f"poisoned{stage}", rank) for rank in (0, 1)]
    assert results[0]["skipped"] == results[1]["skipped"] == [0, 0, 1, 0]
    assert math.isnan(results[0]["losses"][2])
    assert results[0]["losses"][3] == pytest.approx(one.losses("poisoned")[3], rel=1e-6)
    assert two.tensors(f"poisoned{stage}")["step"] == 3
    close(two.tensors(f"poisoned{stage}"), one.tensors("poisoned"))


@pytest.mark.parametrize("stage", [1, 3])
def test_offloading_computes_the_same(one, two, stage):
    assert two.losses(f"offloaded{stage}") == pytest.approx(one.losses("plain")[:5], rel=1e-6)


@pytest.mark.parametrize(("name", "saved", "loaded"), [("0to1", 0, 1), ("1to2", 1, 2), ("2to3", 2, 3), ("3to0", 3, 0)])
def test_a_state_continues_in_another_stage(two, name, saved, loaded):
    """Bit for bit from 1 to 2, which compute the same; 0 and 3 sum their norms in another order."""
    straight = two.losses("bf16_1")[HALF:]
    assert two.losses(name) == (straight if name == "1to2" else pytest.approx(straight, rel=1e-5))
    if name == "1to2":
        same(two.tensors(name), two.tensors("bf16_1"))


@pytest.mark.parametrize("stage", STAGES)
def test_four_processes_load_the_state_of_two_exactly(two, four, stage):
    same(four.tensors(f"loaded{stage}"), two.tensors("half2"))


def test_a_state_continues_with_other_numbers_of_processes(one, two, four):
    straight = two.losses("bf16_1")[HALF:]
    for losses in (four.losses("went_on"), one.losses("of_two0"), one.losses("of_two3")):
        assert losses == pytest.approx(straight, rel=2e-3)
    assert one.losses("of_two0")[0] == pytest.approx(straight[0], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_never_waits_for_the_device(one, stage):
    """Its worker ran the last step under a watch that raises."""
    assert one.result(f"watched{stage}")["skipped"] == [0, 0, 0]


def test_the_consolidated_model_holds_the_masters(two):
    tensors = two.tensors("half3")
    masters = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("param/")}
    model = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model/")}
    assert masters.keys() < model.keys()
    assert all(torch.equal(model[name], master) for name, master in masters.items())
    assert {tensor.dtype for tensor in model.values()} == {torch.float32}
