import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cae_fast.config import UserError
from cae_fast.data import bundled
from cae_fast.data.bundled import BUNDLED_NAMES, CLASS_NAMES, bundled_path

FILES = Path(bundled.__file__).parent / "bundled"
COUNTS = {"train": 10_000, "test": 2_000}
ARCHIVES = {"train": "train", "test": "t10k"}
# SHA-256 of the first 10,000 and 2,000 items, without header, of the original files.
ORIGINAL = {
    "train-images-idx3-ubyte.gz": "2929ae1c7b89e0ee6587bbe4911fd5f0a5dafe21ae6ed9b737173cbfe20c12c9",
    "train-labels-idx1-ubyte.gz": "1022e4632874e71bb84d924c475e6a3428a2deeb8c5a0f612a015c97e4fce7f0",
    "t10k-images-idx3-ubyte.gz": "09bbac78738f0229a68f7ca74e62665d7fb34f45ea7a3509ab5c4a202c1370de",
    "t10k-labels-idx1-ubyte.gz": "a86243d2b2400909bc0a82f5fd5c9df83bf827852a1543e3dc70af890035a9d4",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAE_FAST_CACHE", str(folder))
        yield folder


def read_idx(name):
    """The idx format as its authors describe it: two zero bytes, type 8 (uint8), the rank, the sizes, the data."""
    raw = gzip.decompress((FILES / "fashion_mnist" / name).read_bytes())
    assert raw[:3] == b"\x00\x00\x08"
    rank = raw[3]
    sizes = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(sizes)


@pytest.mark.parametrize("name", ORIGINAL)
def test_archives_hold_the_first_items_of_the_original_files(name):
    assert hashlib.sha256(read_idx(name).tobytes()).hexdigest() == ORIGINAL[name]


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_unpacks_to_the_pixels_and_labels_of_the_archives(cache, split):
    images = read_idx(f"{ARCHIVES[split]}-images-idx3-ubyte.gz")
    labels = read_idx(f"{ARCHIVES[split]}-labels-idx1-ubyte.gz")
    assert images.shape == (COUNTS[split], 28, 28)
    folder = bundled_path(f"fashion-mnist/{split}")
    assert folder.is_relative_to(cache)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    expected = [f"{label}_{CLASS_NAMES[label]}/{number:05d}.png" for number, label in enumerate(labels)]
    assert files == sorted(expected)
    for number, name in enumerate(expected):
        with Image.open(folder / name) as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), images[number])


def test_sorted_class_folders_are_in_label_order_with_the_known_counts(cache):
    for split, per_class in (
        # Counted in the original files' first labels.
        ("train", [942, 1027, 1016, 1019, 974, 989, 1021, 1022, 990, 1000]),
        ("test", [200, 203, 214, 190, 219, 195, 197, 200, 194, 188]),
    ):
        folders = sorted(bundled_path(f"fashion-mnist/{split}").iterdir())
        assert [folder.name for folder in folders] == [f"{i}_{name}" for i, name in enumerate(CLASS_NAMES)]
        assert [len(list(folder.iterdir())) for folder in folders] == per_class


