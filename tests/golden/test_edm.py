"""EDM's networks and preconditionings against the published implementation's numbers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffrep.backbones.edm import PRECONDITIONINGS, edm_arguments
from diffrep.backbones.edm_layers import EDMBlock

TOLERANCE = {"atol": 2e-5, "rtol": 0}
NAMES = {"vp": "VPPrecond", "ve": "VEPrecond", "iddpm": "iDDPMPrecond", "edm": "EDMPrecond"}


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "edm"


@pytest.fixture(scope="module")
def expected(folder):
    return json.loads((folder / "edm_ddpmpp.json").read_text())


@pytest.fixture(scope="module")
def io(folder):
    return load_file(folder / "edm_ddpmpp_io.safetensors")


@pytest.fixture(scope="module")
def network(folder, expected):
    factory, arguments, precond = edm_arguments(expected["config"])
    assert precond == "edm"
    network = factory(**arguments).requires_grad_(False).eval()
    state = load_file(folder / "edm_ddpmpp.safetensors")
    network.load_state_dict({key.removeprefix("model."): value for key, value in state.items()}, strict=True)
    return network


def test_parameter_count(network, expected):
    assert sum(parameter.numel() for parameter in network.parameters()) == expected["params"]


def test_every_block_in_order(network, expected, io):
    found = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: found.setdefault(name, out))
        for name, module in network.named_modules()
        if name == "map_noise" or name in expected["order"]
    ]
    output = network(io["c_in"] * io["x"], io["c_noise"], io["class_labels"])
    for handle in handles:
        handle.remove()
    # The outputs were not copied by the hooks: nothing later in the pass may have edited them.
    assert list(found) == ["map_noise", *expected["order"]]
    for name in found:
        torch.testing.assert_close(found[name], io[name], **TOLERANCE)
    torch.testing.assert_close(output, io["F_x"], **TOLERANCE)


def test_coefficients_and_denoised_image(network, io):
    precond = PRECONDITIONINGS["edm"]
    for name in ("c_in", "c_skip", "c_out", "c_noise"):
        torch.testing.assert_close(getattr(precond, name)(io["sigma"]), io[name].flatten(), atol=0, rtol=1e-6)
    denoised = precond.denoised(network, io["x"], io["sigma"], io["class_labels"])
    torch.testing.assert_close(denoised, io["out"], **TOLERANCE)


def test_block_with_two_heads(folder):
    tensors = load_file(folder / "edm_unetblock_heads2.safetensors")
    block = EDMBlock(32, 32, emb_channels=16, attention=True, num_heads=2)
    state = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    block.load_state_dict(state, strict=True)
    torch.testing.assert_close(block(tensors["x"], tensors["emb"]), tensors["out"], **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_preconditioning_table(folder, name):
    table = json.loads((folder / "edm_precond_table.json").read_text())
    expected, precond = table[NAMES[name]], PRECONDITIONINGS[name]
    sigma = torch.tensor(table["sigma"])
    for coefficient in ("c_in", "c_noise", "round_sigma"):
        found = getattr(precond, coefficient)(sigma)
        torch.testing.assert_close(found, torch.tensor(expected[coefficient]), atol=0, rtol=1e-6)
    assert precond.sigma_min == pytest.approx(expected["sigma_min"], rel=1e-6)
    assert precond.sigma_max == pytest.approx(expected["sigma_max"], rel=1e-6)


def test_iddpm_levels(folder):
    levels = torch.from_numpy(np.load(folder / "edm_iddpm_u.npz")["u"])
    torch.testing.assert_close(PRECONDITIONINGS["iddpm"].levels, levels, atol=0, rtol=1e-5)
