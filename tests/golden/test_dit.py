"""DiT, SiT and REPA's SiT as users load them, against the published networks' numbers."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

from diffrep import load_backbone
from diffrep.backbones.convert import convert
from diffrep.backbones.dit_keys import from_diffusers, to_diffusers

TOLERANCE = {"atol": 2e-5, "rtol": 0}
# Family -> (weights, inputs and outputs).
FILES = {
    "dit": ("dit_tiny", "dit_tiny"),
    "sit": ("dit_tiny", "sit_tiny"),
    "repa": ("repa_sit_tiny", "repa_sit_tiny"),
}
NULL = 10


def config_of(golden, family):
    return json.loads((golden / "dit" / f"{FILES[family][1]}.json").read_text())["config"]


def weights_of(golden, family):
    return golden / "dit" / f"{FILES[family][0]}.safetensors"


def inputs_and_outputs(golden, family):
    return load_file(golden / "dit" / f"{FILES[family][1]}_io.safetensors")


def save_training_checkpoint(state, config, file):
    """What DiT's train.py writes: the average beside the running weights, with the optimiser and its arguments."""
    running = {key: torch.zeros_like(value) for key, value in state.items()}
    optimiser = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    arguments = argparse.Namespace(model="DiT-XL/2", num_classes=config["num_classes"], results_dir="results")
    torch.save({"model": running, "ema": state, "opt": optimiser, "args": arguments}, file)


@pytest.fixture(scope="module", params=FILES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def io(golden, family):
    return inputs_and_outputs(golden, family)


@pytest.fixture(scope="module", params=["safetensors", "pt"])
def backbone(request, golden, family, tmp_path_factory):
    file, config = weights_of(golden, family), config_of(golden, family)
    if request.param == "pt":
        state, file = load_file(file), tmp_path_factory.mktemp("checkpoint") / "0400000.pt"
        save_training_checkpoint(state, config, file)
    return load_backbone(file, family=family, config=config, device="cpu")


def test_every_module_that_was_recorded(backbone, io, family):
    modules = ("x_embedder", "t_embedder", "y_embedder", "final_layer")
    names = [name for name in io if name.startswith("blocks.") or name in modules]
    branches = ("", ".attn", ".mlp") if family == "dit" else ("",)  # branches come before their gate
    assert {*names} == {f"blocks.{i}{branch}" for i in range(4) for branch in branches} | {*modules}
    found = backbone.capture(io["x"], io["t"], names, cond=io["y"], tokens=True)
    for name in names:
        torch.testing.assert_close(found[name], io[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_output(backbone, io):
    torch.testing.assert_close(backbone.denoise(io["x"], io["t"], cond=io["y"]), io["out"], **TOLERANCE)


def test_no_condition_is_the_null_row(backbone, io):
    null = backbone.denoise(io["x"], io["t"])
    assert torch.equal(null, backbone.denoise(io["x"], io["t"], cond=torch.full((len(io["x"]),), NULL)))
    row = io["y"].tolist().index(NULL)
    torch.testing.assert_close(null[row], io["out"][row], **TOLERANCE)


def test_projections(golden):
    file, io = weights_of(golden, "repa"), inputs_and_outputs(golden, "repa")
    backbone = load_backbone(file, family="repa", config=config_of(golden, "repa"), device="cpu")
    tokens = backbone.capture(io["x"], io["t"], ["projectors.0"], cond=io["y"], tokens=True)["projectors.0"]
    torch.testing.assert_close(tokens, io["zs_0"], **TOLERANCE)
    maps = backbone.capture(io["x"], io["t"], ["projectors.0"], cond=io["y"])["projectors.0"]
    assert torch.equal(maps.flatten(2).transpose(1, 2), tokens)


def test_sizes_may_be_left_to_the_weights(golden):
    io = inputs_and_outputs(golden, "repa")
    config = {"hidden_size": 64, "depth": 4, "num_heads": 4, "encoder_depth": 2}
    backbone = load_backbone(weights_of(golden, "repa"), family="repa", config=config, device="cpu")
    torch.testing.assert_close(backbone.denoise(io["x"], io["t"], cond=io["y"]), io["out"], **TOLERANCE)


# diffusers' class


@pytest.fixture(scope="module")
def diffusers_folder(golden, tmp_path_factory):
    out = tmp_path_factory.mktemp("diffusers") / "dit"
    return convert(weights_of(golden, "dit"), out, family="dit", config=config_of(golden, "dit"), to="diffusers")


def test_a_folder_of_diffusers_gives_the_official_numbers(diffusers_folder, golden):
    io = inputs_and_outputs(golden, "dit")
    backbone = load_backbone(diffusers_folder, device="cpu")
    assert backbone.blocks() == [f"blocks.{i}" for i in range(4)]
    names = [name for name in io if name.startswith("blocks.")]
    found = backbone.capture(io["x"], io["t"], names, cond=io["y"], tokens=True)
    for name in names:
        torch.testing.assert_close(found[name], io[name], **TOLERANCE)
    torch.testing.assert_close(backbone.denoise(io["x"], io["t"], cond=io["y"]), io["out"], **TOLERANCE)


def test_the_stock_class_deviates_from_the_official_network(diffusers_folder, golden):
    """It spaces the frequencies of the time by 127 where the official network has 128: why folders are converted."""
    io = inputs_and_outputs(golden, "dit")
    stock = load_backbone(diffusers_folder, family="diffusers-dit", device="cpu")
    assert stock.blocks() == [f"transformer_blocks.{i}" for i in range(4)]
    deviation = (stock.denoise(io["x"], io["t"], cond=io["y"]) - io["out"]).abs().amax((1, 2, 3))
    assert deviation[0] < 1e-4  # at t = 0 all sinusoids agree
    assert 0.2 < deviation[1] < 1
    assert 0.2 < deviation[2] < 1


def test_there_and_back_is_the_identity(golden):
    state = load_file(weights_of(golden, "dit"))
    again = from_diffusers(to_diffusers(state), state["pos_embed"])
    assert {*again} == {*state}
    assert all(torch.equal(again[key], value) for key, value in state.items())
