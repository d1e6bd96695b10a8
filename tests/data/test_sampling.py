import math
import pickle

import numpy as np
import pytest
from scipy import stats

from cae_fast.config import UserError
from cae_fast.data.sampling import CHUNK, WINDOW, SamplingPlan, ShardOrder, permute, philox4x32

# Random123's known-answer file (kat_vectors), philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def make_plan(n=1000, batch=64, seed=0, height=375, width=500, scale=SCALE, ratio=RATIO, flip=0.5):
    heights = np.broadcast_to(np.asarray(height, np.int32), n)
    widths = np.broadcast_to(np.asarray(width, np.int32), n)
    return SamplingPlan(n, heights, widths, batch, seed, scale, ratio, flip)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, result):
    words = [int(word, 16) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox4x32(low | high << 32, *words)] == result.split()


def test_philox_is_elementwise():
    counters = np.random.default_rng(0).integers(0, 2**32, (4, 50), dtype=np.uint64)
    together = np.stack(philox4x32(7, *counters))
    alone = np.stack([np.array(philox4x32(7, *column)) for column in counters.T], axis=1)
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 16, 97, 1000, 65_537])
def test_permutation_is_a_bijection(n):
    for epoch in range(3):
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed=3, epoch=epoch)), np.arange(n))


def test_permutation_differs_between_epochs_and_seeds():
    orders = [permute(np.arange(1000), 1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 15  # two random orders agree in one place on average


@pytest.mark.parametrize("n", [10, 13, 64])
def test_every_place_gets_every_image_equally_often(n):
    epochs = 4000
    orders = np.stack([permute(np.arange(n), n, seed=11, epoch=epoch) for epoch in range(epochs)])
    for place in range(n):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=n)).pvalue > 1e-5
    # Neighbours in the order: each ordered pair of different images equally often.
    pairs = np.bincount((orders[:, :-1] * n + orders[:, 1:]).ravel(), minlength=n * n).reshape(n, n)
    assert pairs.diagonal().sum() == 0
    assert stats.chisquare(pairs[~np.eye(n, dtype=bool)]).pvalue > 1e-5


def test_order_is_uncorrelated_with_the_index():
    n = 100_003
    order = permute(np.arange(n), n, seed=0, epoch=0)
    assert abs(stats.spearmanr(np.arange(n), order).statistic) < 5 / math.sqrt(n)
    assert abs(stats.spearmanr(order[:-1], order[1:]).statistic) < 5 / math.sqrt(n)


def test_an_epoch_takes_every_image_at_most_once():
    plan = make_plan(n=1000, batch=64)
    assert plan.steps_per_epoch == 15
    for epoch in range(2):
        steps = range(epoch * 15, epoch * 15 + 15)
        ids = np.concatenate([plan.draw(step, 0, 64).sample_ids for step in steps])
        assert len(np.unique(ids)) == 960
        assert ids.min() >= 0
        assert ids.max() < 1000
    assert not np.array_equal(plan.draw(0, 0, 64).sample_ids, plan.draw(15, 0, 64).sample_ids)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 4, 16])
