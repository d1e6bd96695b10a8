from collections.abc import Callable

import numpy as np
import pytest

import data_files


@pytest.fixture(scope="session")
def photograph() -> Callable[..., np.ndarray]:
    return data_files.photograph


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return data_files.encode
