"""DIFT and one-step Hyperfeatures, number for number, through `capture` and through `extract`."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffrep import FeatureRequest, load_backbone

ATOL = 3e-5
UPS = [f"up_blocks.{i}" for i in range(4)]
CONV2 = [f"up_blocks.{i}.resnets.{j}.conv2" for i in range(4) for j in range(3)]


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "correspondence"


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_backbone(folder, device="cpu")


@pytest.fixture(scope="module")
def dift(folder):
    return load_file(folder / "dift.safetensors")


@pytest.fixture(scope="module")
def inputs(folder):
    return load_file(folder / "inputs.safetensors")


@pytest.fixture(scope="module")
def stored(folder, dift, stored_posterior):
    def load(size):
        codec = stored_posterior(dift[f"{size}.vae_mean"], dift[f"{size}.vae_logvar"])
        height, width = (side * 8 for side in dift[f"{size}.vae_mean"].shape[-2:])
        return load_backbone(folder, codec=codec, device="cpu"), torch.zeros(2, 3, height, width)

    return load


@pytest.mark.parametrize("size", ["sq", "ns"])
@pytest.mark.parametrize("t", [1, 101, 261])
def test_dift_through_capture(pipeline, dift, inputs, size, t):
    found = pipeline.capture(dift[f"{size}.noisy.t{t}"], t, UPS, cond=inputs["encoder_hidden_states"])
    for i, name in enumerate(UPS):
        torch.testing.assert_close(found[name], dift[f"{size}.up_ft{i}.t{t}"], atol=ATOL, rtol=0)


@pytest.mark.parametrize(("size", "suffix"), [("sq", ""), ("ns", "_h128w112")])
def test_dift_through_extract_with_its_own_noise(stored, dift, inputs, size, suffix):
    backbone, images = stored(size)
    noise = inputs[f"noise{suffix}"]
    noise = noise[:, :1] if noise.ndim == 5 else noise[:, None]
    request = FeatureRequest(UPS, [1, 101, 261], posterior="sample", dtype="float32")
    found = backbone.extract(
        images,
        request,
        cond=inputs["encoder_hidden_states"],
        noise=noise,
        posterior_noise=inputs[f"vae_eps{suffix}"][:, None],
    )
    for t in (1, 101, 261):
        for i, name in enumerate(UPS):
            torch.testing.assert_close(found[name, t], dift[f"{size}.up_ft{i}.t{t}"], atol=ATOL, rtol=0)


def test_dift_ensemble_of_four(stored, dift, inputs):
    backbone, images = stored("sq")
    request = FeatureRequest(UPS[1:3], [1, 261], draws=4, posterior="sample", dtype="float32")
    found = backbone.extract(
        images,
        request,
        cond=inputs["encoder_hidden_states"],
        noise=inputs["noise"],
        posterior_noise=inputs["vae_eps_ens"],
    )
    for image in range(2):
        for t in (1, 261):
            for i in (1, 2):
                expected = dift[f"featurizer.img{image}.t{t}.up_ft{i}.mean4"][0]
                torch.testing.assert_close(found[f"up_blocks.{i}", t][image], expected, atol=ATOL, rtol=0)


def test_hyperfeatures_one_step_is_conv2_at_clean_minus_one(folder, stored, pipeline, dift, inputs):
    expected = load_file(folder / "hyperfeatures_onestep.safetensors")
    cond = inputs["encoder_hidden_states"]
    captured = pipeline.capture(dift["sq.latents"], -1, CONV2, cond=cond)
    backbone, images = stored("sq")
    request = FeatureRequest(CONV2, "clean@-1", posterior="sample", dtype="float32")
    extracted = backbone.extract(images, request, cond=cond, posterior_noise=inputs["vae_eps"][:, None])
    for name in CONV2:
        _, i, _, j, _ = name.split(".")
        reference = expected[f"onestep.resnet.{i}.{j}.save0"]
        torch.testing.assert_close(captured[name], reference, atol=ATOL, rtol=0)
        torch.testing.assert_close(extracted[name, "clean@-1"], reference, atol=ATOL, rtol=0)


def test_vae_posterior(pipeline, folder, dift):
    images = torch.from_numpy(np.load(folder / "synthetic.npz")["images"]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        posterior = pipeline.codec.encode(images)
    torch.testing.assert_close(posterior.mean / 0.18215, dift["syn.vae_mean"], atol=ATOL, rtol=0)
    torch.testing.assert_close(posterior.std / 0.18215, (dift["syn.vae_logvar"] / 2).exp(), atol=ATOL, rtol=0)
