"""`cae-fast convert dalle`: pickles of OpenAI's own package in, one file of ours out, and no code run on the way."""

import hashlib
import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cae_fast.cli import main
from cae_fast.models.dalle import map_pixels
from cae_fast.models.safe_pickle import read_state
from cae_fast.models.targets import load_tokenizer

dall_e = pytest.importorskip("dall_e", reason="needs the dall-e package: pip install --no-deps dall-e")


@pytest.fixture(scope="module")
def modules():
    torch.manual_seed(2)
    return dall_e.Encoder(n_hid=8, vocab_size=64), dall_e.Decoder(n_hid=8, n_init=16, vocab_size=64)


@pytest.fixture
def pickles(tmp_path, modules):
    paths = [str(tmp_path / name) for name in ("encoder.pkl", "decoder.pkl")]
    for module, path in zip(modules, paths, strict=True):
        torch.save(module, path)
    return paths


def refused(argv, capsys) -> str:
    """The one line that a mistake gets."""
    assert main(["convert", *argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_converts_the_published_pickles(tmp_path, modules, pickles, capsys):
    out = tmp_path / "new" / "dalle.safetensors"
    assert main(["convert", "dalle", *pickles, str(out)]) == 0
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in (*pickles, out)]
    text = capsys.readouterr().out
    assert all(digest in text for digest in digests)
    with safe_open(out, framework="pt") as file:
        facts = json.loads(file.metadata()["cae_fast"])
    assert facts["kind"] == "dalle"
    assert facts["sources"]["encoder"] == {"file": "encoder.pkl", "sha256": digests[0]}
    assert facts["sources"]["decoder"] == {"file": "decoder.pkl", "sha256": digests[1]}
    assert facts["sizes"]["num_codes"] == 64
    assert facts["sizes"]["encoder_parameters"] == sum(p.numel() for p in modules[0].parameters())
    tokenizer = load_tokenizer(str(out))
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    ids = torch.arange(25).expand(2, -1)
    with torch.no_grad():
        expected = modules[0](map_pixels(images)).argmax(1).flatten(1)
    assert tokenizer.encode(images, ids).equal(expected)
    assert tokenizer.has_decoder


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: m.state_dict(), lambda m: {"state_dict": m.state_dict()}])
def test_reads_modules_and_state_dicts_of_both_formats(tmp_path, modules, zipped, wrap):
    path = tmp_path / "weights.pth"
    torch.save(wrap(modules[0]), path, _use_new_zipfile_serialization=zipped)
    state, expected = read_state(path, ("dall_e.", "torch.nn.modules.")), modules[0].state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reads_views_and_other_types(tmp_path, zipped):
    base = torch.randn(4, 6)
    content = {
        "transposed": base.T,
        "part": base[1:3, ::2],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "integers": torch.arange(5),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(base),
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    state = read_state(tmp_path / "a.pth", ())
    for name, tensor in content.items():
        assert state[name].dtype == tensor.dtype
        assert state[name].equal(tensor)


def test_an_encoder_alone_is_enough(tmp_path, modules, capsys):
    torch.save(modules[0].state_dict(), tmp_path / "encoder.pth")
    out = tmp_path / "encoder_only.safetensors"
    assert main(["convert", "dalle", str(tmp_path / "encoder.pth"), str(out)]) == 0
    assert not load_tokenizer(str(out)).has_decoder


def test_verify_prints_the_agreement(tmp_path, pickles, capsys):
    out = str(tmp_path / "dalle.safetensors")
    assert main(["convert", "dalle", *pickles, out, "--verify", "bundled:photographs"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("float16 and float32 agree on ")
    assert float(line.split("(")[1].split("%")[0]) > 95


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["bare", "in a module"])
def test_a_malicious_pickle_is_refused_without_running(tmp_path, modules, zipped, place, capsys):
    marker = tmp_path / "marker"
    if place == "bare":
        content = {"blocks.input.w": Malicious(marker)}
    else:
        content = dall_e.Encoder(n_hid=8, vocab_size=64)
        content.blocks.extra = Malicious(marker)
    torch.save(content, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    line = refused(["dalle", str(tmp_path / "encoder.pkl"), str(tmp_path / "out.safetensors")], capsys)
    assert "system" in line
    assert not marker.exists()
    torch.load(tmp_path / "encoder.pkl", weights_only=False)
    assert marker.exists()  # the file is what it claims to be
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "torch.load", "torch.hub.load", "dall_e_evil.run", "functools.partial", "os\x1b[2J.system"],
)
def test_other_names_are_refused(tmp_path, name, capsys):
    """A pickle made by hand that only looks a global up, in the place of a file's data.pkl."""
    module, _, function = name.rpartition(".")
    with zipfile.ZipFile(tmp_path / "encoder.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", f"\x80\x02c{module}\n{function}\n.".encode("latin1"))
    line = refused(["dalle", str(tmp_path / "encoder.pkl"), str(tmp_path / "out.safetensors")], capsys)
    assert f"asks for {name.replace(chr(27), chr(92) + 'x1b')}," in line  # nothing that a terminal would obey


def test_module_classes_are_never_imported(tmp_path, capsys):
    """A class whose module would leave a trace when imported."""
    with zipfile.ZipFile(tmp_path / "encoder.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cdall_e.no_such_module\nThing\n)\x81}b.")
    line = refused(["dalle", str(tmp_path / "encoder.pkl"), str(tmp_path / "out.safetensors")], capsys)
    assert "holds something else, not the encoder" in line


DAMAGED = {
    "empty": (b"", "is empty"),
    "page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "log": (b"--2021-02-24 20:01:02--  https://cdn.openai.com/dall-e/encoder.pkl\nResolving...", "wget's log"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "begins with 'version https"),
    "noise": (b"\x80\x02" + bytes(range(256)), "truncated or damaged"),
    "other pickle": (b"\x80\x02}q\x00.", "truncated or damaged"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_failed_downloads_get_one_line(tmp_path, kind, capsys):
    content, said = DAMAGED[kind]
    path = tmp_path / "encoder.pkl"
    path.write_bytes(content)
    line = refused(["dalle", str(path), str(tmp_path / "out.safetensors")], capsys)
    assert said in line
    assert str(path) in line


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.9, 0.9999])
def test_truncated_files_get_one_line(tmp_path, modules, zipped, share, capsys):
    path = tmp_path / "encoder.pkl"
    torch.save(modules[0], path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    line = refused(["dalle", str(path), str(tmp_path / "out.safetensors")], capsys)
    assert "truncated" in line


def test_storages_are_not_read_past_their_end(tmp_path, capsys):
    """A tensor that claims more values than its storage holds."""
    torch.save({"blocks.input.w": torch.zeros(3)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    size = b"K\x03\x85"  # the tuple (3,): first the size, then nothing else of that form
    assert data.count(size) == 1
    (tmp_path / "a.pth").write_bytes(data.replace(size, b"K\x63\x85"))
    assert "damaged" in refused(["dalle", str(tmp_path / "a.pth"), str(tmp_path / "o.safetensors")], capsys)
    grown = data[:-20] + struct.pack("<q", 2**40) + data[-12:]
    (tmp_path / "a.pth").write_bytes(grown)
    assert "damaged" in refused(["dalle", str(tmp_path / "a.pth"), str(tmp_path / "o.safetensors")], capsys)


def test_mistakes_in_the_arguments(tmp_path, modules, pickles, capsys):
    out = str(tmp_path / "out.safetensors")
    assert "decoder.pkl: the last argument" in refused(["dalle", *pickles], capsys)
    assert "holds a decoder, not the encoder" in refused(["dalle", *reversed(pickles), out], capsys)
    assert "there is no such file" in refused(["dalle", str(tmp_path / "none.pkl"), out], capsys)
    assert "3 files" in refused(["dalle", *pickles, pickles[0], out], capsys)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "linear.pth")
    assert "linear.pth: 'weight' is no weight of DALL-E" in refused(
        ["dalle", str(tmp_path / "linear.pth"), out], capsys
    )
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    assert "neither a module nor" in refused(["dalle", str(tmp_path / "epoch.pth"), out], capsys)
    torch.save(dict(list(modules[0].state_dict().items())[:-2]), tmp_path / "part.pth")
    assert "not DALL-E's modules" in refused(["dalle", str(tmp_path / "part.pth"), out], capsys)
    torch.save(dall_e.Decoder(n_hid=8, n_init=16, vocab_size=128), pickles[1])
    assert "do not belong together" in refused(["dalle", *pickles, out], capsys)
    assert not os.path.exists(out)
