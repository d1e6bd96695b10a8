import contextlib
import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cae_fast.config import DataConfig, UserError
from cae_fast.data import folder as scan_module
from cae_fast.data import index as index_module
from cae_fast.data import index_files
from cae_fast.data.decode import decode_rgb
from cae_fast.data.index import ImageIndex, build_index, index_for, open_index, resolve_data_path
from cae_fast.data.patience import open_file
from data_files import bad_files, good_files

MAX_PIXELS = 1_000_000


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_bad(index):
    rows = [line.split("\t") for line in index.bad_files.read_text(errors="surrogateescape").split("\n")[:-1]]
    return {name.replace("\\t", "\t").replace("\\n", "\n").replace("\\\\", "\\"): reason for name, reason in rows}


@pytest.fixture
def two_images(tmp_path, encode, photograph):
    write(tmp_path / "images", {f"{i}.png": encode(photograph(10, 12, i), "PNG") for i in range(2)})
    return tmp_path / "images"


def test_good_files(tmp_path):
    files = good_files(40, 60)
    write(tmp_path / "images", files | {"notes.txt": b"no image", "table.csv": b"", "jpg": b"no extension"})
    index = build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS)
    assert read_bad(index) == {}
    assert index.num_bad == 0
    assert [index.path(i).name for i in range(len(index))] == sorted(files, key=os.fsencode)
    assert set(index.heights.tolist()) == {40}
    assert set(index.widths.tolist()) == {60}
    assert set(index.labels.tolist()) == {-1}
    assert index.classes == []
    for i in range(len(index)):
        content = files[index.path(i).name]
        assert index.read(i) == content
        assert index.sizes[i] == len(content)
        assert decode_rgb(content).shape == (index.heights[i], index.widths[i], 3)


def test_bad_files(tmp_path, photograph, encode):
    bad = bad_files()
    write(tmp_path / "images", {name: content for name, (content, _) in bad.items()})
    write(tmp_path / "images", {"good.png": encode(photograph(1000, 1000), "PNG")})
    (tmp_path / "images" / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "images" / "pipe.jpg")
    expected = {name: reason for name, (_, reason) in bad.items()} | {
        "dangling.jpg": "No such",
        "pipe.jpg": "not a file",
    }
    index = build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS)
    reasons = read_bad(index)
    assert sorted(reasons) == sorted(expected)
    for name, reason in reasons.items():
        assert expected[name] in reason, name
    assert index.num_bad == len(expected)
    assert [index.path(i).name for i in range(len(index))] == ["good.png"]


def test_files_of_any_shape(tmp_path, photograph, encode):
    sizes = {"a.png": (1, 1), "b.jpg": (2000, 3), "c.bmp": (3, 2000), "d.webp": (1, 7)}
    formats = {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
    for name, (height, width) in sizes.items():
        write(tmp_path / "images", {name: encode(photograph(height, width), formats[name[1:]])})
    index = build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS)
    assert list(zip(index.heights.tolist(), index.widths.tolist(), strict=True)) == list(sizes.values())


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user other than root: root may read every file")
def test_files_without_permission(two_images, tmp_path):
    (two_images / "0.png").chmod(0)
    (two_images / "closed").mkdir(mode=0)
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    assert len(index) == 1
    assert read_bad(index) == {
        "0.png": "cannot be read: Permission denied",
        "closed": "folder cannot be read: Permission denied",
    }


def test_read_errors_are_listed(two_images, tmp_path, monkeypatch):
    def failing_open(path):
        if path.endswith(b"0.png"):
            raise PermissionError(13, "Permission denied")
        return open_file(path)

    monkeypatch.setattr(scan_module, "open_file", failing_open)
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    assert read_bad(index) == {"0.png": "cannot be read: Permission denied"}


def test_classes_are_the_first_folders(tmp_path, photograph, encode):
    content = encode(photograph(8, 8), "PNG")
    names = ["b/1.png", "b/deep/er/2.png", "a/9.png", "10/x.png", "9/x.png", "top.png"]
    write(tmp_path / "images", dict.fromkeys(names, content) | {"only bad/0.png": b"", "no images/readme": b""})
    index = build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS)
    assert index.classes == ["10", "9", "a", "b", "only bad"]
    labelled = {str(index.path(i).relative_to(index.source.root)): int(index.labels[i]) for i in range(len(index))}
    expected = {"10/x.png": 0, "9/x.png": 1, "a/9.png": 2, "b/1.png": 3, "b/deep/er/2.png": 3, "top.png": -1}
    assert labelled == expected
    assert list(labelled) == list(expected)


