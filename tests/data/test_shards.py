"""Images in tar files: the same pixels and labels as from a folder, and nothing lost silently."""

import functools
import gzip
import io
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from cae_fast.config import DataConfig, UserError
from cae_fast.data import shards as shards_module
from cae_fast.data.decode import decode_rgb
from cae_fast.data.index import ImageIndex, build_index, find_source, index_for, open_index, resolve_data_path
from cae_fast.data.loader import labelled_loader
from cae_fast.data.shards import Shards, expand_braces, find_shards
from running import Program, metrics

MAX_PIXELS = 1_000_000


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def index_of(tmp_path, *sources):
    return build_index(find_source([str(source) for source in sources]), tmp_path / "x.index", MAX_PIXELS)


def bad(index):
    return dict(line.split("\t") for line in index.bad_files.read_text().splitlines())


def names(index):
    return [str(index.path(i)).partition(".tar:")[2] for i in range(len(index))]


@pytest.fixture
def images(encode, photograph):
    """Eight images of different sizes and formats."""
    formats = ["JPEG", "PNG", "WEBP", "BMP"] * 2
    return [encode(photograph(10 + i, 20 - i, i), format) for i, format in enumerate(formats)]


def test_a_tar_for_each_class_equals_its_folders(tmp_path, images, encode, photograph):
    classes = {"n01440764": images[:3], "n01443537": images[3:5], "n21841": [gzip.compress(images[0]), *images[5:]]}
    for name, contents in classes.items():
        members = {f"{name}_{i}.JPEG": content for i, content in enumerate(contents)}
        write_tar(tmp_path / "tars" / f"{name}.tar", members)
        for member, content in members.items():
            (tmp_path / "folder" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "folder" / name / member).write_bytes(content)
    folder = build_index(tmp_path / "folder", tmp_path / "folder.index", MAX_PIXELS)
    index = index_of(tmp_path, tmp_path / "tars")
    assert index.classes == folder.classes == list(classes)
    assert names(index) == [folder.path(i).name for i in range(9)]
    for name in ("labels", "heights", "widths", "sizes"):
        assert np.array_equal(getattr(index, name), getattr(folder, name)), name
    assert index.shard_starts.tolist() == [0, 3, 5, 9]
    for i in reversed(range(9)):
        assert index.read(i) == folder.read(i)
        assert decode_rgb(index.read(i)).shape == (index.heights[i], index.widths[i], 3)
    assert str(index.path(3)) == f"{tmp_path}/tars/n01443537.tar:n01443537_0.JPEG"
    assert index.num_bad == 0
    assert "9 images, 3 classes" in str(index)


def test_webdataset_labels(tmp_path, images):
    write_tar(
        tmp_path / "000000.tar",
        {
            "a/000.cls": b"2",
            "a/000.jpg": images[0],
            "a/001.jpg": images[1],
            "a/001.cls": b" 07\n",
            "a/002.json": b'{"label": 3, "caption": "a dog"}',
            "a/002.png": images[2],
            "a/003.txt": b"no label",
            "a/003.jpg": images[3],
            "b/000.jpg": images[4],
        },
    )
    write_tar(
        tmp_path / "000001.tar",
        {
            "x.json": b'{"cls": 1}',
            "x.cls": b"5",
            "x.jpg": images[5],
            "y.jpg": images[6],
            "y.cls": b"cat",
            "z.jpg": images[7],
            "z.json": b'{"caption": "no label"}',
            "broken.json": b"{",
            "minus.cls": b"-1",
            "large.cls": b"1000000",
        },
    )
    index = index_of(tmp_path, tmp_path / "{000000..000001}.tar")
    assert names(index) == ["a/000.jpg", "a/001.jpg", "a/002.png", "a/003.jpg", "b/000.jpg", "x.jpg", "y.jpg", "z.jpg"]
    assert index.labels.tolist() == [2, 7, 3, -1, -1, 5, -1, -1]
    assert index.classes == [str(i) for i in range(8)]
    prefix = f"{tmp_path}/000001.tar:"
    reasons = {name.removeprefix(prefix): reason for name, reason in bad(index).items()}
    assert sorted(reasons) == ["broken.json", "large.cls", "minus.cls", "y.cls"]
    assert "not a whole number" in reasons["y.cls"]
    assert "JSON" in reasons["broken.json"]
    assert "999999" in reasons["minus.cls"]
    assert "999999" in reasons["large.cls"]


