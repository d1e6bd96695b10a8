"""What the header and the end of an image file say, without decoding it: its size, or why it cannot be used."""

import io
from typing import IO

from PIL import Image

from cae_fast.data.decode import GZIP_MAGIC, PIL_FORMATS, DecodeError, gunzip

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TAIL = 64 * 1024  # bytes at the end of a file in which its end mark is looked for
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"PK\x03\x04", "ZIP"),
)

Found = tuple[int, int, int] | str  # height, width and bytes of an image, or why it cannot be used


def inspect(stream: IO[bytes], size: int, max_pixels: int) -> Found:
    """(height, width, size) of an image whose bytes, `size` of them, begin at the stream's start, or why not.

    Only the beginning and the end are read (all of a WebP or a gzipped file). Raises OSError.
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
        raise DecodeError(f"is {kind}, not JPEG, PNG, WebP or BMP")
    declared = {"WEBP": int.from_bytes(head[4:8], "little") + 8, "BMP": int.from_bytes(head[2:6], "little")}
    if size < declared.get(kind, 0):
        raise DecodeError(f"truncated {kind}")

    stream.seek(0)
    try:
        with Image.open(stream, formats=[kind]) as image:
            width, height = image.size
            # A JPEG's thumbnail has an end mark too: only what follows the header counts.
            header = stream.tell() if image.format == "JPEG" else 0
            stream.seek(max(header, size - TAIL))
            tail = stream.read()
    except Exception as error:  # Pillow's readers raise any type: OSError, SyntaxError, struct.error ...
        raise DecodeError(f"broken {kind} header ({type(error).__name__})") from error

    if height < 1 or width < 1:
        raise DecodeError(f"broken {kind} header ({width} x {height} pixels)")
    if END_MARKS.get(kind, b"") not in tail:
        raise DecodeError(f"truncated {kind}")
    return height, width


def _sniff(head: bytes) -> str:
    if not head:
        return "empty"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.lstrip()[:1] == b"<":
        return "HTML or XML"
    if head[4:8] == b"ftyp":
        return "HEIF, AVIF or video"
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), "an unknown format")
