from pathlib import Path

import pytest
import torch

from diffrep.testing import save_images, save_tiny, tiny_backbone

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(without)


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session", params=["unet2d", "unet2d-condition", "dit"])
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def backbone(kind, tmp_path_factory):
    return tiny_backbone(kind, tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory):
    return save_tiny("unet2d", tmp_path_factory.mktemp("unet2d"))


@pytest.fixture(scope="session")
def unet(unet_folder):
    from diffrep import load_backbone

    return load_backbone(unet_folder, device="cpu")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def cond(kind):
    """A condition that the parametrised backbone accepts, for one image."""
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(3)) if kind == "unet2d-condition" else None
