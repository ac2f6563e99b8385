"""DifFeed against diffssl: second pass and scores of the 37-block network at t = 150."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffrep import load_backbone
from diffrep.heads.difformer import DifFormer
from diffrep.heads.feedback import FeedbackNetwork, default_pairs

T = 150


@pytest.fixture(scope="module")
def encoder(golden):
    return load_file(golden / "adm" / "diffssl_unet37.safetensors")


@pytest.fixture(scope="module")
def backbone(golden, encoder, tmp_path_factory):
    with safe_open(golden / "adm" / "diffssl_unet37.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    state = {key.removeprefix("sd."): value.float() for key, value in encoder.items() if key.startswith("sd.")}
    file = tmp_path_factory.mktemp("adm") / "unet37.pt"
    torch.save(state, file)
    return load_backbone(file, family="adm", config=config, device="cpu")


@pytest.fixture(scope="module")
def stored(golden):
    return load_file(golden / "diffeed" / "diffssl_diffeed.safetensors")


@pytest.fixture(scope="module")
def network(backbone, stored):
    head = DifFormer({"24": (32, 4, 4)}, [f"t={T}"], classes=5, pool=4, width=32, heads=4, depth=2, mlp_ratio=4)
    network = FeedbackNetwork(backbone, head, {"24": "gd.24"})
    published = {key: value for key, value in stored.items() if key.startswith(("feedback.", "head."))}
    network.load_state_dict(published, strict=True)
    return network.eval()


@pytest.fixture(scope="module")
def x_t(backbone, encoder):
    level = backbone.schedule.level(T)
    return torch.tensor(level.signal).float() * encoder["x0"] + torch.tensor(level.noise).float() * encoder["noise"]


def test_default_pairs_are_the_published_ones(backbone):
    blocks = backbone.blocks()
    published = [(blocks[b - 1], blocks[38 - b - 1]) for b in (21, 24, 27, 30, 33, 36)]
    assert default_pairs(backbone) == published


@torch.no_grad()
def test_second_pass_and_scores(network, x_t, stored):
    found = network.maps(x_t, T)
    torch.testing.assert_close(found["24"], stored["second_pass_b24"], atol=1e-4, rtol=0)
    torch.testing.assert_close(network({f"t={T}": (x_t, T)}), stored["logits"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_both_passes_end_early(network, backbone, x_t):
    with counted(backbone) as ran:
        network.maps(x_t, T)
    # Pass 1 goes on to block 36, the deepest source; pass 2 ends in block 24, which is read.
    assert ran["output_blocks.4"] == 2
    assert ran["output_blocks.16"] == 1
    assert "output_blocks.17" not in ran
    assert "out" not in ran


@contextmanager
def counted(backbone):
    ran, handles = {}, []
    for name in [*backbone.blocks(), "out"]:
        module = backbone.network.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(lambda *_, name=name: ran.update({name: ran.get(name, 0) + 1}))
        )
    yield ran
    for handle in handles:
        handle.remove()