def test_class_names_in_json(tmp_path, images):
    labels = ["dog", "cat", "dog"]
    members = {}
    for i, label in enumerate(labels):
        members |= {f"{i}.jpg": images[i], f"{i}.json": json.dumps({"label": label}).encode()}
    index = index_of(tmp_path, write_tar(tmp_path / "0.tar", members))
    assert [index.classes[label] for label in index.labels] == labels


def test_which_tar_names_are_classes(tmp_path, images):
    write_tar(tmp_path / "t" / "00001.tar", {"000010000.jpg": images[0]})  # a numbered shard
    write_tar(tmp_path / "t" / "cat.tar", {"1.jpg": images[1]})
    write_tar(tmp_path / "t" / "dog_2.tar", {"./dog_2/1.jpg": images[2]})
    index = index_of(tmp_path, tmp_path / "t")
    assert index.classes == ["cat", "dog_2"]
    assert index.labels.tolist() == [-1, 0, 1]
    write_tar(tmp_path / "t" / "cat.tar", {"1.jpg": images[1], "2.jpg": images[2], "2.cls": b"0"})
    assert index_of(tmp_path, tmp_path / "t").labels.tolist() == [-1, -1, 0, -1]  # label files alone count


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_strange_names(tmp_path, images, format):
    long = "folder/" * 12 + "y" * 90 if format == tarfile.USTAR_FORMAT else "folder/" * 30 + "y" * 200
    members = {
        f"{long}.jpg": images[0],
        "grün 雪 🦆.png": images[1],
        "tab\tnewline\n.jpg": images[2],
        "B.JPG": images[3],
    }
    index = index_of(tmp_path, write_tar(tmp_path / "x.tar", members, format))
    assert names(index) == list(members)
    assert [index.read(i) for i in range(4)] == list(members.values())