def test_global_batches_do_not_depend_on_how_they_are_cut(world_size, micro):
    random = np.random.default_rng(0)
    heights, widths = random.integers(1, 800, (2, 999)).astype(np.int32)
    whole = SamplingPlan(999, heights, widths, 64, 5, SCALE, RATIO, 0.5)
    share = 64 // world_size
    for step in (0, 3, 14, 15, 40):
        expected = whole.draw(step, 0, 64)
        assert np.array_equal(expected.positions, step * 64 + np.arange(64))
        parts = [
            SamplingPlan(999, heights, widths, 64, 5, SCALE, RATIO, 0.5).draw(step, start, start + micro)
            for rank in range(world_size)
            for start in range(rank * share, (rank + 1) * share, micro)
        ]
        for name in ("positions", "sample_ids", "boxes", "flips"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(joined, getattr(expected, name)), name


def test_a_step_can_be_drawn_without_the_ones_before():
    first, second = make_plan(), make_plan()
    drawn = [first.draw(step, 0, 64) for step in range(40)]
    alone = second.draw(37, 0, 64)
    assert np.array_equal(drawn[37].sample_ids, alone.sample_ids)
    assert np.array_equal(drawn[37].boxes, alone.boxes)


def test_positions_beyond_32_bits_differ():
    plan = make_plan(n=64)
    low, high = np.arange(64), np.arange(64) + 2**32
    assert not np.array_equal(plan.boxes(low, low), plan.boxes(high, low))


def resized_crop_law(random, height, width, n, scale=SCALE, ratio=RATIO):
    """torchvision.transforms.RandomResizedCrop.get_params, as its documentation and source state it."""
    boxes = np.empty((n, 4), np.int64)
    for k in range(n):
        for _ in range(10):
            area = height * width * random.uniform(*scale)
            aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                boxes[k] = random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w
                break
        else:
            w, h = width, height
            if width / height < ratio[0]:
                h = round(w / ratio[0])
            elif width / height > ratio[1]:
                w = round(h * ratio[1])
            boxes[k] = (height - h) // 2, (width - w) // 2, h, w
    return boxes


def statistics_of(boxes, height, width):
    top, left, h, w = boxes.T.astype(float)
    return {
        "area": h * w / (height * width),
        "ratio": np.log(w / h),
        "top": top,
        "left": left,
        "free rows": np.where(height > h, top / np.maximum(height - h, 1), 0.5),
        "height": h,
        "width": w,
        "center": (top + h / 2) * (left + w / 2),
    }


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 500), (640, 300), (80, 1200)])
def test_crops_follow_the_law_of_random_resized_crop(height, width):
    n = 20_000
    plan = make_plan(n=n, batch=n, seed=1, height=height, width=width)
    ours = plan.draw(0, 0, n).boxes
    expected = resized_crop_law(np.random.default_rng(2), height, width, n)
    for name, values in statistics_of(ours, height, width).items():
        reference = statistics_of(expected, height, width)[name]
        assert stats.ks_2samp(values, reference).pvalue > 1e-4, name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2000), (2000, 3), (1, 2000), (2, 2), (28, 28)])
def test_small_and_long_images(height, width):
    n = 4000
    ours = make_plan(n=n, batch=n, height=height, width=width).draw(0, 0, n).boxes.astype(np.int64)
    top, left, h, w = ours.T
    assert h.min() >= 1
    assert w.min() >= 1
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + h).max() <= height
    assert (left + w).max() <= width
    expected = resized_crop_law(np.random.default_rng(3), height, width, n)
    values, counts = np.unique(np.concatenate([ours, expected]), axis=0, return_inverse=True)
    table = np.stack([np.bincount(part.ravel(), minlength=len(values)) for part in np.split(counts, 2)])
    common = table[:, table.sum(axis=0) >= 20]
    if common.shape[1] > 1:
        assert stats.chi2_contingency(common).pvalue > 1e-4
    else:
        assert np.array_equal(table[0], table[1])


def test_box_of_the_whole_image():
    boxes = make_plan(n=100, batch=100, height=50, width=50, scale=(1, 1), ratio=(1, 1)).draw(0, 0, 100).boxes
    assert np.array_equal(boxes, np.tile([0, 0, 50, 50], (100, 1)))


def test_a_narrow_ratio_never_gives_an_empty_crop():
    boxes = make_plan(n=50, batch=50, height=1, width=1, ratio=(4, 5)).draw(0, 0, 50).boxes
    assert np.array_equal(boxes, np.tile([0, 0, 1, 1], (50, 1)))


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_flips_are_binomial(probability):
    n = 20_000
    flips = make_plan(n=n, batch=n, flip=probability).draw(0, 0, n).flips
    assert flips.dtype == bool
    if probability in (0.0, 1.0):
        assert flips.mean() == probability
    else:
        assert stats.binomtest(int(flips.sum()), n, probability).pvalue > 1e-4


def test_flips_and_crops_are_independent():
    n = 20_000
    drawn = make_plan(n=n, batch=n).draw(0, 0, n)
    for column in range(4):
        flipped, straight = drawn.boxes[drawn.flips, column], drawn.boxes[~drawn.flips, column]
        assert stats.ks_2samp(flipped, straight).pvalue > 1e-4


def test_crops_of_one_image_differ_between_epochs_and_seeds():
    plans = [make_plan(n=64, seed=0), make_plan(n=64, seed=1), make_plan(n=64, seed=2**32)]
    ids = np.zeros(1000, np.int64)
    boxes = [plan.boxes(np.arange(1000) + offset, ids) for plan in plans for offset in (0, 1000)]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert (a == b).all(axis=1).mean() < 0.01


