"""Image files to pixels on the CPU: decode, crop, resize.

Decoder "cpu": JPEG goes through libjpeg-turbo with the accurate DCT and smooth chroma upsampling (equal to Pillow's
pixels, without its overhead), everything else through Pillow. Resizing is torch's antialiased uint8 interpolation,
which follows Pillow's filters: rows first, then columns, rounded in between, as Pillow did until 12 (Pillow 13 does the
columns first where an image shrinks more in height than in width, which moves pixels by up to 0.3 gray levels on
average). Decoder "pil", the reference, leaves everything to Pillow, as the original code does.

Legend: H, W height and width in pixels.
"""

import io
import warnings
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# The limit on an image's size is data.max_pixels: the index leaves larger files out, and decode_rgb refuses a file
# whose size is not the index's. Pillow's own fixed limit would refuse what a user allows.
Image.MAX_IMAGE_PIXELS = None
# What is wrong with a TIFF's other tags is no news; its pixels are judged by decoding them.
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")

PIL_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000")
GZIP_MAGIC = b"\x1f\x8b"
MAX_UNZIPPED_BYTES = 1 << 30
MAX_UNZIPPED_RATIO, MIN_UNZIPPED_BYTES = (
    32,
    64 << 20,
)  # photographs hardly shrink: a small file of a large one is a bomb

# torch has mode="lanczos" from 2.12 on; before that, Pillow does it (2 to 4 times slower).
TORCH_HAS_LANCZOS = hasattr(torch.ops.aten, "_upsample_lanczos2d_aa")
PIL_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}

Pixels = NDArray[np.uint8]
Decoder = Literal["cpu", "pil"]


class DecodeError(ValueError):
    """An image file that cannot be used, with the reason."""


def decode_rgb(data: bytes, size: tuple[int, int] | None = None, decoder: Decoder = "cpu") -> Pixels:
    """Decode image bytes of PIL_FORMATS (also gzipped ones), the first of several, to RGB pixels, uint8 (H, W, 3).

    Pixels are those of Pillow's convert("RGB"): gray is repeated, palettes are looked up, CMYK is converted, alpha is
    dropped. Gray samples of 16 bits keep the upper 8 of the bits that the image uses: of 8, 10, 12, 14 or 16, the least
    that hold its largest sample (scanners write 12 bits into 16). EXIF orientation is ignored.
    With `size` (height, width), a file of another size raises before it is decoded.
    Raises DecodeError for whatever is unreadable, truncated or in another format, MemoryError where memory is short.
    """
    if data[:2] == GZIP_MAGIC:
        data = gunzip(data)
    if decoder == "cpu" and data[:2] == b"\xff\xd8":
        return _decode_jpeg(data, size)
    return _decode_pil(data, size)


def gunzip(data: bytes) -> bytes:
    """The content of a gzip file. Raises DecodeError when it is damaged, truncated or much larger than an image."""
    stream = zlib.decompressobj(wbits=31)
    limit = min(MAX_UNZIPPED_BYTES, max(MIN_UNZIPPED_BYTES, MAX_UNZIPPED_RATIO * len(data)))
    try:
        content = stream.decompress(data, limit)
    except zlib.error as error:
        raise DecodeError(f"damaged gzip data: {error}") from error
    if not stream.eof:
        raise DecodeError(f"gzip data is truncated or unpacks to more than {limit >> 20} MiB")
    return content


def _decode_jpeg(data: bytes, size: tuple[int, int] | None) -> Pixels:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _decode_pil(data, size)  # rare chroma layouts, and the wording of what is wrong with the others
    if colorspace in ("CMYK", "YCCK"):
        return _decode_pil(data, size)
    _check_size((height, width), size)
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        # libjpeg fills what is missing with gray and only warns; its other warnings are harmless and Pillow's to judge.
        if "premature end" in str(error).lower():
            raise DecodeError("truncated JPEG") from error
        if "insufficient memory" in str(error).lower():
            raise MemoryError from error
        return _decode_pil(data, size)


