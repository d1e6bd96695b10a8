import argparse

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
