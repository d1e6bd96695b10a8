"""Pretraining makes better features than random weights, and alignment makes latents that the decoder reads."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.learning import proof_of_learning as proof
from benchmarks.learning.cluttered_set import compose


@pytest.mark.slow
def test_pretraining_beats_random_weights(tmp_path):
    """One seed and less than half of the experiment's steps. Trials (seed 0): k-NN 53.0 and 71.7 after 500 steps;
    decoded with alignment 0.88 after 500 steps, without 2.14."""
    pytest.importorskip("torchmetrics", reason="needs torchmetrics", exc_type=(ImportError, RuntimeError))
    images = proof.image_sets(tmp_path)["fashion"]
    random = proof.measure(images, "random", 0, 0, tmp_path / "random", ("knn",))
    trained = proof.measure(images, "cae", 0, 600, tmp_path / "cae", ("knn",))
    apart = proof.measure(images, "no_alignment", 0, 300, tmp_path / "no_alignment", ())
    assert random["knn"] < 60
    assert trained["knn"] > random["knn"] + 10
    assert trained["decoded"] < 1.0 < 1.15 < apart["decoded"]


def test_a_stopped_pretraining_is_not_probed(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "cae_fast", lambda arguments: 0)  # as after SIGTERM, which is a success
    proof.run(["pretrain"], tmp_path)
    (tmp_path / "stopped.json").touch()
    with pytest.raises(InterruptedError, match="stopped"):
        proof.run(["pretrain"], tmp_path)


def test_missed_thresholds_are_named():
    def runs(knn, linear, decoded):
        return {str(seed): {"knn": knn + seed, "linear": linear + seed, "decoded": decoded} for seed in range(3)}

    good = {"random": runs(50, 70, 9.0), "cae": runs(63, 77, 0.7), "no_alignment": runs(99, 99, 1.5)}
    assert proof.missed({"fashion": good}, ["fashion"]) == []
    bad = {"random": runs(50, 70, 9.0), "cae": runs(61.5, 75.5, 0.85), "no_alignment": runs(0, 0, 0.9)}
    found = proof.missed({"fashion": bad}, ["fashion"])
    assert [text for text in found if "knn probe 11.5 points" in text or "linear probe 5.5 points" in text] == found[:2]
    assert len(found) == 2 + 3 + 3
    raw = {"raw_pixels": {"": {"knn": 81.04, "linear": 84.5}}, "cae": runs(60, 70, 0.5)}
    lines = proof.table({"fashion": raw}).splitlines()
    assert lines[2] == "| fashion | raw_pixels | 81.0 | 84.5 |  |  |  |"
    assert lines[3] == "| fashion | cae | 61.0 (60.0..62.0) | 71.0 (70.0..72.0) |  |  | 0.50 (0.50..0.50) |"


def test_cluttered_images_show_a_garment_on_a_photograph():
    garment = np.zeros((28, 28), np.uint8)
    garment[8:20, 8:20] = 200
    photograph = np.full((100, 120, 3), 7, np.uint8)
    sizes, places, tints = set(), set(), set()
    for seed in range(40):
        image = compose(Image.fromarray(garment), photograph, np.random.default_rng(seed))
        assert image.shape == (40, 40, 3)
        shown = (image != 7).any(-1)
        rows, columns = shown.any(1).nonzero()[0], shown.any(0).nonzero()[0]
        assert shown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.9
        sizes.add(len(rows))
        places.add((rows[0], columns[0]))
        tints.add(tuple(image[rows.mean().astype(int), columns.mean().astype(int)]))
    # 12 of 28 pixels, at 32 to 40.
    assert min(sizes) >= 13
    assert max(sizes) <= 18
    assert len(sizes) > 3
    assert len(places) > 12
    assert len(tints) > 30
    assert all(60 * 0.3 - 1 <= value <= 201 for tint in tints for value in tint)
    again = [compose(Image.fromarray(garment), photograph, np.random.default_rng(5)) for _ in range(2)]
    assert np.array_equal(*again)
