import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image


def _photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth noise of all scales, as natural images have it, uint8 (H, W, 3)."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(1, 8):
        waves = random.integers(0, 256, (2**octave + 1, 2**octave + 1, 3), dtype=np.uint8)
        total += 2.0 ** (-0.8 * octave) * np.asarray(Image.fromarray(waves).resize((width, height), Image.BICUBIC))
    total -= total.min()
    return (total / max(total.max(), 1e-9) * 255).astype(np.uint8)


def _encode(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture(scope="session")
def photograph() -> Callable[..., np.ndarray]:
    return _photograph


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return _encode
