"""Image files for tests: good and odd ones, bad ones that a scan finds, and bad ones that only decoding finds."""

import base64
import gzip
import io
import os
import struct
import warnings
import zlib
from unittest import mock

import numpy as np
from PIL import Image, PngImagePlugin

# 24 x 20 pixels, made with `jpegtran -arithmetic`: Pillow writes Huffman-coded files only.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAUDBAQEAwUEBAQFBQUGBwwIBwcHBw8LCwkMEQ8SEhEPERETFhwXExQaFRERGCEYGh0dHx8fExciJCIe"
    "JBweHx7/2wBDAQUFBQcGBw4ICA4eFBEUHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh7/yQARCAAYABQD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwCdoIv641ir/TZKuS0IxNrx9xzBtDIiYU1bnfwWo9ewpqQI7vM8+U6B+QCOx0MOPOhr"
    "xM4I+R8MEO8ETi+ev3ATqx7kyYi5o06y30llyAsGTIiWsuzwIv01JlaIvWGpQYYcaePuo/bq7vvYM7waUWv2GKh5NzqOPyy6uNa1z/4vshEzvpr3"
    "hUtI4/ZLPx+oC0Gt1SStaGDQzeXe3S2lgos6g8JrDlfFUhZbViVKJqqyDLCDHmY3zMXAcXF6WZ/rTnhfWwM3jkkLmnwf71dBq1DlqMRx1N71Z5E1"
    "GTi/cqcNlUO8Eed85sD/2Q=="
)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth noise of all scales, as natural images have it, uint8 (H, W, 3)."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(1, 8):
        waves = random.integers(0, 256, (2**octave + 1, 2**octave + 1, 3), dtype=np.uint8)
        total += 2.0 ** (-0.8 * octave) * np.asarray(Image.fromarray(waves).resize((width, height), Image.BICUBIC))
    total -= total.min()
    return (total / max(total.max(), 1e-9) * 255).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **options)
    return stream.getvalue()


