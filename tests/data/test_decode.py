import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cae_fast.data
from cae_fast.data import decode
from cae_fast.data.decode import DecodeError, decode_rgb, resize, resize_and_center_crop, resized_crop
from data_files import good_files, pillow_pixels, png

BUNDLED = sorted((Path(cae_fast.data.__file__).parent / "bundled" / "photographs").glob("*.jpg"))
PIL_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@pytest.mark.parametrize("decoder", ["cpu", "pil"])
def test_pixels_equal_pillow(decoder):
    for kind, data in good_files(120, 91).items():
        pixels = decode_rgb(data, decoder=decoder)
        assert pixels.shape == (120, 91, 3), kind
        assert pixels.dtype == np.uint8, kind
        assert np.array_equal(pixels, pillow_pixels(data)), kind
        assert np.array_equal(decode_rgb(data, (120, 91), decoder), pixels), kind
        if "zipped" not in kind:
            assert np.array_equal(decode_rgb(gzip.compress(data), decoder=decoder), pixels), kind


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_photographs_equal_pillow(path):
    data = path.read_bytes()
    assert np.array_equal(decode_rgb(data), pillow_pixels(data))


def test_16_bit_gray_keeps_its_upper_8_bits(encode):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode_rgb(encode(Image.fromarray(values), "PNG"))
    assert np.array_equal(pixels, np.repeat((values // 256)[:, :, None], 3, axis=2))


def test_one_pixel(encode):
    for format in ("PNG", "BMP"):
        data = encode(np.array([[[9, 8, 7]]], np.uint8), format)
        assert decode_rgb(data).tolist() == [[[9, 8, 7]]]


def test_truncated_files_fail_wherever_they_are_cut():
    for kind, data in good_files(120, 91).items():
        if "behind" in kind or "two" in kind or "animated" in kind or kind == "trailer.png":
            continue  # the first picture ends before the file
        for share in (0.02, 0.3, 0.6, 0.97):
            cut = data[: int(share * len(data))]
            with pytest.raises(DecodeError):
                decode_rgb(cut)
            with pytest.raises(DecodeError):
                decode_rgb(gzip.compress(cut))


def test_truncated_jpeg_with_a_zero_tail_fails(photograph, encode):
    for options in ({}, {"progressive": True}):
        data = encode(photograph(200, 300), "JPEG", quality=90, **options)
        for share in (0.3, 0.9, 0.99):
            kept = int(share * len(data))
            with pytest.raises(DecodeError):
                decode_rgb(data[:kept] + bytes(len(data) - kept))


def test_jpeg_with_a_gap_fails(photograph, encode):
    # Pillow fills what is missing with gray in silence when an end mark follows.
    data = encode(photograph(200, 300), "JPEG", quality=90)
    ended = data[: len(data) // 2] + b"\xff\xd9"
    assert pillow_pixels(ended).shape == (200, 300, 3)
    with pytest.raises(DecodeError, match="truncated"):
        decode_rgb(ended)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"<html>no image</html>",
        b"\x1f\x8b",
        b"\x89PNG\r\n\x1a\n",
        b"BM",
        bytes(5000),
    ],
    ids=repr,
)
def test_no_image_at_all(data):
    with pytest.raises(DecodeError):
        decode_rgb(data)


def test_other_formats_are_refused(photograph, encode):
    for format in ("PPM", "ICO", "TGA"):
        with pytest.raises(DecodeError):
            decode_rgb(encode(photograph(20, 20), format))
    with pytest.raises(DecodeError, match="floating-point"):
        decode_rgb(encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_gray_samples_of_any_depth_keep_their_upper_8_bits(bits):
    values = np.linspace(0, 2**bits - 1, 300).astype(np.uint16).reshape(10, 30)
    expected = (values.astype(int) * 256 // 2**bits).astype(np.uint8)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    for decoder in ("cpu", "pil"):
        assert np.array_equal(decode_rgb(png(30, 10, 16, 0, rows), decoder=decoder)[:, :, 1], expected)


def test_a_bomb_is_not_unpacked():
    with pytest.raises(DecodeError, match="unpacks to more than 64 MiB"):
        decode_rgb(gzip.compress(bytes(65 << 20)))


def test_damaged_gzip(photograph, encode):
    data = gzip.compress(encode(photograph(20, 20), "PNG"))
    with pytest.raises(DecodeError, match="gzip"):
        decode_rgb(data[:-20])
    with pytest.raises(DecodeError, match="gzip"):
        decode_rgb(data[:30] + b"\xff" * 40 + data[70:])


def test_another_size_is_refused_before_decoding(photograph, encode):
    for format in ("JPEG", "PNG", "WEBP", "BMP"):
        with pytest.raises(DecodeError, match=r"is 20 x 30 pixels .*expected 30 x 20"):
            decode_rgb(encode(photograph(20, 30), format), (30, 20))


def pil_resized(image, height, width, filter):
    """Pillow's resize of uint8 (H, W, 3), rows first (the order of Pillow 13 depends on the shape), as integers."""
    rows = Image.fromarray(image).resize((width, image.shape[0]), PIL_FILTERS[filter])
    return np.asarray(rows.resize((width, height), PIL_FILTERS[filter])).astype(int)


def worst_mean_difference(image, boxes, size, filter):
    """Largest mean absolute difference of resized_crop from Pillow's crop and resize, in gray levels."""
    differences = []
    for top, left, height, width in boxes:
        expected = pil_resized(image[top : top + height, left : left + width], size, size, filter)
        ours = resized_crop(image, (top, left, height, width), False, size, filter)
        assert ours.shape == (3, size, size)
        assert ours.dtype == torch.uint8
        differences.append(np.abs(ours.permute(1, 2, 0).numpy() - expected).mean())
    return max(differences)


def random_boxes(height, width, count, seed):
    random = np.random.default_rng(seed)
    for _ in range(count):
        h, w = random.integers(8, height + 1), random.integers(8, width + 1)
        yield random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w


@pytest.mark.parametrize(("size", "filter"), [(224, "bicubic"), (112, "lanczos"), (28, "bicubic"), (448, "lanczos")])
def test_resized_crop_is_pillows(photograph, size, filter):
    images = [photograph(375, 500), *(decode_rgb(path.read_bytes()) for path in BUNDLED[:3])]
    for seed, image in enumerate(images):
        boxes = [(0, 0, *image.shape[:2]), *random_boxes(*image.shape[:2], 6, seed)]
        assert worst_mean_difference(image, boxes, size, filter) < 0.05


def test_one_call_of_pillow_gives_nearly_the_same(photograph):
    image = photograph(375, 500)
    for top, left, height, width in [(0, 0, 375, 500), *random_boxes(375, 500, 10, 1)]:
        crop = Image.fromarray(image).crop((left, top, left + width, top + height))
        for size, filter in ((224, "bicubic"), (112, "lanczos")):
            expected = np.asarray(crop.resize((size, size), PIL_FILTERS[filter])).astype(int)
            ours = resized_crop(image, (top, left, height, width), False, size, filter).permute(1, 2, 0).numpy()
            assert np.abs(ours - expected).mean() < 0.3
            assert np.abs(ours - expected).max() <= 2


def test_the_pil_decoder_is_one_call_of_pillow(photograph):
    image = photograph(375, 500)
    for top, left, height, width in random_boxes(375, 500, 6, 2):
        crop = Image.fromarray(image).crop((left, top, left + width, top + height))
        for size, filter in ((224, "bicubic"), (112, "lanczos")):
            expected = crop.resize((size, size), PIL_FILTERS[filter]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            view = resized_crop(image, (top, left, height, width), True, size, filter, "pil")
            assert np.array_equal(view.permute(1, 2, 0), expected)


def test_lanczos_without_torch_is_pillows(photograph, monkeypatch):
    image = photograph(200, 300)
    monkeypatch.setattr(decode, "TORCH_HAS_LANCZOS", False)
    assert worst_mean_difference(image, random_boxes(200, 300, 6, 0), 112, "lanczos") == 0


def test_flip_mirrors_the_view(photograph):
    image = photograph(100, 140)
    for filter in PIL_FILTERS:
        straight = resized_crop(image, (10, 20, 60, 80), False, 48, filter)
        mirrored = resized_crop(image, (10, 20, 60, 80), True, 48, filter)
        assert not torch.equal(straight, mirrored)
        assert torch.equal(mirrored.flip(-1), straight)


def test_same_size_is_the_identity(photograph):
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    for filter in PIL_FILTERS:
        assert np.array_equal(resize(image, 28, 28, filter).permute(1, 2, 0), image)
    assert np.array_equal(resize_and_center_crop(image, 28).permute(1, 2, 0), image)


def test_unknown_filter(photograph):
    with pytest.raises(ValueError, match="restricted to"):
        resize(photograph(10, 10), 5, 5, "nonsense")


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (64, 64), (40, 90), (333, 500)])
@pytest.mark.parametrize("crop_pct", [1.0, 224 / 256])
def test_center_crop_is_pillows(photograph, height, width, crop_pct):
    # torchvision's Resize(int(96 / crop_pct), BICUBIC) and CenterCrop(96), by their definition.
    image = photograph(height, width)
    short, side = min(height, width), int(96 / crop_pct)
    new_height, new_width = int(side * height / short), int(side * width / short)
    top, left = round((new_height - 96) / 2), round((new_width - 96) / 2)
    expected = pil_resized(image, new_height, new_width, "bicubic")[top : top + 96, left : left + 96]
    ours = resize_and_center_crop(image, 96, crop_pct).permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).mean() < 0.05


@pytest.mark.parametrize("shape", [(1, 20_000, 3), (20_000, 2, 3), (1, 1, 3)])
def test_center_crop_of_a_strip_stays_small(shape):
    assert resize_and_center_crop(np.full(shape, 77, np.uint8), 64).unique().tolist() == [77]