def test_linked_folders_and_loops(tmp_path, photograph, encode):
    content = encode(photograph(8, 8), "PNG")
    write(tmp_path / "images", {"a/1.png": content})
    write(tmp_path / "elsewhere", {"2.png": content, "deep/3.png": content})
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "a" / "loop").symlink_to(tmp_path / "images")
    (tmp_path / "elsewhere" / "deep" / "loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "z.png").symlink_to(tmp_path / "images" / "a" / "1.png")
    index = build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS)
    names = [str(index.path(i).relative_to(index.source.root)) for i in range(len(index))]
    assert names == ["a/1.png", "linked/2.png", "linked/deep/3.png", "z.png"]


def test_the_same_files_give_the_same_index(tmp_path, photograph, encode, monkeypatch):
    names = [f"{folder}/{i}.png" for folder in "abc" for i in range(5)]
    content = {name: encode(photograph(8, 9, i), "PNG") for i, name in enumerate(names)}
    write(tmp_path / "one", content)
    write(tmp_path / "two", dict(reversed(content.items())))
    monkeypatch.setattr(scan_module, "BLOCK", 4)
    one = build_index(tmp_path / "one", tmp_path / "one.index", MAX_PIXELS, num_threads=4)
    two = build_index(tmp_path / "two", tmp_path / "two.index", MAX_PIXELS, num_threads=1)
    assert one.fingerprint == two.fingerprint
    assert [one.path(i).name for i in range(15)] == [two.path(i).name for i in range(15)]
    (tmp_path / "two" / "b" / "3.png").write_bytes(encode(photograph(8, 10), "PNG"))
    assert build_index(tmp_path / "two", tmp_path / "two.index", MAX_PIXELS).fingerprint != one.fingerprint


def test_arrays_are_memory_maps(two_images, tmp_path):
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    for array, dtype in ((index.heights, np.int32), (index.widths, np.int32), (index.sizes, np.int64)):
        assert isinstance(array, np.memmap)
        assert array.dtype == dtype
        assert not array.flags.writeable


def test_pickles_as_its_folder(two_images, tmp_path):
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    content = pickle.dumps(index)
    assert len(content) < 500
    copy = pickle.loads(content)
    assert copy.fingerprint == index.fingerprint
    assert copy.read(1) == index.read(1)
    assert isinstance(copy.heights, np.memmap)


def test_nothing_is_written_into_the_data_folder(two_images, tmp_path):
    before = sorted(two_images.rglob("*")), two_images.stat().st_mtime_ns
    build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    index_for(DataConfig(path=str(two_images)), tmp_path / "runs" / "first")
    assert (sorted(two_images.rglob("*")), two_images.stat().st_mtime_ns) == before
    for out in (two_images / "x.index", two_images, two_images / "deep" / "x.index"):
        with pytest.raises(UserError, match="inside the data folder"):
            build_index(two_images, out, MAX_PIXELS)
    (tmp_path / "link").symlink_to(two_images)
    with pytest.raises(UserError, match="inside the data folder"):
        build_index(two_images, tmp_path / "link" / "x.index", MAX_PIXELS)
    assert (sorted(two_images.rglob("*")), two_images.stat().st_mtime_ns) == before


def test_an_older_index_is_replaced_and_nothing_else(two_images, tmp_path, photograph, encode):
    out = tmp_path / "x.index"
    build_index(two_images, out, MAX_PIXELS)
    (two_images / "new.png").write_bytes(encode(photograph(5, 5), "PNG"))
    assert len(build_index(two_images, out, MAX_PIXELS, replace=False)) == 2
    assert len(build_index(two_images, out, MAX_PIXELS)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "x.index"]
    other = tmp_path / "other"
    write(other, {"precious.txt": b"mine"})
    with pytest.raises(UserError, match="exists and is not an index"):
        build_index(two_images, other, MAX_PIXELS)
    assert (other / "precious.txt").read_bytes() == b"mine"