def test_a_second_call_writes_nothing(cache):
    first = bundled_path("fashion-mnist/train")
    before = [(path, path.stat().st_mtime_ns) for path in (cache, first.parent, first)]
    assert bundled_path("fashion-mnist/train") == first
    assert [(path, path.stat().st_mtime_ns) for path in (cache, first.parent, first)] == before
    assert [path.name for path in cache.iterdir()] == [first.parent.name]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("CAE_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bundled._cache_folder() == tmp_path / ".cache" / "cae_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert bundled._cache_folder() == tmp_path / "xdg" / "cae_fast"
    monkeypatch.setenv("CAE_FAST_CACHE", "~/chosen")
    assert bundled._cache_folder() == tmp_path / "chosen"


def test_two_processes_may_unpack_at_once(tmp_path):
    program = "from cae_fast.data.bundled import bundled_path; print(bundled_path('fashion-mnist/test'))"
    root = Path(bundled.__file__).parents[2]
    environment = {"CAE_FAST_CACHE": str(tmp_path), "PYTHONPATH": str(root)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (folder,) = (Path(line.strip()) for line in printed)
    assert len(list(folder.rglob("*.png"))) == COUNTS["test"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.parent.name]


def test_the_loser_of_a_race_keeps_the_winner(monkeypatch, tmp_path):
    """Another process finishes between the check and the rename."""
    monkeypatch.setenv("CAE_FAST_CACHE", str(tmp_path))
    write_pngs = bundled._write_pngs

    def write_and_lose(archive, folder):
        write_pngs(archive, folder)
        winner = tmp_path / folder.parent.name / folder.name
        winner.mkdir(parents=True)
        (winner / "winner").touch()

    monkeypatch.setattr(bundled, "_write_pngs", write_and_lose)
    folder = bundled_path("fashion-mnist/test")
    assert [path.name for path in folder.iterdir()] == ["winner"]
    assert list(tmp_path.iterdir()) == [folder.parent]


def test_an_interrupted_unpacking_leaves_no_folder_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("CAE_FAST_CACHE", str(tmp_path))

    def interrupt(archive, folder):
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "_write_pngs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bundled_path("fashion-mnist/test")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_names_the_variable(monkeypatch, tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    monkeypatch.setenv("CAE_FAST_CACHE", str(blocker / "cache"))
    with pytest.raises(UserError, match="CAE_FAST_CACHE") as caught:
        bundled_path("fashion-mnist/train")
    assert str(blocker / "cache") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist/validation", "", "../photographs"])
def test_an_unknown_name_lists_the_valid_ones(name):
    with pytest.raises(UserError) as caught:
        bundled_path(name)
    assert all(valid in str(caught.value) for valid in BUNDLED_NAMES)


def test_photographs_open_and_are_large_enough():
    files = sorted(bundled_path("photographs").glob("*.jpg"))
    assert len(files) >= 10
    modes = set()
    for file in files:
        with Image.open(file) as image:
            assert image.format == "JPEG"
            image.load()
            assert min(image.size) >= 300
            assert np.asarray(image).std() > 10
            modes.add(image.mode)
    assert modes == {"L", "RGB"}


def test_every_photograph_has_a_source_and_a_licence():
    folder = bundled_path("photographs")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (folder / "SOURCES.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    assert sorted(row[0].strip("`") for row in rows) == sorted(path.name for path in folder.glob("*.jpg"))
    for name, _, size, source, licence in rows:
        with Image.open(folder / name.strip("`")) as image:
            assert size == f"{image.width}x{image.height}"
        assert source
        assert any(free in licence for free in ("CC0", "public domain", "no known copyright restrictions"))


def test_fashion_mnist_comes_with_its_licence():
    text = (FILES / "fashion_mnist" / "LICENSE").read_text(encoding="utf-8")
    for part in ("MIT", "Zalando SE", "dataset-fashion-mnist", "Permission is hereby granted, free of charge"):
        assert part in text


def test_bundled_files_are_small_and_reproducible():
    files = [path for path in FILES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    archives = [path for path in files if path.suffix == ".gz"]
    assert len(archives) == 4
    for archive in archives:
        header = archive.read_bytes()[:8]
        assert header[3] == 0  # no file name stored
        assert header[4:] == bytes(4)  # no time stored


def test_importing_the_module_does_not_load_image_or_array_libraries():
    program = "import sys, cae_fast.data.bundled; print({'PIL', 'numpy', 'torch'} & set(sys.modules))"
    root = Path(bundled.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_what_killed_unpackings_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("CAE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled, "_write_pngs", lambda archive, folder: folder.mkdir(parents=True))
    (tmp_path / ".unpacking-abc" / "fashion-mnist-x" / "train").mkdir(parents=True)
    folder = bundled_path("fashion-mnist/test")
    assert list(tmp_path.iterdir()) == [folder.parent]