def _decode_pil(data: bytes, size: tuple[int, int] | None) -> Pixels:
    try:
        with open_image(data, PIL_FORMATS) as image:
            _check_size((image.height, image.width), size)
            if image.mode == "F":
                raise DecodeError("has floating-point samples, whose range is unknown")
            if image.mode.startswith("I"):
                return np.repeat(_upper_8_bits(np.asarray(image).astype(np.int64))[:, :, None], 3, axis=2)
            image.info.pop("transparency", None)  # alpha is dropped: spare Pillow's warning about palettes with alpha
            return np.array(image.convert("RGB"))
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("not an image, or one with a broken header") from error
    except Exception as error:  # Pillow's decoders raise any type: OSError, SyntaxError, ValueError, struct.error ...
        if "out of memory" in str(error):
            raise MemoryError from error
        raise DecodeError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _upper_8_bits(gray: NDArray[np.int64]) -> Pixels:
    bits = int(gray.max()).bit_length()
    return (gray >> max(0, min(16, bits + bits % 2) - 8)).clip(0, 255).astype(np.uint8)


def open_image(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Pillow's image of a file's bytes, whatever the size of the color profile and the texts in a PNG."""
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except ValueError as error:
        if "MAX_TEXT" not in str(error) and "too large" not in str(error):
            raise
        return Image.open(io.BytesIO(_without_texts(data)), formats=formats)


def _without_texts(png: bytes) -> bytes:
    """The chunks of a PNG that Pillow's pixels depend on: it refuses long texts and profiles in others."""
    kept, place = [png[:8]], 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if png[place + 4 : place + 8] not in (b"iCCP", b"iTXt", b"tEXt", b"zTXt", b"eXIf"):
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


def _check_size(found: tuple[int, int], expected: tuple[int, int] | None) -> None:
    if expected is not None and found != tuple(expected):
        raise DecodeError(f"is {found[0]} x {found[1]} pixels (height x width), expected {expected[0]} x {expected[1]}")


def resized_crop(
    image: Pixels,
    box: Sequence[int] | NDArray[np.integer],
    flip: bool,
    size: int,
    filter: str,
    decoder: Decoder = "cpu",
) -> torch.Tensor:
    """Crop to box (top, left, height, width), resize to a square, mirror if asked: uint8 (3, size, size).

    filter: "bicubic" or "lanczos", antialiased as Pillow does; on average within 0.05 gray levels of Pillow's
    Image.crop().resize(), rows first. Decoder "pil" is that call itself.
    """
    top, left, height, width = (int(edge) for edge in box)
    crop = image[top : top + height, left : left + width]
    view = _resize_pil(crop, size, size, filter) if decoder == "pil" else resize(crop, size, size, filter)
    return view.flip(-1) if flip else view


def resize(image: Pixels, height: int, width: int, filter: str) -> torch.Tensor:
    """Resize uint8 (H, W, 3) to uint8 (3, height, width) with an antialiased filter, "bicubic" or "lanczos"."""
    image = np.ascontiguousarray(image)
    if filter == "lanczos" and not TORCH_HAS_LANCZOS:
        rows = _resize_pil(image, len(image), width, filter).permute(1, 2, 0).numpy()
        return _resize_pil(rows, height, width, filter)
    pixels = torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W) over (H, W, 3) memory: torch's fast path
    return F.interpolate(pixels[None], size=(height, width), mode=filter, antialias=True)[0]


def _resize_pil(image: Pixels, height: int, width: int, filter: str) -> torch.Tensor:
    resized = Image.fromarray(image).resize((width, height), PIL_FILTERS[filter])
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def resize_and_center_crop(image: Pixels, size: int, crop_pct: float = 1.0) -> torch.Tensor:
    """Resize the shorter side to size / crop_pct (bicubic, the longer one in proportion), then the central square.

    uint8 (H, W, 3) to uint8 (3, size, size). The usual evaluation has size 224 and crop_pct 224 / 256; with 1 an image
    that is size x size already stays as it is.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    # Only the middle of a strip reaches the square; without this a 1 x 100,000 strip would grow to gigabytes.
    rows, columns = min(height, 8 * short), min(width, 8 * short)
    top, left = (height - rows) // 2, (width - columns) // 2
    image = image[top : top + rows, left : left + columns]
    side = int(size / crop_pct)
    new_height, new_width = side * rows // short, side * columns // short
    resized = resize(image, new_height, new_width, "bicubic")
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return resized[:, top : top + size, left : left + size]