def test_an_interrupted_scan_leaves_nothing(two_images, tmp_path, monkeypatch):
    def interrupt(path, max_pixels):
        raise KeyboardInterrupt

    monkeypatch.setattr(scan_module, "inspect_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_no_images(tmp_path):
    write(tmp_path / "images", {"readme.txt": b"hello"})
    with pytest.raises(UserError, match=r"holds no image files \(.jpg, .jpeg, .jpe, .*\.tif"):
        build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_only_bad_images(tmp_path):
    write(tmp_path / "images", {"1.jpg": b"", "2.jpg": b"<html>"})
    with pytest.raises(UserError, match=r"all 2 image files are bad, see .*x\.bad_files.tsv") as error:
        build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS)
    assert "\n" not in str(error.value)
    assert (tmp_path / "x.bad_files.tsv").read_text().splitlines() == [
        "1.jpg\tis empty, not JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or JPEG 2000",
        "2.jpg\tis HTML or XML, not JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or JPEG 2000",
    ]
    assert not (tmp_path / "x.index").exists()


def test_missing_folders(tmp_path):
    with pytest.raises(UserError, match=r"data\.path=.*nowhere"):
        index_for(DataConfig(path=str(tmp_path / "nowhere")), tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.path is empty"):
        index_for(DataConfig(), tmp_path / "run")
    with pytest.raises(UserError, match="not an index folder"):
        index_for(DataConfig(index=str(tmp_path)), tmp_path / "run")
    with pytest.raises(UserError, match="is not a folder"):
        build_index(tmp_path / "nowhere", tmp_path / "x.index", MAX_PIXELS)


def test_index_for_a_run_is_made_once(two_images, tmp_path):
    (two_images / "bad.jpg").write_bytes(b"")
    data = DataConfig(path=str(two_images))
    first = index_for(data, tmp_path / "runs" / "one")
    assert "2 images" in str(first)
    assert f"1 bad files (listed in {first.bad_files})" in str(first)
    assert first.folder.parent == tmp_path / "runs" / "indexes"
    assert first.folder.name.startswith("images-")
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    second = index_for(data, tmp_path / "runs" / "two")
    assert second.folder == first.folder
    assert (first.folder / "meta.json").stat().st_mtime_ns == stamp
    smaller = index_for(DataConfig(path=str(two_images), max_pixels=121), tmp_path / "runs" / "two")
    assert smaller.folder != first.folder
    given = index_for(DataConfig(path="ignored", index=str(first.folder)), tmp_path / "elsewhere" / "run")
    assert given.folder == first.folder
    assert not (tmp_path / "elsewhere").exists()


def test_index_for_a_folder_that_grew(tmp_path, encode, photograph):
    content = encode(photograph(5, 5), "PNG")
    write(tmp_path / "images", {"a/0.png": content, "b/0.png": content})
    data, run = DataConfig(path=str(tmp_path / "images")), tmp_path / "runs" / "one"
    first = index_for(data, run)
    for count, name in enumerate(("a/1.png", "c/0.png", "top.png"), start=3):
        write(tmp_path / "images", {name: content})
        assert len(index_for(data, run)) == count
    (tmp_path / "images" / "b" / "0.png").unlink()
    assert len(index_for(data, run)) == 4
    assert len(ImageIndex(first.folder)) == len(first) == 2  # it may be another run's


def test_index_for_a_relative_folder(two_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = index_for(DataConfig(path="images"), tmp_path / "runs" / "one")
    monkeypatch.chdir("/")
    assert len(index.read(0)) > 0
    assert index_for(DataConfig(path=str(two_images)), tmp_path / "runs" / "one").folder == index.folder


def test_several_processes_make_the_same_index_at_once(two_images, tmp_path):
    program = (
        "import sys; from pathlib import Path; from cae_fast.config import DataConfig;"
        "from cae_fast.data.index import index_for;"
        "print(len(index_for(DataConfig(path=sys.argv[1]), Path(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", program, str(two_images), str(tmp_path / "runs" / "one")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == [b"2\n"] * 3
    assert len(list((tmp_path / "runs" / "indexes").iterdir())) == 1


def test_bundled_images():
    assert resolve_data_path("bundled:photographs").root.is_dir()
    with pytest.raises(UserError, match="nonsense"):
        resolve_data_path("bundled:nonsense")


def test_moved_or_damaged_index(two_images, tmp_path):
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    np.save(index.folder / "heights.npy", np.zeros(1, np.int32))
    with pytest.raises(UserError, match="damaged"):
        open_index(index.folder)
    (index.folder / "heights.npy").write_bytes(b"junk")
    with pytest.raises(UserError, match="damaged"):
        open_index(index.folder)
    np.save(index.folder / "heights.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(UserError, match="damaged"):
        open_index(index.folder)
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    two_images.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="does not exist"):
        open_index(index.folder)
    meta = json.loads((index.folder / "meta.json").read_text())
    (index.folder / "meta.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        open_index(index.folder)
    del meta["version"]
    (index.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="version None"):
        open_index(index.folder)


def test_every_changed_byte_of_an_index_is_found(two_images, tmp_path):
    (two_images / "bad.jpg").write_bytes(b"")
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    files = sorted(path for path in index.folder.iterdir())
    assert len(files) == 8
    for file in files:
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 40)):
            changed = bytearray(content)
            changed[place] ^= 1
            file.write_bytes(changed)
            with contextlib.suppress(UserError):  # a changed byte may leave numpy's header as it is
                assert np.array_equal(open_index(index.folder).heights, index.heights)
        for damage in (b"", content[:-2], content[: len(content) // 2]):
            file.write_bytes(damage)
            with pytest.raises(UserError):
                open_index(index.folder)
        file.write_bytes(content)
        assert open_index(index.folder).fingerprint == index.fingerprint


@pytest.mark.parametrize("damage", ["empty files", "no meta", "one bit", "no folder content"])
def test_a_damaged_index_of_a_run_is_made_again(two_images, tmp_path, caplog, damage):
    data, run = DataConfig(path=str(two_images)), tmp_path / "runs" / "one"
    first = index_for(data, run)
    fingerprint, heights = first.fingerprint, first.heights.tolist()
    for file in list(first.folder.iterdir()):
        if damage == "empty files":
            file.write_bytes(b"")
        elif damage == "no folder content" or (damage == "no meta" and file.name == "meta.json"):
            file.unlink()
        elif damage == "one bit" and file.name == "labels.npy":
            file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    again = index_for(data, run)
    assert "made again" in caplog.text
    assert (again.folder, again.fingerprint, again.heights.tolist()) == (first.folder, fingerprint, heights)
    caplog.clear()
    assert index_for(data, run).fingerprint == fingerprint
    assert caplog.text == ""
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name]


def test_files_that_changed_are_found(tmp_path, encode, photograph):
    first, second = (encode(photograph(8, 8, seed), "BMP") for seed in (0, 1))
    write(tmp_path / "images", {"a/b/c/0.bmp": first, "a/1.bmp": first})
    data, run = DataConfig(path=str(tmp_path / "images")), tmp_path / "runs" / "one"
    named, made = build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS), index_for(data, run)

    def assert_found(count):
        with pytest.raises(UserError, match=r"x\.index: files in .*images changed since it was scanned") as error:
            index_for(DataConfig(index=str(named.folder)), run)
        assert "\n" not in str(error.value)
        again = index_for(data, run)
        assert (len(again), again.folder != made.folder) == (count, True)
        assert index_for(data, run).folder == again.folder

    write(tmp_path / "images", {"notes.txt": b"no image", "a/b/.hidden.bmp": first})
    assert open_index(named.folder).fingerprint == named.fingerprint  # the images did not change
    assert index_for(data, run).folder == made.folder
    write(tmp_path / "images", {"a/b/c/0.bmp": second})  # in place, of the same size
    assert_found(2)
    write(tmp_path / "images", {"a/b/c/2.bmp": second})  # two levels down
    assert_found(3)


def test_an_index_without_states_can_be_opened(two_images, tmp_path, caplog):
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    meta = json.loads((index.folder / "meta.json").read_text())
    for name in ("states", "left_out", "checksum", "bad_files_sha256"):  # as version 1 was at first
        del meta[name]
    (index.folder / "meta.json").write_text(json.dumps(meta))
    assert open_index(index.folder).fingerprint == index.fingerprint
    assert "older than the check whether its images changed" in caplog.text


def test_leftovers_of_killed_scans_are_removed(two_images, tmp_path):
    data, run = DataConfig(path=str(two_images)), tmp_path / "runs" / "one"
    folder = index_for(data, run).folder
    shutil.rmtree(folder)
    for end in (f"{os.getpid()}.tmp", "abc.tmp", "7.old"):  # in containers the process id is the same each time
        write(folder.parent / f".{folder.name}.{end}", {"paths.npy": b""})
    (folder.parent / f".{folder.name}.lock").touch()
    for name in (".dead.index.1.tmp", ".alive.index.1.tmp"):  # of scans of other images, or of these before
        write(folder.parent / name, {"paths.npy": b""})
    with open(folder.parent / ".alive.index.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert len(index_for(data, run)) == 2
    left = sorted(path.name for path in folder.parent.iterdir())
    assert left == [".alive.index.1.tmp", ".alive.index.lock", folder.name]
    assert folder.stat().st_mode & 0o777 == (folder.parent).stat().st_mode & 0o777


def test_a_scan_waits_for_another_one(two_images, tmp_path):
    out = tmp_path / "x.index"
    with open(tmp_path / ".x.index.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write(tmp_path / ".x.index.abc.tmp", {"paths.npy": b""})
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(build_index, two_images, out, MAX_PIXELS)
            with pytest.raises(TimeoutError):
                future.result(timeout=0.5)
            assert (tmp_path / ".x.index.abc.tmp").exists()
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert len(future.result(timeout=20)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "x.index"]


def test_files_and_folders_are_flushed_before_and_after_the_rename(two_images, tmp_path, monkeypatch):
    events = []
    rename = os.rename
    monkeypatch.setattr(index_files, "sync", lambda path: events.append(path.name))
    monkeypatch.setattr(index_module, "sync", lambda path: events.append(path.name))
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append("renamed"), rename(old, new)))
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    names = {path.name for path in index.folder.iterdir()}
    renamed = events.index("renamed")
    assert set(events[: renamed - 1]) == names
    assert events[renamed - 1].startswith(".x.index.")
    assert events[renamed + 1 :] == [tmp_path.name]


def test_a_place_that_cannot_be_written(two_images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"x\.index: cannot be written: "):
        build_index(two_images, tmp_path / "file" / "x.index", MAX_PIXELS)


def test_hidden_files_and_other_kinds_are_left_out_with_a_line(tmp_path, photograph, encode, caplog):
    content = encode(photograph(8, 8), "PNG")
    names = ["cat/0.png", "dog/0.png", "cat/._0.png", ".ipynb_checkpoints/0.png", "dog/.ipynb_checkpoints/1.png"]
    names += ["__MACOSX/cat/._0.png", "cat/.DS_Store", "cat/a.heic", "cat/b.HEIC", "cat/13", "cat/x.jpg_large"]
    write(tmp_path / ".images", dict.fromkeys(names, content))
    index = build_index(tmp_path / ".images", tmp_path / "x.index", MAX_PIXELS)
    assert index.classes == ["cat", "dog"]
    assert [str(index.path(i).relative_to(index.source.root)) for i in range(len(index))] == names[:2]
    other = "4 files of other kinds ignored (.heic 2, no extension 1, .jpg_large 1)"
    hidden = "5 hidden files or folders left out (.ipynb_checkpoints 2, __MACOSX 1, .DS_Store 1, ._* 1)"
    for line in (other, hidden):
        assert line in caplog.text
        assert line in str(index)


def test_an_entry_that_cannot_be_looked_at_costs_itself(tmp_path, photograph, encode):
    content = encode(photograph(8, 8), "PNG")
    write(tmp_path / "images", {f"{name}/{i}.png": content for name in ("cat", "dog") for i in range(2)})
    for folder in ("", "cat"):
        (tmp_path / "images" / folder / "loop").symlink_to("loop")
    index = build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS)
    assert (len(index), index.classes) == (4, ["cat", "dog"])
    reason = "cannot be read: Too many levels of symbolic links"
    assert read_bad(index) == {"cat/loop": reason, "loop": reason}


def test_folders_nested_deeper_than_pythons_stack(tmp_path, photograph, encode):
    (tmp_path / "images" / "top").mkdir(parents=True)
    (tmp_path / "images" / "top" / "0.png").write_bytes(encode(photograph(8, 8), "PNG"))
    place = os.open(tmp_path / "images", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=place)
        place, above = os.open("d", os.O_RDONLY, dir_fd=place), place
        os.close(above)
    os.close(place)
    index = build_index(tmp_path / "images", tmp_path / "x.index", MAX_PIXELS)
    assert (len(index), index.num_bad) == (1, 0)
    subprocess.run(["rm", "-r", tmp_path / "images"], check=True)  # Python's own way recurses


def test_a_pipe_is_no_image(two_images, tmp_path):
    index = build_index(two_images, tmp_path / "x.index", MAX_PIXELS)
    (two_images / "0.png").unlink()
    os.mkfifo(two_images / "0.png")
    with pytest.raises(OSError, match="not a file"):
        index.read(0)
    with pytest.raises(UserError, match="changed since it was scanned"):
        open_index(index.folder)