def test_replacement_is_another_image_every_time():
    plan = make_plan(n=20, batch=8, seed=4)
    for position in (0, 7, 15, 16, 100):
        step, image = divmod(position, 8)
        own = int(plan.draw(step, image, image + 1).sample_ids[0])
        substitutes = [plan.replacement(position, attempt) for attempt in range(1, 20)]
        assert sorted([own, *substitutes]) == list(range(20))
        assert substitutes == [make_plan(n=20, batch=8, seed=4).replacement(position, k) for k in range(1, 20)]


def test_replacements_are_spread_over_the_images():
    plan = make_plan(n=50, batch=50)
    firsts = [plan.replacement(position, 1) for position in range(5000)]
    assert stats.chisquare(np.bincount(firsts, minlength=50)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"n": 63}, "train.global_batch_size=64"),
        ({"n": 0}, "train.global_batch_size=64"),
        ({"scale": (0.0, 1.0)}, "data.crop_scale"),
        ({"scale": (0.5, 0.2)}, "data.crop_scale"),
        ({"scale": (0.5, 1.2)}, "data.crop_scale"),
        ({"ratio": (2.0, 1.0)}, "data.crop_ratio"),
        ({"ratio": (1.0,)}, "data.crop_ratio"),
        ({"flip": 1.5}, "data.horizontal_flip"),
    ],
)
def test_settings_out_of_range(settings, names):
    with pytest.raises(UserError, match=names):
        make_plan(**settings)


@pytest.mark.parametrize(("step", "start", "stop"), [(-1, 0, 1), (0, 0, 65), (0, 5, 4)])
def test_images_outside_the_batch(step, start, stop):
    with pytest.raises(ValueError, match="outside"):
        make_plan().draw(step, start, stop)


SHARD_SIZES = {
    "equal": [1000] * 40,
    "uneven": [1, 0, 3000, 5, 64, 65, 700, 0, 0, 1300, 2, 128] * 5,
    "few": [500, 300],
    "one": [1000],
    "tiny": [1] * 300,
}


def shard_starts(sizes):
    return np.append(0, np.cumsum(sizes))


def shard_plan(sizes, batch=64, seed=5):
    random = np.random.default_rng(0)
    heights, widths = random.integers(1, 800, (2, sum(sizes))).astype(np.int32)
    return SamplingPlan(
        sum(sizes), heights, widths, batch, seed, SCALE, RATIO, 0.5, shuffle="shard", shard_starts=shard_starts(sizes)
    )


@pytest.mark.parametrize("sizes", SHARD_SIZES.values(), ids=SHARD_SIZES)
def test_shard_order_is_a_bijection(sizes):
    n = sum(sizes)
    for epoch in (0, 1, 2**33):
        order = ShardOrder(shard_starts(sizes), seed=3).sample_ids(np.arange(n), epoch)
        assert np.array_equal(np.sort(order), np.arange(n))


