"""Scanning a tar file: its images, their labels and where they begin, and what is damaged in it."""

import json
import os
import tarfile
from collections.abc import Iterator
from typing import IO

from cae_fast.config import UserError
from cae_fast.data.headers import Found, inspect
from cae_fast.data.patience import is_trouble, open_file, patiently
from cae_fast.data.remote import is_url, open_url
from cae_fast.data.source import Entry, LeftOut

MAX_LABEL = 999_999
MAX_LABEL_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20  # of an extended header or a long name; Linux allows names of 4096 bytes
EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
GAP_BYTES = 1 << 20  # read at a time behind an end mark


class Member(tarfile.TarInfo):
    """A header that is refused where tarfile would go backwards by its size, or read all of it into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in EXTENDED and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"header at byte {self.offset} claims {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def scan_tar(number: int, name: str, max_pixels: int) -> tuple[list[Entry], LeftOut]:
    """The images of a tar file in order, then what is bad in it; and what was passed by.

    Raises UserError where the machine or the network is in trouble.
    """
    return patiently(name, lambda: _scan(number, name, max_pixels))


def _scan(number: int, name: str, max_pixels: int) -> tuple[list[Entry], LeftOut]:
    images: list[tuple[str, Found, int]] = []
    notes: dict[str, bytes | int | str | None] = {}  # by label file
    bad: list[Entry] = []
    left_out = LeftOut()

    try:
        with _open(name) as stream:
            size = stream.seek(0, os.SEEK_END)
            for tar, member in _members(stream):
                path, parts = member.name, member.name.split("/")
                if any(map(left_out.is_hidden, parts)) or member.isdir():
                    continue
                if path.endswith((".cls", ".json")) and member.isreg():
                    notes[path] = _label(path, tar.extractfile(member).read(MAX_LABEL_BYTES))  # type: ignore[union-attr]
                elif left_out.is_image(parts[-1]):
                    images.append((path, _inspect_member(tar, member, size, max_pixels), member.offset_data))
    except UserError:
        raise
    except Exception as error:  # damaged extended headers raise any type
        if is_trouble(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        bad.append(Entry(os.fsencode(name), f"tar file cannot be read to its end: {reason}", None))

    # Only now are all labels known: one may lie behind its image.
    bad += [Entry(os.fsencode(f"{name}:{path}"), note, None) for path, note in notes.items() if isinstance(note, str)]
    ordered = sorted(notes.items(), reverse=True)  # .cls after .json: it takes precedence
    labels = {_key(path): note for path, note in ordered if isinstance(note, bytes | int)}
    entries = []
    for path, found, offset in images:
        label = labels.get(_key(path), _place(name, path))
        place = f"{name}:{path}" if isinstance(found, str) else path
        entries.append(Entry(os.fsencode(place), found, label, shard=number, offset=offset))
    return entries + bad, left_out


def _open(name: str) -> IO[bytes]:
    return open_url(name) if is_url(name) else open(open_file(name), "rb")


def _members(stream: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Of a tar file, and of others that were put behind it (`cat 0.tar 1.tar`).

    Raises tarfile.ReadError (and others, from damaged headers) where one ends before its end mark.
    """
    start: int | None = 0
    while start is not None:
        stream.seek(start)
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=Member) as tar:
            yield from _members_of_one(tar, start)

        if start and tar.offset == start:
            raise tarfile.ReadError(f"data after the end mark at byte {start}")
        stream.seek(tar.offset)
        end = stream.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it has no end mark, so it may be truncated")
        if any(end):  # tarfile takes any header that it cannot read for the end
            raise tarfile.ReadError(f"damaged header at byte {tar.offset}")
        start = _next_data(stream, tar.offset + tarfile.BLOCKSIZE)


def _members_of_one(tar: tarfile.TarFile, place: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # the list of all, which tarfile would keep
        if member.size < 0 or tar.offset <= place:
            raise tarfile.ReadError(f"{member.name} has a negative size")
        place = tar.offset
        yield tar, member


def _next_data(stream: IO[bytes], place: int) -> int | None:
    """The first block from `place` on that is not all zeros, None where only zeros follow."""
    while content := stream.read(GAP_BYTES):
        if rest := content.lstrip(b"\0"):
            return place + (len(content) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        place += len(content)
    return None


def _inspect_member(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int, max_pixels: int) -> Found:
    if not member.isreg() or member.issparse():
        return "not a file"
    if member.offset_data + member.size > size:
        return "the tar file ends before it does"
    with tar.extractfile(member) as stream:  # type: ignore[union-attr]
        return inspect(stream, member.size, max_pixels)


def _label(path: str, content: bytes) -> bytes | int | str | None:
    """Of a .cls or .json file: a class's number, its name behind two NULs (bytes), None, or what is wrong (str)."""
    try:
        label = int(content) if path.endswith(".cls") else json.loads(content)
    except ValueError:
        return "is not a whole number" if path.endswith(".cls") else "is not valid JSON"
    if path.endswith(".json"):
        label = label.get("cls", label.get("label")) if isinstance(label, dict) else None
    if label is None or (type(label) is int and 0 <= label <= MAX_LABEL):
        return label
    if isinstance(label, str):
        return b"\0\0" + label.encode("utf-8", "surrogatepass")
    return f"holds no label: neither a name nor a whole number from 0 to {MAX_LABEL}"


def _key(path: str) -> str:
    """WebDataset's name of a sample: the path up to the first dot of its last part."""
    folder, slash, base = path.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _place(name: str, path: str) -> bytes | None:
    """What a class's name may come of: the tar's name, NUL, the folder inside; None without either.

    The tar's name counts if it has no digits (numbered shards are no classes); and what its members' names begin with,
    as in n01440764.tar with n01440764_18.JPEG, counts as their folder.
    """
    stem = name.rpartition("/")[2].removesuffix(".tar")
    folders = [part for part in path.split("/")[:-1] if part not in ("", ".")]
    if not folders and path.removeprefix("./").startswith(f"{stem}_"):
        folders = [stem]
    word = "" if any(map(str.isdigit, stem)) else stem
    return os.fsencode(f"{word}\0{'/'.join(folders)}") if word or folders else None
