"""A labelled set of cluttered colour images: Fashion-MNIST garments, tinted, pasted on crops of photographs.

40 x 40 pixels, one garment of 32 to 40 pixels at a random place, drawn from its class folder in the bundled images;
backgrounds of the test images come from photographs that no training image shows. Everything is decided by the seed.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from cae_fast.data.bundled import bundled_path
from cae_fast.files import write_text

SIDE = 40
GARMENT_SIDES = (32, 41)
"""Smallest side of a garment in pixels, and one more than the largest."""
BACKGROUND_SIDES = (40, 81)
"""Side of the photograph's square, resized to SIDE, likewise."""
SHOWN_ABOVE = 8
"""Brightness above which a pixel belongs to the garment."""
TEST_PHOTOGRAPHS = ("chelsea", "coffee", "gravel", "rocket")
VERSION = 1


def make_cluttered_set(folder: Path, seed: int = 0) -> Path:
    """Write folder/train and folder/test with a folder of PNG files for each class, once. Returns `folder`."""
    if (folder / "complete.txt").exists() and (folder / "complete.txt").read_text() == f"{VERSION} {seed}":
        return folder

    # What is there is unfinished or of another version or seed.
    shutil.rmtree(folder, ignore_errors=True)
    photographs = sorted(bundled_path("photographs").glob("*.jpg"))
    for number, split in enumerate(("train", "test")):
        held_out = split == "test"
        chosen = [path for path in photographs if (path.stem in TEST_PHOTOGRAPHS) == held_out]
        pixels = [np.asarray(Image.open(path).convert("RGB")) for path in chosen]
        random = np.random.default_rng((seed, number))
        for path in sorted(bundled_path(f"fashion-mnist/{split}").glob("*/*.png")):
            out = folder / split / path.parent.name / path.name
            out.parent.mkdir(parents=True, exist_ok=True)
            background = pixels[random.integers(len(pixels))]
            Image.fromarray(compose(Image.open(path), background, random)).save(out)
    write_text(folder / "complete.txt", f"{VERSION} {seed}")
    return folder


def compose(garment: Image.Image, photograph: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One image, uint8 (SIDE, SIDE, 3), of a gray garment and a photograph (H, W, 3)."""
    height, width, _ = photograph.shape
    side = int(random.integers(BACKGROUND_SIDES[0], min(BACKGROUND_SIDES[1], height, width)))
    top, left = random.integers(height - side + 1), random.integers(width - side + 1)
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    image = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32).copy()

    size = int(random.integers(*GARMENT_SIDES))
    gray = np.asarray(garment.resize((size, size), Image.Resampling.BICUBIC), np.float32)[..., None]
    shown = np.asarray(garment.point(lambda value: 255 * (value > SHOWN_ABOVE)).resize((size, size))) > 127
    row, column = random.integers(SIDE - size + 1, size=2)
    tint = random.uniform(0.3, 1.0, 3).astype(np.float32)
    place = image[row : row + size, column : column + size]
    place[shown] = ((0.8 * gray + 40) * tint)[shown]
    return image.clip(0, 255).astype(np.uint8)