def test_members_that_are_no_images(tmp_path, images):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in {"d.jpg": tarfile.DIRTYPE, "link.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "good.jpg"
            tar.addfile(member)
        for name, content in {
            "readme": b"x",
            "good.jpg": images[0],
            "empty.jpg": b"",
            "cut.jpg": images[4][:-9],
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    index = index_of(tmp_path, tmp_path / "x.tar")
    assert names(index) == ["good.jpg"]
    reasons = {name.rpartition(":")[2]: reason for name, reason in bad(index).items()}
    assert sorted(reasons) == ["cut.jpg", "empty.jpg", "hard.jpg", "link.jpg"]
    assert "truncated" in reasons["cut.jpg"]
    assert "empty" in reasons["empty.jpg"]
    assert reasons["hard.jpg"] == reasons["link.jpg"] == "not a file"


def damaged_tars(folder, images):
    """{name: (members before the damage, a part of the reason)}."""
    whole = write_tar(folder / "whole.tar", {f"{i}.jpg": image for i, image in enumerate(images)}).read_bytes()
    with tarfile.open(folder / "whole.tar") as tar:
        members = tar.getmembers()
    third, last = members[3], members[-1]
    junk = whole[: third.offset] + b"\xff" * 512 + whole[third.offset + 512 :]
    contents = {
        "in_data": (whole[: third.offset_data + 50], 3, "unexpected end of data"),
        "in_header": (whole[: third.offset + 100], 3, "no end mark"),
        "between": (whole[: third.offset], 3, "no end mark"),
        "no_end": (whole[: last.offset_data + (last.size + 511) // 512 * 512], 8, "no end mark"),
        "junk": (junk, 3, f"damaged header at byte {third.offset}"),
        "html": (b"<html>404</html>" * 100, 0, "tar file cannot be read"),
        "zip": (gzip.compress(whole), 0, "tar file cannot be read"),
        "empty": (b"", 0, "empty"),
    }
    for name, (content, _, _) in contents.items():
        (folder / f"{name}.tar").write_bytes(content)
    return {name: (count, reason) for name, (_, count, reason) in contents.items()}


def test_damaged_tars_keep_what_came_before(tmp_path, images):
    expected = damaged_tars(tmp_path / "tars", images)
    write_tar(tmp_path / "tars" / "nothing.tar", {})  # a whole tar file without members is not damaged
    index = index_of(tmp_path, tmp_path / "tars")
    counts = dict(zip([os.path.basename(n)[:-4] for n in index.source.names], np.diff(index.shard_starts), strict=True))
    assert counts == {name: count for name, (count, _) in expected.items()} | {"whole": 8, "nothing": 0}
    reasons = {name.removeprefix(f"{tmp_path}/tars/"): reason for name, reason in bad(index).items()}
    assert reasons.pop("in_data.tar:3.jpg") == "the tar file ends before it does"
    assert sorted(reasons) == sorted(f"{name}.tar" for name in expected)
    for name, (_, reason) in expected.items():
        assert reason in reasons[f"{name}.tar"], name
    originals = dict(enumerate(images))
    for i in range(len(index)):
        assert index.read(i) == originals[int(names(index)[i][0])]


def test_no_usable_image(tmp_path):
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(UserError, match="a.tar holds no image files"):
        index_of(tmp_path, tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="all 1 image files are bad"):
        index_of(tmp_path, tmp_path / "a.tar")


def test_a_tar_that_changed_is_an_error_of_its_images(tmp_path, images):
    index = index_of(tmp_path, write_tar(tmp_path / "x.tar", {"0.jpg": images[0], "1.jpg": images[1]}))
    os.truncate(tmp_path / "x.tar", 1000)
    with pytest.raises(UserError, match=r"x\.tar: the tar file changed"):
        index.read(1)
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=r"x\.tar: the tar file changed") as error:
            list(labelled_loader(index, 8, 2, num_workers))
        assert "\n" not in str(error.value)


def test_braces_globs_lists_and_folders(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train-09", "train-10", "train-11", "val-09"):
        write_tar(tmp_path / "s" / f"{name}.tar", {"0.jpg": images[0]})

    def found(*sources):
        return [os.path.relpath(name, tmp_path / "s")[:-4] for name in find_shards(sources).names]

    every = ["train-09", "train-10", "train-11", "val-09"]
    assert found("s") == found("s/*.tar") == every
    assert found("s/train-{09..11}.tar") == every[:3]
    assert found("s/{val,train}-09.tar") == ["val-09", "train-09"]
    assert found("s/val-09.tar", "s/train-1?.tar", "s/val-09.tar") == ["val-09", "train-10", "train-11"]
    assert expand_braces("{0..2}/{a,b}{x}") == ["0/a{x}", "0/b{x}", "1/a{x}", "1/b{x}", "2/a{x}", "2/b{x}"]
    assert expand_braces("s3://b/{098..101}.tar")[::3] == ["s3://b/098.tar", "s3://b/101.tar"]
    assert len(expand_braces("shards/{000000..013999}.tar")) == 14_000
    with pytest.raises(UserError, match="train-12.tar: there is no such tar file"):
        find_shards(["s/train-{09..12}.tar"])
    with pytest.raises(UserError, match="x-.*.tar: there is no such tar file"):
        find_shards(["s/x-*.tar"])
    (tmp_path / "s" / "image.jpg").write_bytes(images[0])
    assert find_shards(["s"]) is None  # a folder of images with tar files beside them
    with pytest.raises(UserError, match="s is neither a tar file nor a folder of tar files"):
        find_shards(["s", "s/val-09.tar"])
    with pytest.raises(UserError, match="data.path=s/nowhere: is not a folder and no tar file"):
        resolve_data_path("s/nowhere")
    (tmp_path / "{1,2}").mkdir()
    assert resolve_data_path("{1,2}").root == tmp_path / "{1,2}"


def test_index_for_tars_is_made_once_and_again_when_one_changes(tmp_path, images):
    write_tar(tmp_path / "s" / "0.tar", {"0.jpg": images[0]})
    data = DataConfig(path=str(tmp_path / "s" / "*.tar"))
    first = index_for(data, tmp_path / "runs" / "one")
    assert first.folder.parent == tmp_path / "runs" / "indexes"
    assert first.folder.name.startswith("s-")
    assert index_for(data, tmp_path / "runs" / "two").folder == first.folder
    write_tar(tmp_path / "s" / "1.tar", {"0.jpg": images[1]})
    second = index_for(data, tmp_path / "runs" / "two")
    assert (len(first), len(second)) == (1, 2)
    write_tar(tmp_path / "s" / "1.tar", {"0.jpg": images[1], "1.jpg": images[2]})
    assert len(index_for(data, tmp_path / "runs" / "two")) == 3
    assert first.read(0) == second.read(0) == images[0]  # a run with the old index goes on
    (tmp_path / "s" / "0.tar").unlink()
    with pytest.raises(UserError, match="the first of its tar files, .*0.tar, does not exist"):
        open_index(first.folder)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc, which lists a process's open files")
def test_few_files_are_open(tmp_path, images, monkeypatch):
    for i in range(6):
        write_tar(tmp_path / "s" / f"{i}.tar", {"0.jpg": images[i]})
    index = index_of(tmp_path, tmp_path / "s")
    monkeypatch.setattr(shards_module, "_opened", functools.lru_cache(2)(shards_module._opened.__wrapped__))

    def open_tars():
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(str(tmp_path / "s")) for link in links if os.path.islink(link))

    for i in [*range(6), *range(6)]:
        assert index.read(i) == images[i]
        assert open_tars() <= 2
    with ThreadPoolExecutor(8) as pool:  # files are closed while other threads read them
        order = np.random.default_rng(0).integers(6, size=3000).tolist()
        assert list(pool.map(index.read, order)) == [images[i] for i in order]
    assert open_tars() <= 2


def read_all(index, queue):
    queue.put([index.read(i) for i in range(len(index))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(tmp_path, images, method):
    for i in range(4):
        write_tar(tmp_path / "s" / f"{i}.tar", {"0.jpg": images[i], "1.jpg": images[i + 4]})
    index = index_of(tmp_path, tmp_path / "s")
    assert index.read(0) == images[0]  # with open files
    assert len(pickle.dumps(index)) < 500
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    processes = [context.Process(target=read_all, args=(index, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    expected = [images[i + k] for i in range(4) for k in (0, 4)]
    assert [queue.get(timeout=60) for _ in processes] == [expected] * 2
    for process in processes:
        process.join()


def test_loader_workers(tmp_path, encode, photograph):
    contents = [encode(photograph(30 + i, 40, i), "PNG") for i in range(12)]
    (tmp_path / "folder").mkdir()
    for i, content in enumerate(contents):
        (tmp_path / "folder" / f"{i:02d}.png").write_bytes(content)
    for k in range(3):
        write_tar(tmp_path / "s" / f"{k}.tar", {f"{i:02d}.png": contents[i] for i in range(4 * k, 4 * k + 4)})
    folder = build_index(tmp_path / "folder", tmp_path / "folder.index", MAX_PIXELS)
    tars = index_of(tmp_path, tmp_path / "s")
    pixels = [torch.cat([x for x, _ in labelled_loader(index, 16, 5, 2)]) for index in (folder, tars)]
    assert len(pixels[0]) == 12
    assert torch.equal(*pixels)


def test_urls(tmp_path, images):
    memory = fsspec.filesystem("memory")
    for i in range(3):
        path = write_tar(tmp_path / "s" / f"{i}.tar", {"0.jpg": images[i], "1.jpg": images[i + 4], "0.cls": b"4"})
        memory.pipe_file(f"/bucket/{i}.tar", path.read_bytes())
    memory.pipe_file("/bucket/2.tar", memory.cat_file("/bucket/2.tar")[:700])
    local = index_of(tmp_path, tmp_path / "s" / "{0..1}.tar")
    for url in ("memory://bucket/{0..2}.tar", "memory://bucket/*.tar", "memory://bucket"):
        index = build_index(resolve_data_path(url), tmp_path / "url.index", MAX_PIXELS)
        assert [index.read(i) for i in range(4)] == [local.read(i) for i in range(4)]
        assert np.array_equal(index.labels, local.labels)
        assert len(index) == 4
        assert str(index.path(2)).endswith("bucket/1.tar:0.jpg")
        assert str(index.path(2)).startswith("memory://")
        assert "memory://" in str(index)
        assert sum("cannot be read to its end" in reason for reason in bad(index).values()) == 1
    first = index_for(DataConfig(path="memory://bucket/{0..2}.tar"), tmp_path / "runs" / "one")
    assert first.folder.name.startswith("bucket-")
    opened = index_of(tmp_path, f"file://{tmp_path}/s/0.tar")
    assert opened.read(1) == images[4]
    memory.rm("/bucket", recursive=True)
    with pytest.raises(OSError, match="FileNotFoundError"):
        index.read(0)
    with pytest.raises(UserError, match="there is no such tar file"):
        find_shards(["memory://bucket/*.tar"])
    with pytest.raises(UserError, match="all 1 image files are bad"):
        index_of(tmp_path, "memory://bucket/0.tar")


def test_urls_without_their_package(monkeypatch):
    with pytest.raises(UserError, match="nonsense://b/0.tar: tar files are read from URLs of file, http, "):
        find_shards(["nonsense://b/0.tar"])
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UserError, match="fsspec"):
        Shards(["memory://b/0.tar"]).read(0, 0, 1)


def test_pretraining_on_tars(tmp_path, encode, photograph):
    contents = [encode(Image.fromarray(photograph(30, 30, i)), "PNG") for i in range(12)]
    for k in range(3):
        write_tar(tmp_path / "shards" / f"{k}.tar", {f"{i}.png": contents[i] for i in range(4 * k, 4 * k + 4)})
    (tmp_path / "small.yaml").write_text(
        "model: {size: tiny, image_size: 28, embed_dim: 32, depth: 1, num_heads: 2, regressor_depth: 1,"
        " decoder_depth: 1}\n"
        "mask: {min_block: 4}\n"
        "data: {path: 'shards/{0..2}.tar', shuffle: shard, num_workers: 2}\n"
        "optim: {epochs: 2, warmup_epochs: 1}\n"
        "train: {global_batch_size: 4, run_dir: runs/one, precision: float32, device: cpu}\n"
        "log: {every_steps: 3, tensorboard: false}\n"
    )
    program = Program("pretrain")
    output = program.finish(tmp_path)
    assert metrics(tmp_path / "runs" / "one")[-1]["step"] == 6
    assert "3 tar files" in output
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.png").write_bytes(contents[0])
    overrides = ("data.path=folder", "train.run_dir=runs/two", "train.global_batch_size=1")
    assert "data.shuffle=shard: the images are in a folder" in program.finish(tmp_path, *overrides, status=2)


def in_folders(images, *folders):
    return {f"{folder}/{i}.jpg": images[i] for i, folder in enumerate(folders)}


@pytest.mark.parametrize(
    ("tars", "expected"),
    [
        ({"train.tar": ("cat", "dog", "cat/deep", "fox")}, ["cat", "dog", "cat", "fox"]),
        ({"000.tar": ("./cat", "./dog"), "001.tar": ("./cat", "./fox")}, ["cat", "dog", "cat", "fox"]),
        ({"train.tar": ("train/cat", "train/dog")}, ["cat", "dog"]),  # tar cf train.tar train
        ({"x.tar": ("a/train/cat", "a/train/dog/deep")}, ["cat", "dog"]),
        ({"cat.tar": ("images",), "dog.tar": ("images",)}, ["cat", "dog"]),
        ({"cat.tar": ("cat", "cat/deep"), "dog.tar": ("dog",)}, ["cat", "cat", "dog"]),
        ({"train.tar": ("cat", "dog", ".")}, ["cat", "dog", None]),
        ({"one.tar": ("cat", "cat/deep")}, ["cat", "cat"]),
        ({"train.tar": (".", ".")}, [None, None]),  # no labels: not one class of all
        ({"0.tar": (".", ".")}, [None, None]),
    ],
)
def test_classes_are_the_folders_inside(tmp_path, images, tars, expected):
    for name, folders in tars.items():
        write_tar(tmp_path / "tars" / name, in_folders(images, *folders))
    index = index_of(tmp_path, tmp_path / "tars")
    assert [None if label < 0 else index.classes[label] for label in index.labels] == expected
    assert index.classes == list(dict.fromkeys(name for name in expected if name))


def test_hidden_members_are_left_out_with_a_line(tmp_path, images, caplog):
    members = in_folders(images, "cat", "dog", "__MACOSX/cat", "cat/.ipynb_checkpoints")
    members |= {"cat/._0.jpg": b"resource fork", "./.DS_Store": b"", "cat/b.heic": b"", "cat/c.txt": b""}
    index = index_of(tmp_path, write_tar(tmp_path / "x.tar", members))
    assert (names(index), index.classes, index.num_bad) == (["cat/0.jpg", "dog/1.jpg"], ["cat", "dog"], 0)
    assert "2 files of other kinds ignored (.heic 1, .txt 1)" in caplog.text
    assert "4 hidden files or folders left out" in caplog.text


def test_tar_files_put_one_behind_the_other(tmp_path, images):
    one, two = (write_tar(tmp_path / f"{i}.tar", {f"{i}.jpg": images[i]}).read_bytes() for i in range(2))
    for gap in (b"", bytes(512), bytes(3 << 20)):
        (tmp_path / "both.tar").write_bytes(one + gap + two)
        index = index_of(tmp_path, tmp_path / "both.tar")
        assert (names(index), index.num_bad) == (["0.jpg", "1.jpg"], 0)
        assert [index.read(0), index.read(1)] == images[:2]
    (tmp_path / "both.tar").write_bytes(one + b"signature")
    index = index_of(tmp_path, tmp_path / "both.tar")
    assert names(index) == ["0.jpg"]
    assert f"data after the end mark at byte {len(one)}" in bad(index)[f"{tmp_path}/both.tar"]


def test_side_files_beside_tar_files(tmp_path, images):
    for i in range(2):
        write_tar(tmp_path / "s" / f"{i}.tar", {"0.jpg": images[i]})
    for name in ("00000.parquet", "00000_stats.json", "README.md", "0.idx", ".hidden.jpg"):
        (tmp_path / "s" / name).write_bytes(b"")
    (tmp_path / "s" / "logs").mkdir()
    assert len(index_of(tmp_path, tmp_path / "s")) == 2
    (tmp_path / "s" / "logs" / "0.jpg").write_bytes(images[0])
    assert find_shards([str(tmp_path / "s")]) is None  # images lie below


def test_tar_files_that_changed_are_found(tmp_path, images, caplog):
    for i in range(3):
        write_tar(tmp_path / "s" / f"{i}.tar", {"0.bmp": images[3], "1.bmp": images[3], "0.cls": b"0", "1.cls": b"1"})
    data, named = DataConfig(path=str(tmp_path / "s")), index_of(tmp_path, tmp_path / "s")
    made = index_for(data, tmp_path / "runs" / "one")
    assert made.labels.tolist() == [0, 1] * 3
    write_tar(tmp_path / "s" / "1.tar", {"1.bmp": images[3], "0.bmp": images[3], "0.cls": b"0", "1.cls": b"1"})
    with pytest.raises(UserError, match=r"s/1\.tar \(1 of 3 tar files\) changed since it was scanned"):
        index_for(DataConfig(index=str(named.folder)), tmp_path / "runs" / "one")
    assert index_for(data, tmp_path / "runs" / "one").labels.tolist() == [0, 1, 1, 0, 0, 1]
    shards_module._opened.cache_clear()
    with pytest.raises(UserError, match=r"s/1\.tar: the tar file changed since it was scanned"):
        made.read(2)  # a run that opened it before and comes to this tar file only now
    assert made.read(4) == images[3]


def test_urls_that_changed_are_found(tmp_path, images):
    memory, content = fsspec.filesystem("memory"), write_tar(tmp_path / "0.tar", {"0.jpg": images[0]}).read_bytes()
    memory.pipe_file("/changing/0.tar", content)
    index = index_of(tmp_path, "memory://changing/0.tar")
    assert open_index(index.folder).read(0) == images[0]
    memory.pipe_file("/changing/0.tar", content)
    with pytest.raises(UserError, match=r"memory://changing/0.tar .*changed since it was scanned"):
        open_index(index.folder)


@pytest.mark.parametrize("url", ["simplecache::memory://b/0.tar", "reference://b/0.tar", "ssh://b/0.tar", "x://b"])
def test_urls_of_other_protocols_are_refused(tmp_path, images, url, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)  # refused before fsspec sees them
    with pytest.raises(UserError, match="tar files are read from URLs of file, http, https, s3"):
        resolve_data_path(url)
    index = index_of(tmp_path, write_tar(tmp_path / "0.tar", {"0.jpg": images[0]}))
    meta = json.loads((index.folder / "meta.json").read_text()) | {"shards": [url]}
    (index.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="one at a time"):
        ImageIndex(index.folder).read(0)


def sparse_header(name, size, kind=b"S"):
    """A GNU header whose size field is a number in base 256, which may be negative."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = kind
    header[124:136] = (size % 256**12).to_bytes(12, "big")
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header)


@pytest.mark.parametrize("kind", [b"S", b"0", b"x", b"L", b"g"])
@pytest.mark.parametrize("size", [-512, -1024, -(2**40), 2**40])
def test_a_header_that_leads_backwards_or_far_away(tmp_path, images, kind, size):
    whole = write_tar(tmp_path / "x.tar", {"0.jpg": images[0]}).read_bytes()
    end = 1024 + (len(images[0]) - 1) // 512 * 512
    (tmp_path / "x.tar").write_bytes(whole[:end] + sparse_header("1.jpg", size, kind) + whole[end:])
    index = index_of(tmp_path, tmp_path / "x.tar")
    assert names(index) == ["0.jpg"]
    assert index.num_bad > 0


def test_pipes_named_as_tar_files(tmp_path, images):
    write_tar(tmp_path / "s" / "0.tar", {"0.jpg": images[0]})
    os.mkfifo(tmp_path / "s" / "1.tar")
    assert len(find_shards([str(tmp_path / "s")]).names) == 1
    assert len(find_shards([str(tmp_path / "s" / "*.tar")]).names) == 1
    with pytest.raises(UserError, match="there is no such tar file"):
        find_shards([str(tmp_path / "s" / "1.tar")])
    reasons = bad(
        build_index(Shards([str(tmp_path / "s" / f"{i}.tar") for i in range(2)]), tmp_path / "x.index", 10**6)
    )
    assert list(reasons.values()) == ["tar file cannot be read to its end: not a file"]