def test_shard_order_differs_between_epochs_and_seeds():
    for sizes in (SHARD_SIZES["equal"], SHARD_SIZES["one"]):
        starts, places = shard_starts(sizes), np.arange(sum(sizes))
        orders = [ShardOrder(starts, seed).sample_ids(places, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
        for i, a in enumerate(orders):
            for b in orders[:i]:
                assert (a == b).mean() < 0.02


@pytest.mark.parametrize("sizes", [SHARD_SIZES["equal"], SHARD_SIZES["uneven"]])
def test_shard_order_is_local_and_nearly_sequential(sizes):
    starts = shard_starts(sizes)
    order = ShardOrder(starts, seed=1).sample_ids(np.arange(sum(sizes)), 0)
    shards = np.searchsorted(starts, order, side="right") - 1
    first_of = {shard: np.flatnonzero(shards == shard)[0] for shard in np.unique(shards)}
    ends = {shard: np.flatnonzero(shards == shard)[-1] for shard in first_of}
    opened = [sum(first_of[s] <= place <= ends[s] for s in first_of) for place in range(0, len(order), 97)]
    assert max(opened) <= WINDOW
    for shard in first_of:
        read = (order[shards == shard] - starts[shard]).astype(np.int64)  # in order of time
        size = len(read)
        shifts = [
            np.abs((read - np.arange(size) - shift + size // 2) % size - size // 2).max() for shift in range(size)
        ]
        assert min(shifts) < CHUNK  # from one image on, once round, each out of its turn by less than a chunk


def test_shard_order_mixes_the_shards_of_a_window():
    starts = shard_starts([1000] * 16)
    order = ShardOrder(starts, seed=2).sample_ids(np.arange(16_000), 0)
    for part in np.split(order // 1000, 10):
        assert stats.chisquare(np.bincount(part, minlength=16)).pvalue > 1e-4


def test_shard_order_has_every_image_at_every_time():
    places = np.arange(200)
    orders = [ShardOrder(shard_starts([50, 150]), seed=0).sample_ids(places, epoch) for epoch in range(4000)]
    for image in (0, 49, 50, 120, 199):
        times = np.array([np.flatnonzero(order == image)[0] for order in orders])
        assert stats.kstest(times / 200, "uniform").pvalue > 1e-4


def test_shards_come_in_random_order():
    starts = shard_starts([10] * 64)
    firsts = [ShardOrder(starts, 0).sample_ids(np.arange(160), epoch) // 10 for epoch in range(2000)]
    assert all(len(np.unique(first)) == WINDOW for first in firsts)
    counts = np.bincount(np.concatenate([np.unique(first) for first in firsts]), minlength=64)
    # Each is in the first window in a quarter of the epochs; drawn without replacement, so the spread is smaller.
    assert stats.chisquare(counts).statistic / (1 - WINDOW / 64) < stats.chi2.ppf(1 - 1e-5, 63)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("sizes", [SHARD_SIZES["uneven"], SHARD_SIZES["tiny"]])
def test_shard_batches_do_not_depend_on_how_they_are_cut(world_size, sizes):
    whole, share = shard_plan(sizes), 64 // world_size
    plans = [shard_plan(sizes) for _ in range(world_size)]
    last = whole.steps_per_epoch
    for step in (last, 0, last - 1, 3, 2 * last + 1):  # in any order: nothing is carried over
        expected = whole.draw(step, 0, 64)
        parts = [
            plans[rank].draw(step, start, start + 16)
            for rank in range(world_size)
            for start in range(rank * share, (rank + 1) * share, 16)
        ]
        alone = shard_plan(sizes).draw(step, 0, 64)
        for name in ("positions", "sample_ids", "boxes", "flips"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(joined, getattr(expected, name)), name
            assert np.array_equal(getattr(alone, name), getattr(expected, name)), name


def test_shard_epoch_takes_every_image_at_most_once():
    plan = shard_plan([100] * 50)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        ids = np.concatenate([plan.draw(step, 0, 64).sample_ids for step in steps])
        assert len(np.unique(ids)) == len(ids) == 5000 // 64 * 64


def test_replacements_with_shards():
    plan = shard_plan([7, 0, 13], batch=8)
    for position in (0, 15, 16, 100):
        step, image = divmod(position, 8)
        own = int(plan.draw(step, image, image + 1).sample_ids[0])
        substitutes = [plan.replacement(position, attempt) for attempt in range(1, 20)]
        assert sorted([own, *substitutes]) == list(range(20))


def test_a_plan_with_shards_pickles():
    plan = shard_plan([100] * 20)
    expected = plan.draw(7, 0, 64).sample_ids
    assert np.array_equal(pickle.loads(pickle.dumps(plan)).draw(7, 0, 64).sample_ids, expected)


def test_global_shuffle_is_the_permutation_with_and_without_shards():
    heights = np.full(1000, 50, np.int32)
    plan = SamplingPlan(1000, heights, heights, 64, 9, SCALE, RATIO, 0.5, "global", shard_starts([500, 500]))
    for step in (0, 14, 15, 31):
        epoch, inside = divmod(step, 15)
        places = inside * 64 + np.arange(64)
        assert np.array_equal(plan.draw(step, 0, 64).sample_ids, permute(places, 1000, 9, epoch))


def test_shuffle_settings():
    heights = np.full(100, 50, np.int32)
    with pytest.raises(UserError, match="data.shuffle=random: must be global or shard"):
        SamplingPlan(100, heights, heights, 10, 0, SCALE, RATIO, 0.5, "random")
    with pytest.raises(UserError, match="data.shuffle=shard: .*folder.*data.shuffle=global"):
        SamplingPlan(100, heights, heights, 10, 0, SCALE, RATIO, 0.5, "shard")
