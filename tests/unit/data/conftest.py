import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffrep.config import DataConfig
from diffrep.data import open_data


@pytest.fixture
def open_set():
    """Opens a path with options of DataConfig."""
    return lambda path, channels=1, **options: open_data(DataConfig(path=path, **options), channels)


@pytest.fixture
def png():
    """Gives the bytes of a 4x4 PNG of one brightness, so that a test can tell the images apart."""

    def pack(value, kind="PNG"):
        packed = io.BytesIO()
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(packed, kind)
        return packed.getvalue()

    return pack


@pytest.fixture
def write(png):
    """Writes a shard: members by name, an int standing for an image of that brightness."""

    def write(path, members):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                content = png(content) if isinstance(content, int) else content
                content = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return write
