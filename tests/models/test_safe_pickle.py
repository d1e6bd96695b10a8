"""Hostile pickles: never code, never a crash, never more memory than the file is large; one line each."""

import io
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from cae_fast.config import UserError
from cae_fast.models import safe_pickle
from cae_fast.models.safe_pickle import read_state

PROTO = b"\x80\x02"


def archive(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", data)
        for key, content in storages.items():
            file.writestr(f"a/data/{key}", content)
    return path


def tensor_pickle(size: str, stride: str, count: int = 4) -> bytes:
    """{"w": a tensor of this size and stride on a storage of `count` floats}, protocol 0 by hand."""
    return (
        PROTO
        + b"(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'k'\nS'cpu'\n"
        + f"I{count}\ntQI0\n{size}{stride}I00\nNtRs.".encode()
    )


def bombs() -> dict[str, bytes]:
    nested = PROTO + b")" + b"\x85" * 200_000 + b"."
    laughs = PROTO + b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"."
    return {
        "memo": PROTO + b"}r\xff\xff\xff\x1f.",
        "nested tuples": nested,
        "a key of nested tuples": PROTO + b"}" + nested[2:-1] + b"K\x01s.",
        "shared children": laughs,
        "a key of shared children": PROTO + b"}" + laughs[2:-1] + b"K\x01s.",
        "a long string that is not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",
        "a long integer": PROTO + b"\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        "an empty stack": PROTO + b"a.",
        "defaults": PROTO + b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'__defaults__'\n(I1\ntstb.",
        "a class's attribute": PROTO + b"ccollections\nOrderedDict\n(N}S'x'\nI1\nstb.",
    }


@pytest.mark.parametrize("kind", list(bombs()))
@pytest.mark.parametrize("old", [False, True])
def test_a_bomb_is_one_line(tmp_path, kind, old):
    """In a process of its own with little memory and time: a crash or a hang would show."""
    path = tmp_path / "bomb.pth"
    if old:
        start = b"".join(
            pickle.dumps(x, 2) for x in (safe_pickle.LEGACY_MAGIC, safe_pickle.LEGACY_PROTOCOL, {"little_endian": True})
        )
        path.write_bytes(start + bombs()[kind] + pickle.dumps([], 2))
    else:
        archive(path, bombs()[kind])
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from cae_fast.models.safe_pickle import read_state; from cae_fast.config import UserError\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))\n"
        "try: read_state(Path(sys.argv[1]), ())\n"
        "except UserError as error: print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith("refused:")
    assert done.stdout.count("\n") == 1


def test_nothing_that_a_file_names_can_be_changed():
    unpickler = safe_pickle._RecordUnpickler(io.BytesIO(), ())
    for name, found in unpickler.admitted.items():
        with pytest.raises((AttributeError, TypeError)):
            found.__defaults__ = (1,)
        assert not hasattr(found, "__defaults__"), name


def test_compressed_entries_are_refused(tmp_path):
    path = archive(tmp_path / "x.pth", tensor_pickle("(I2\nt", "(I1\nt"), zipfile.ZIP_DEFLATED, k=bytes(10**7))
    with pytest.raises(UserError, match="is compressed"):
        read_state(path, ())


@pytest.mark.parametrize(
    ("size", "stride"),
    [("(I1000000000\nt", "(I0\nt"), ("(I-1\nt", "(I1\nt"), ("(I2\nt", "(I-1\nt"), ("(I3\nI1000000\nt", "(I1\nI0\nt")],
)
def test_a_tensor_is_no_larger_than_the_file(tmp_path, size, stride):
    path = archive(tmp_path / "x.pth", tensor_pickle(size, stride), k=bytes(16))
    with pytest.raises(UserError, match="'w' is larger than what the file holds"):
        read_state(path, ())


def test_a_tensor_by_hand_is_read(tmp_path):
    """The same file with honest sizes: what the refusals above are about is their sizes."""
    path = archive(tmp_path / "x.pth", tensor_pickle("(I2\nI2\nt", "(I2\nI1\nt"), k=struct.pack("<4f", 1, 2, 3, 4))
    assert read_state(path, ())["w"].tolist() == [[1, 2], [3, 4]]


def test_weights_under_two_names_are_read(tmp_path):
    weight = torch.randn(100, 100)
    torch.save({f"copy{i}": weight for i in range(3)}, tmp_path / "x.pth")
    assert all(tensor.equal(weight) for tensor in read_state(tmp_path / "x.pth", ()).values())


def test_memory_stays_small_for_a_large_honest_file(tmp_path):
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "x.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_state(tmp_path / "x.pth", ())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
