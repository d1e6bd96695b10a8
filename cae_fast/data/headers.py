"""What the header and the end of an image file say, without decoding it: its size, or why it cannot be used."""

import io
from typing import IO

from PIL import Image

from cae_fast.data.decode import GZIP_MAGIC, PIL_FORMATS, DecodeError, gunzip, open_image
from cae_fast.data.patience import is_trouble

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"),
    *(".gif", ".tif", ".tiff", ".avif", ".jp2", ".j2k"),
)
KINDS = "JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or JPEG 2000"
TAIL = 64 * 1024  # bytes at the end of a file in which its end mark is looked for first
BLOCK = 1 << 20  # then bytes at a time
END_MARKS = {"JPEG": b"\xff\xd9", "JPEG2000": b"\xff\xd9", "PNG": b"IEND"}

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"PK\x03\x04", "ZIP"),
)

Found = tuple[int, int, int] | str  # height, width and bytes of an image, or why it cannot be used


def inspect(stream: IO[bytes], size: int, max_pixels: int) -> Found:
    """(height, width, size) of an image whose bytes, `size` of them, begin at the stream's start, or why not.

    Only the beginning and the end are read (all of a WebP, an AVIF or a gzipped file, of one with much behind its end
    mark, and of a PNG with a long profile or text). Raises OSError, and MemoryError where memory is short.
    """
    try:
        height, width = _image_size(stream, size)
    except DecodeError as error:
        return str(error)
    if height * width > max_pixels:
        return f"{width} x {height} pixels are more than data.max_pixels={max_pixels}"
    return height, width, size


def _image_size(stream: IO[bytes], size: int) -> tuple[int, int]:
    """(height, width) from the header of an image; raises DecodeError, also for a truncated file."""
    head = stream.read(32)
    if head.startswith(GZIP_MAGIC):
        content = gunzip(head + stream.read())
        stream, size, head = io.BytesIO(content), len(content), content[:32]

    kind = _sniff(head)
    if kind not in PIL_FORMATS:
        raise DecodeError(f"is {kind}, not {KINDS}")
    if kind == "WEBP" and size < int.from_bytes(head[4:8], "little") + 8:
        raise DecodeError("truncated WEBP")

    stream.seek(0)
    try:
        with _open(stream, kind) as image:
            width, height = image.size
            # A JPEG's thumbnail has an end mark too: only what follows the header counts.
            header = stream.tell() if image.format in ("JPEG", "MPO") else 0
            needed = _bytes_needed(image)
    except Exception as error:  # Pillow's readers raise any type: OSError, SyntaxError, struct.error ...
        if is_trouble(error):
            raise
        raise DecodeError(f"broken {kind} header ({type(error).__name__})") from error

    if height < 1 or width < 1:
        raise DecodeError(f"broken {kind} header ({width} x {height} pixels)")
    if size < needed or not _holds(stream, size, header, END_MARKS.get(kind, b"")):
        raise DecodeError(f"truncated {kind}")
    return height, width


def _open(stream: IO[bytes], kind: str) -> Image.Image:
    try:
        return Image.open(stream, formats=(kind,))
    except ValueError:
        if kind != "PNG":
            raise
        stream.seek(0)
        return open_image(stream.read(), (kind,))


def _bytes_needed(image: Image.Image) -> int:
    """The least size of a BMP whose rows are not compressed and of a TIFF; 0 for the others."""
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        offsets, counts = tags.get(273, tags.get(324, ())), tags.get(279, tags.get(325, ()))  # of strips or tiles
        return max((offset + count for offset, count in zip(offsets, counts, strict=False)), default=0)
    tiles = getattr(image, "tile", [])
    if image.format != "BMP" or len(tiles) != 1 or tiles[0][0] != "raw":
        return 0
    _, (_, _, _, height), offset, (_, stride, _) = tiles[0]
    return offset + stride * height - 3  # rows are filled up to a multiple of four bytes; the last one need not be


def _holds(stream: IO[bytes], size: int, start: int, mark: bytes) -> bool:
    """Whether the mark is found between `start` and the end, where it mostly lies."""
    stream.seek(max(start, size - TAIL))
    if mark in stream.read():
        return True
    stream.seek(start)
    behind = b""
    while content := stream.read(BLOCK):
        if mark in behind + content:
            return True
        behind = content[-len(mark) :]
    return False


def _sniff(head: bytes) -> str:
    if not head:
        return "empty"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.lstrip()[:1] == b"<":
        return "HTML or XML"
    if head[4:8] == b"ftyp":
        return "AVIF" if head[8:12] in (b"avif", b"avis") or b"avif" in head[16:] else "HEIF or video"
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), "an unknown format")
