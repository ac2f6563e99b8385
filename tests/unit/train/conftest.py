import pytest
import timm
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A file of weights of a tiny encoder."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), file)
    return {"source": file, "model": "test_efficientnet", "size": 64}