def pillow_pixels(data: bytes) -> np.ndarray:
    """What a file shows, uint8 (H, W, 3): Pillow's convert("RGB"), the upper 8 bits of 16-bit gray."""
    with mock.patch.object(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 30):
        image = Image.open(io.BytesIO(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data))
        image.load()
    if image.mode.startswith("I"):
        return np.repeat((np.asarray(image) // 256).astype(np.uint8)[:, :, None], 3, axis=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        return np.asarray(image.convert("RGB"))


def png(width: int, height: int, bits: int, color_type: int, rows: bytes) -> bytes:
    """A PNG of given rows (each with its filter byte), whatever they hold."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_16_bit(channels: int, height: int, width: int) -> bytes:
    values = np.random.default_rng(0).integers(0, 65536, (height, width, channels), dtype=np.uint16).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)


def jpeg_claiming(data: bytes, height: int, width: int, frame: int = 0xC0) -> bytes:
    """A baseline JPEG with another size (and kind of coding) in its header."""
    start = data.index(b"\xff\xc0")
    return (
        data[: start + 1]
        + bytes([frame])
        + data[start + 2 : start + 5]
        + struct.pack(">HH", height, width)
        + data[start + 9 :]
    )


def ycck(cmyk: bytes) -> bytes:
    """A CMYK JPEG whose Adobe segment says YCCK."""
    transform = cmyk.index(b"Adobe") + 11
    return cmyk[:transform] + b"\x02" + cmyk[transform + 1 :]


def good_jpegs(height: int, width: int) -> dict[str, bytes]:
    image, other = Image.fromarray(photograph(height, width)), Image.fromarray(photograph(height, width, 1))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    cmyk = encode(image.convert("CMYK"), "JPEG")
    return {
        "420.jpg": encode(image, "JPEG", quality=90, subsampling="4:2:0"),
        "422.jpg": encode(image, "JPEG", quality=70, subsampling="4:2:2"),
        "444.jpg": encode(image, "JPEG", quality=95, subsampling="4:4:4"),
        "progressive.JPEG": encode(image, "JPEG", progressive=True),
        "gray.jpeg": encode(image.convert("L"), "JPEG"),
        "cmyk.JPG": cmyk,
        "ycck.jpg": ycck(cmyk),
        "exif.jpg": encode(image, "JPEG", exif=rotated),
        "thumbnail.jpg": encode(image, "JPEG", exif=b"Exif\x00\x00" + encode(photograph(16, 16), "JPEG")),
        "two pictures.jpg": encode(image, "MPO", save_all=True, append_images=[other]),
        "garbage behind.jpg": encode(image, "JPEG") + b"garbage" * 100,
        "video behind.jpg": encode(image, "JPEG") + np.random.default_rng(0).bytes(300_000).replace(b"\xff", b""),
        "zeros behind.jpg": encode(image, "JPEG") + bytes(2_000_000),
        "camera.jfif": encode(image, "JPEG"),
        "camera.jpe": encode(image, "JPEG"),
        "really a jpeg.png": encode(image, "JPEG"),
        "zipped.jpg": gzip.compress(encode(image, "JPEG")),
        "tab\tand\nnewline \\ .jpg": encode(image, "JPEG"),
        "grün 雪 🦆.jpg": encode(image, "JPEG"),
        os.fsdecode(b"not utf-8 \xff\xfe.jpg"): encode(image, "JPEG"),
    }


def long_text() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (3 << 20), zip=True)
    return text


def good_files(height: int, width: int) -> dict[str, bytes]:
    """{name: content} of usable files of every kind, all of one size."""
    image, other = Image.fromarray(photograph(height, width)), Image.fromarray(photograph(height, width, 1))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    alpha = image.copy()
    alpha.putalpha(image.convert("L"))
    palette = image.quantize(64)
    return good_jpegs(height, width) | {
        "rgb.png": encode(image, "PNG"),
        "gray.Png": encode(image.convert("L"), "PNG"),
        "gray alpha.png": encode(alpha.convert("LA"), "PNG"),
        "1 bit.png": encode(image.convert("1"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "palette transparent.png": encode(palette, "PNG", transparency=3),
        "palette alphas.png": encode(palette, "PNG", transparency=bytes(range(64))),
        "rgba.png": encode(alpha, "PNG"),
        "exif.png": encode(image, "PNG", exif=rotated),
        "gray 16.png": png_16_bit(1, height, width),
        "gray alpha 16.png": png_16_bit(2, height, width),
        "rgb 16.png": png_16_bit(3, height, width),
        "rgba 16.png": png_16_bit(4, height, width),
        "animated.png": encode(image, "PNG", save_all=True, append_images=[other]),
        "really a png.jpg": encode(image, "PNG"),
        "lossy.webp": encode(image, "WEBP", quality=80),
        "lossless alpha.webp": encode(alpha, "WEBP", lossless=True),
        "animated.webp": encode(image, "WEBP", save_all=True, append_images=[other]),
        "rgb.bmp": encode(image, "BMP"),
        "wrong size.bmp": b"BM" + struct.pack("<I", 10**6) + encode(image, "BMP")[6:],
        "trailer.png": encode(image, "PNG") + bytes(100_000),
        "profile.png": encode(image, "PNG", icc_profile=bytes(3 << 20)),
        "text.png": encode(image, "PNG", pnginfo=long_text()),
        "first of two.gif": encode(palette, "GIF", save_all=True, append_images=[other]),
        "really a gif.jpg": encode(palette, "GIF"),
        "plain.tif": encode(image, "TIFF"),
        "deflated.TIFF": encode(image, "TIFF", compression="tiff_adobe_deflate"),
        "first of two.tif": encode(image, "TIFF", save_all=True, append_images=[other]),
        "photo.avif": encode(image, "AVIF"),
        "photo.jp2": encode(image, "JPEG2000"),
        "palette.bmp": encode(palette, "BMP"),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """{name: (content, a part of the reason)} of files that a scan with max_pixels=1,000,000 refuses."""
    image = photograph(200, 300)
    files = {format: encode(image, format) for format in ("JPEG", "PNG", "WEBP", "BMP")}
    jpeg = files["JPEG"]
    thumbnail = encode(image, "JPEG", exif=b"Exif\x00\x00" + encode(photograph(16, 16), "JPEG"))
    black = Image.new("1", (12_000, 12_000))
    return {
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
        "noise.png": (bytes(range(256)), "unknown"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "last byte missing.jpg": (jpeg[:-1], "truncated"),
        "cut in the header.jpg": (jpeg[:100], "JPEG"),
        "only a mark.jpg": (jpeg[:4], "JPEG"),
        "zero tail.jpg": (jpeg[:-5000] + bytes(5000), "truncated"),
        "thumbnail complete.jpg": (thumbnail[:-500], "truncated"),
        "junk in front.jpg": (b"\0\0" + jpeg, "unknown"),
        "no height.jpg": (jpeg_claiming(jpeg, 0, 300), "broken JPEG header"),
        "absurd.jpg": (jpeg_claiming(jpeg, 65535, 65535), "65535 x 65535 pixels are more than data.max_pixels"),
        "cut.png": (files["PNG"][: len(files["PNG"]) // 2], "truncated"),
        "cut in the header.png": (files["PNG"][:20], "PNG"),
        "cut.webp": (files["WEBP"][:-100], "truncated"),
        "cut.tif": (encode(image, "TIFF", compression="tiff_adobe_deflate")[:20_000], "TIFF"),
        "cut.jp2": (encode(image, "JPEG2000")[:-100], "truncated"),
        "cut.bmp": (files["BMP"][:-100], "truncated"),
        "no size and cut.bmp": (files["BMP"][:2] + bytes(4) + files["BMP"][6:-1000], "truncated"),
        "taller.bmp": (files["BMP"][:22] + struct.pack("<i", 600) + files["BMP"][26:], "truncated"),
        "zipped cut.jpg": (gzip.compress(jpeg)[:-50], "gzip"),
        "zipped twice.jpg": (gzip.compress(gzip.compress(jpeg)), "unknown"),
        "zipped page.jpg": (gzip.compress(b"<html>"), "HTML"),
        "absurd.png": (png(2**31 - 1, 2**31 - 1, 8, 2, b""), "data.max_pixels"),
        "large.png": (png(1001, 1000, 8, 2, b""), "1001 x 1000 pixels are more than data.max_pixels=1000000"),
        "black.png": (encode(black, "PNG"), "12000 x 12000 pixels are more than data.max_pixels"),
        "strange\t\n.jpg": (b"", "empty"),
    }


def undecodable_files() -> dict[str, bytes]:
    """Files with a proper header and end whose inside is damaged: only decoding finds out."""
    image = photograph(60, 80)
    jpeg, smooth = encode(image, "JPEG", quality=90), encode(image, "WEBP")
    pixels, middle = encode(image, "PNG"), len(jpeg) // 2
    return {
        "cut.gif": encode(Image.fromarray(image).quantize(64), "GIF")[:-100],
        "garbled.png": garble(pixels, 5),
        "garbled.webp": smooth[:60] + b"\xff" * (len(smooth) - 60),
        "garbled.jpg": garble(jpeg, 60),
        "lossless coding.jpg": jpeg_claiming(jpeg, 60, 80, frame=0xC3),
        "ended early.jpg": jpeg[:middle] + b"\xff\xd9",
        "taller.jpg": jpeg_claiming(jpeg, 600, 80),
        "zeros inside.jpg": jpeg[:middle] + bytes(500) + jpeg[middle + 500 :],
    }


def garble(data: bytes, count: int) -> bytes:
    """Change some bytes between 30 and 90 % of a file."""
    random, damaged = np.random.default_rng(0), bytearray(data)
    for place in random.integers(int(0.3 * len(data)), int(0.9 * len(data)), count):
        damaged[place] ^= int(random.integers(1, 256))
    return bytes(damaged)
