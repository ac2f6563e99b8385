"""Diffusion Hyperfeatures over ten steps, number for number: inversion, generation, guided generation."""

import pytest
import torch
from safetensors.torch import load_file

from diffrep import FeatureRequest, load_backbone
from diffrep.noise import read_levels

ATOL, ATOL_LAST = 3e-5, 1.1e-4
# The first block's first, a middle and the last of the twelve layers.
LAYERS = {"0.0": "hf.0.0", "1.2": "hf.1.2", "3.2": "hf.3.2"}


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "correspondence"


@pytest.fixture(scope="module")
def inputs(folder):
    return load_file(folder / "inputs.safetensors")


@pytest.fixture(scope="module")
def expected(folder):
    return load_file(folder / "hyperfeatures_steps.safetensors")


@pytest.fixture(scope="module")
def dift(folder):
    return load_file(folder / "dift.safetensors")


@pytest.fixture(scope="module")
def backbone(folder, dift, stored_posterior):
    return load_backbone(folder, codec=stored_posterior(dift["sq.vae_mean"], dift["sq.vae_logvar"]), device="cpu")


def check(found, expected, run, specs, atol=ATOL):
    for save, spec in specs.items():
        for name, layer in LAYERS.items():
            reference = expected[f"{run}.resnet.{name}.save{save}"]
            torch.testing.assert_close(found[layer, spec], reference, atol=atol, rtol=0)


def test_inversion(backbone, inputs, expected):
    specs = {9: "hf.inversion 9/10", 6: "hf.inversion 6/10", 0: "hf.inversion 0/10"}
    request = FeatureRequest(
        tuple(LAYERS.values()), tuple(specs.values()), noise="inversion", posterior="sample", dtype="float32"
    )
    found = backbone.extract(
        torch.zeros(2, 3, 128, 128),
        request,
        cond=inputs["encoder_hidden_states"],
        posterior_noise=inputs["vae_eps"][:, None],
    )
    assert [level.time for level in found.levels.values()] == [-1, 200, 800]
    check(found, expected, "inv10", specs)


def test_the_last_estimate_of_an_inversion(backbone, inputs, expected, dift):
    (path,) = read_levels(backbone.schedule, ["hf.inversion 0/10"], "inversion")[1]
    x, clean = dift["sq.latents"], None
    for index, level in enumerate(path.levels):
        output = backbone.denoise(x, level.time, inputs["encoder_hidden_states"])
        x, clean = path.update(backbone.schedule, x, output, index)
    torch.testing.assert_close(clean, expected["inv10.x0_pred_last"], atol=ATOL_LAST, rtol=0)


@pytest.mark.parametrize(("run", "guidance", "saves"), [("gen10", 1.0, [0, 9]), ("gen10cfg", 7.5, [9])])
def test_generation(backbone, inputs, expected, run, guidance, saves):
    specs = {save: f"hf.generation {save}/10" for save in saves}
    request = FeatureRequest(
        tuple(LAYERS.values()), tuple(specs.values()), noise="generation", guidance=guidance, dtype="float32"
    )
    found = backbone.extract(
        None,
        request,
        cond=inputs["encoder_hidden_states"],
        uncond=inputs["encoder_hidden_states_uncond"] if guidance != 1 else None,
        noise=inputs["gen_latents"][:, None],
    )
    assert [level.time for level in found.levels.values()] == [900 - 100 * save for save in saves]
    check(found, expected, run, specs)
    torch.testing.assert_close(found.final[:, 0], expected[f"{run}.x0_pred_last"], atol=ATOL_LAST, rtol=0)
