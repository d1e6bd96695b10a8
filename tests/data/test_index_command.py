import argparse
import io
import tarfile
from pathlib import Path

import pytest

from cae_fast.commands.index import add_arguments, run
from cae_fast.config import UserError
from cae_fast.data.index import open_index


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(list(arguments)))


def test_command(tmp_path, photograph, encode, monkeypatch, capsys):
    content = encode(photograph(8, 8), "PNG")
    for name, data in {"a/1.png": content, "b/1.png": content, "b/2.png": content, "b/3.png": b""}.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_command("../set") == 0
    printed = capsys.readouterr().out
    assert "3 images" in printed
    assert "classes: 2, of 1 to 2 images" in printed
    assert "bad files: 1" in printed
    assert str(tmp_path / "here" / "set.index" / "bad_files.tsv") in printed
    assert len(open_index("set.index")) == 3
    assert run_command("../set", "--out", "other.index", "--max-pixels", "64") == 0
    with pytest.raises(UserError, match="all 4 image files are bad"):
        run_command("../set", "--out", "tiny.index", "--max-pixels", "63")
    with pytest.raises(UserError, match="--max-pixels=0"):
        run_command("../set", "--max-pixels", "0")
    with pytest.raises(UserError, match="inside the data folder"):
        run_command("../set", "--out", "../set/set.index")
    (tmp_path / "here" / "taken.index").mkdir()
    with pytest.raises(UserError, match="exists and is not an index"):
        run_command("../set", "--out", "taken.index")


def test_tar_files(tmp_path, photograph, encode, monkeypatch, capsys):
    content = encode(photograph(8, 8), "PNG")
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        Path("shards").mkdir(exist_ok=True)
        with tarfile.open(f"shards/{i:03d}.tar", "w") as tar:
            for name, data in {"a.png": content, "a.cls": b"%d" % i, "b.png": content, "bad.png": b""}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert run_command("shards/{000..002}.tar") == 0
    printed = capsys.readouterr().out
    assert f"shards.index: 6 images, {6 * len(content):,} bytes" in printed
    assert "classes: 3, of 1 to 1 images" in printed
    assert "bad files: 3" in printed
    assert "(3 tar files)" in printed
    index = open_index("shards.index")
    assert index.labels.tolist() == [0, -1, 1, -1, 2, -1]
    assert run_command("shards/000.tar", "shards/002.tar", "--out", "two.index") == 0  # as a shell expands a glob
    assert len(open_index("two.index")) == 4
    with pytest.raises(UserError, match="shards/003.tar: there is no such tar file"):
        run_command("shards/{000..003}.tar")
    with pytest.raises(UserError, match="nowhere is not a folder of images and no tar file"):
        run_command("nowhere")
