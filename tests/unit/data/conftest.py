import io

import numpy as np
import pytest
from PIL import Image

from diffrep.config import DataConfig
from diffrep.data import open_images


@pytest.fixture
def open_set():
    """Opens a path with options of DataConfig."""
    return lambda path, channels=1, **options: open_images(DataConfig(path=path, **options), channels)


@pytest.fixture
def png():
    """Gives the bytes of a 4x4 PNG of one brightness, so that a test can tell the images apart."""

    def pack(value, kind="PNG"):
        packed = io.BytesIO()
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(packed, kind)
        return packed.getvalue()

    return pack
