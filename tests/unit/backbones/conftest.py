"""Official checkpoints at tiny size: configs, random weights, files."""

import pytest
import torch
from safetensors.torch import save_file

from diffrep import load_backbone
from diffrep.backbones.opening import OFFICIAL
from diffrep.testing import TINY_OFFICIAL

CONFIGS = TINY_OFFICIAL | {"dit": TINY_OFFICIAL["sit"], "repa": TINY_OFFICIAL["repa"] | {"z_dims": [6, 5]}}


@pytest.fixture(scope="session")
def configs():
    """Family -> arguments of the published constructor."""
    return CONFIGS


@pytest.fixture(scope="session")
def random_state():
    """Makes a published state dict of random weights, no layer of it zero."""

    def make(family, config=None):
        network = OFFICIAL[family].build(config or CONFIGS[family], None)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in network.named_parameters():
            if name != "pos_embed":
                scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
                parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        prefix = "model." if family == "edm" else ""
        return {prefix + key: value.detach().clone() for key, value in network.state_dict().items()}

    return make


@pytest.fixture(scope="session")
def states(random_state):
    return {family: random_state(family) for family in CONFIGS}


@pytest.fixture(scope="session")
def files(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    for family, state in states.items():
        save_file(state, folder / f"{family}.safetensors")
    return {family: folder / f"{family}.safetensors" for family in states}


@pytest.fixture(scope="session")
def load():
    """Loads a file on the CPU, with its family's config where none is given."""

    def load(file, family, config=None, device="cpu", **options):
        config = CONFIGS[family] if config is None else config
        return load_backbone(file, family=family, config=config, device=device, **options)

    return load
