"""Losses of REPA, SiT and DiT on their tiny networks, and EDM's by its formula."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from diffrep import load_backbone
from diffrep.config import DDPMConfig, EDMConfig, FlowConfig
from diffrep.noise import DiscreteSchedule, FlowSchedule, SigmaSchedule
from diffrep.train.order import StepRandom
from diffrep.train.prediction import build_loss

TOLERANCE = {"atol": 2e-5, "rtol": 0}
# Weights go up to a few hundred, and the published ones are computed in fp32.
WEIGHTED = {"atol": 2e-5, "rtol": 2e-6}
PATHS = {"Linear": "linear", "GVP": "cosine", "VP": "vp"}
PREDICTIONS = {"velocity": "velocity", "noise": "epsilon", "score": "score"}
WEIGHTS = {"None": "none", "velocity": "velocity", "likelihood": "likelihood"}
TRANSPORT = [
    f"{path}/{prediction}/{weight}"
    for path in PATHS
    for prediction in PREDICTIONS
    for weight in (WEIGHTS if prediction != "velocity" else ["None"])
]


class Recorded(StepRandom):
    """Gives the numbers that the published code drew."""

    def __init__(self, uniform=None, normal=None):
        super().__init__(0, 0)
        self.numbers = {"uniform": uniform, "normal": normal}

    def uniform(self, *shape):
        return self.numbers["uniform"].double().numpy().reshape(shape)

    def normal(self, *shape):
        return self.numbers["normal"].double().numpy().reshape(shape)


def opened(golden, family):
    weights, config = {"repa": ("repa_sit_tiny", "repa_sit_tiny")}.get(family, ("dit_tiny", f"{family}_tiny"))
    config = json.loads((golden / "dit" / f"{config}.json").read_text())["config"]
    return load_backbone(golden / "dit" / f"{weights}.safetensors", family=family, config=config, device="cpu")


# REPA


@pytest.fixture(scope="module")
def repa(golden):
    return load_file(golden / "repa" / "losses.safetensors")


@pytest.fixture(scope="module")
def repa_backbone(golden):
    return opened(golden, "repa")


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("density", "published"), [("uniform", "uniform"), ("logit-normal", "lognormal")])
def test_losses_of_repa(repa, repa_backbone, path, density, published):
    expected = {name: repa[f"{path}.{published}.{name}"] for name in ("time", "xt", "target", "denoising_loss")}
    loss = build_loss(FlowConfig(path=path, density=density), repa_backbone.schedule)
    mixture = loss.draw(4, Recorded(repa["time_uniform"], repa["rnd_normal"]))
    torch.testing.assert_close(mixture.time, expected["time"].flatten(), atol=2e-7, rtol=0)
    clean, eps = repa["images"], repa["noise"]
    x = loss.noised(mixture, clean, eps)
    torch.testing.assert_close(x, expected["xt"], atol=2e-6, rtol=0)
    torch.testing.assert_close(
        loss.losses(mixture, clean, eps, expected["target"]), torch.zeros(4), atol=1e-10, rtol=0
    )
    losses = loss.losses(mixture, clean, eps, repa_backbone.denoise(x, mixture.time, cond=repa["labels"]))
    torch.testing.assert_close(losses, expected["denoising_loss"], **TOLERANCE)


# SiT


@pytest.fixture(scope="module")
def sit(golden):
    return load_file(golden / "dit" / "sit_tiny_io.safetensors")


@pytest.fixture(scope="module")
def sit_losses(golden):
    return json.loads((golden / "repa" / "sit_losses.json").read_text())


@pytest.fixture(scope="module")
def sit_backbone(golden):
    return opened(golden, "sit")


def test_all_losses_of_sit_are_looked_at(sit_losses):
    assert {*sit_losses} == {*TRANSPORT}


@pytest.mark.parametrize("name", TRANSPORT)
def test_losses_of_sit(sit, sit_losses, sit_backbone, name):
    path, prediction, weight = name.split("/")
    expected = sit_losses[name]
    config = FlowConfig(path=PATHS[path], prediction=PREDICTIONS[prediction], weighting=WEIGHTS[weight])
    loss = build_loss(config, sit_backbone.schedule)
    mixture = loss.draw(3, Recorded(sit["loss_u"]))
    published = sit["loss_u"] * (expected["t1"] - expected["t0"]) + expected["t0"]
    torch.testing.assert_close(mixture.time, published, atol=2e-7, rtol=0)
    clean, eps = sit["loss_x1"], sit["loss_x0"]
    output = sit_backbone.denoise(loss.noised(mixture, clean, eps), mixture.time, cond=sit["loss_y"])
    losses = loss.losses(mixture, clean, eps, output)
    torch.testing.assert_close(losses, torch.tensor(expected["loss"]), **WEIGHTED)


@pytest.mark.parametrize("path", PATHS)
def test_velocities_of_sit(sit, sit_backbone, path):
    loss = build_loss(FlowConfig(path=PATHS[path]), sit_backbone.schedule)
    mixture, clean, eps = loss.draw(3, Recorded(sit["loss_u"])), sit["loss_x1"], sit["loss_x0"]
    torch.testing.assert_close(loss.noised(mixture, clean, eps), sit[f"plan.{path}.xt"], atol=2e-6, rtol=2e-6)
    losses = loss.losses(mixture, clean, eps, sit[f"plan.{path}.ut"])
    torch.testing.assert_close(losses, torch.zeros(3), atol=1e-10, rtol=0)


# DiT


@pytest.mark.parametrize(
    "schedule", [DiscreteSchedule.linear(), DiscreteSchedule.from_diffusers(DDPMScheduler())], ids=["own", "diffusers"]
)
def test_losses_of_dit(golden, schedule):
    io = load_file(golden / "dit" / "dit_tiny_io.safetensors")
    clean, eps = io["loss_x0"], io["loss_noise"]
    backbone = opened(golden, "dit")
    loss = build_loss(DDPMConfig(), schedule)
    mixture = loss.at(io["loss_t"].numpy())
    x = loss.noised(mixture, clean, eps)
    torch.testing.assert_close(x, io["loss_xt"], atol=5e-6, rtol=0)
    output = backbone.denoise(x, mixture.time, cond=io["loss_y"])
    assert output.shape[1] == 2 * clean.shape[1]
    without = build_loss(DDPMConfig(vlb_weight=0), schedule).losses(mixture, clean, eps, output)
    torch.testing.assert_close(without, io["loss_mse"], **TOLERANCE)
    losses = loss.losses(mixture, clean, eps, output)
    torch.testing.assert_close(losses - without, io["loss_vb"], **TOLERANCE)
    torch.testing.assert_close(losses, io["loss"], **TOLERANCE)


def test_times_of_ddpm_that_low_density_gives():
    u = torch.tensor([0.0, 0.0316, 0.5, 0.9999])
    for density, expected in (("uniform", [0, 31, 500, 999]), ("low", [0, 0, 250, 999])):
        loss = build_loss(DDPMConfig(density=density), DiscreteSchedule.linear())
        assert loss.draw(4, Recorded(u)).time.tolist() == expected


# EDM


def test_loss_of_edm_is_its_formula():
    """Karras et al. (2022), table 1 and equation 2, written out; P_mean = -1.2, P_std = 1.2, sigma_data = 0.5."""
    generator = torch.Generator().manual_seed(0)
    clean, eps, denoised = torch.randn(3, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    normal = torch.tensor([-2.5, 0.1, 2.0])
    loss = build_loss(EDMConfig(), SigmaSchedule())
    mixture = loss.draw(3, Recorded(normal=normal))
    sigma = np.exp(normal.double().numpy() * 1.2 - 1.2)
    torch.testing.assert_close(mixture.time.double(), torch.from_numpy(sigma), atol=0, rtol=1e-7)
    x = loss.noised(mixture, clean.float(), eps.float())
    losses = loss.losses(mixture, clean.float(), eps.float(), denoised.float())
    for i in range(3):
        torch.testing.assert_close(x[i].double(), clean[i] + sigma[i] * eps[i], **TOLERANCE)
        weight = (sigma[i] ** 2 + 0.5**2) / (sigma[i] * 0.5) ** 2
        expected = weight * ((denoised[i] - clean[i]) ** 2).mean()
        torch.testing.assert_close(losses[i].double(), expected, atol=0, rtol=1e-6)


def test_flows_of_the_other_direction_and_of_longer_time_learn_the_same(sit, sit_losses, sit_backbone):
    """SiT's published losses, through a network whose time runs from the data in thousands."""
    expected = sit_losses["GVP/velocity/None"]
    loss = build_loss(FlowConfig(path="cosine"), FlowSchedule(data_time=0, scale=1000.0))
    mixture = loss.at(1000 * (1 - sit["loss_u"].double().numpy()))
    clean, eps = sit["loss_x1"], sit["loss_x0"]
    output = -sit_backbone.denoise(loss.noised(mixture, clean, eps), 1 - mixture.time / 1000, cond=sit["loss_y"])
    losses = loss.losses(mixture, clean, eps, output)
    torch.testing.assert_close(losses, torch.tensor(expected["loss"]), **TOLERANCE)
