"""Noise schedules against the published implementations' numbers."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffrep.noise import DiscreteSchedule, FlowSchedule, SigmaSchedule, mix

SCHEDULES = {"adm_dit_linear": DiscreteSchedule.linear, "adm_cosine": DiscreteSchedule.cosine}


def sd_scaled_linear():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return DiscreteSchedule(tuple(np.cumprod(1 - betas).tolist()))


@pytest.fixture(scope="module")
def ddpm(golden):
    return np.load(golden / "schedules" / "ddpm_schedules.npz")


@pytest.fixture(scope="module")
def levels(golden):
    return json.loads((golden / "schedules" / "noise_level_map.json").read_text())


@pytest.fixture(scope="module")
def plans(golden):
    return load_file(golden / "dit" / "sit_tiny_io.safetensors")


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_signal_powers(ddpm, name):
    powers = getattr(DiscreteSchedule, name)().alphas_cumprod
    np.testing.assert_allclose(powers, ddpm[name], rtol=1e-12, atol=0)


def test_steps_are_the_respaced_timesteps(ddpm):
    """guided-diffusion's and DiT's `timestep_respacing="250"`."""
    assert DiscreteSchedule.linear().steps(250) == ddpm["respaced_250"].tolist()
    assert DiscreteSchedule.linear().steps(1000) == list(range(1000))


@pytest.mark.parametrize("name", [*SCHEDULES, "sd_scaled_linear"])
def test_one_sigma_in_every_native_time(levels, name):
    schedule = SCHEDULES.get(name, sd_scaled_linear)()
    linear, cosine, edm = FlowSchedule("linear"), FlowSchedule("cosine"), SigmaSchedule()
    expected = levels[name]
    for i, t in enumerate(levels["t"]):
        level = schedule.at(t)
        assert level.sigma == pytest.approx(expected["sigma"][i], rel=1e-9)
        assert level.signal == pytest.approx(expected["alpha"][i], rel=1e-9)
        assert linear.at_sigma(level.sigma).time == pytest.approx(expected["flow_time_repa"][i], abs=1e-9)
        assert cosine.at_sigma(level.sigma).time == pytest.approx(expected["cosine_time_repa"][i], abs=1e-9)
        sit = FlowSchedule("linear", data_time=1)
        assert sit.at_sigma(level.sigma).time == pytest.approx(1 - expected["flow_time_repa"][i], abs=1e-9)
        assert math.log(edm.at_sigma(level.sigma).time) / 4 == pytest.approx(expected["edm_c_noise"][i], abs=1e-9)
        assert schedule.at_sigma(level.sigma).time == t


@pytest.mark.parametrize(
    ("plan", "path", "last"),
    [("Linear", "linear", 1), ("GVP", "cosine", 1), ("VP", "vp", 0.99999)],  # training on VP stops short of the data
)
def test_mixtures_of_sit(plans, plan, path, last):
    schedule = FlowSchedule(path, data_time=1)
    levels = [schedule.at(last * u) for u in plans["loss_u"].tolist()]
    signal, noise = (torch.tensor([getattr(level, part) for level in levels]) for part in ("signal", "noise"))
    mixed = mix(plans["loss_x1"], plans["loss_x0"], signal, noise)
    torch.testing.assert_close(mixed, plans[f"plan.{plan}.xt"], atol=1e-6, rtol=1e-6)


def test_steps_of_edm():
    """Levels that DDAE reads; it counts from the final zero of the sampler, which is no level, so its 4 is our 3."""
    schedule = SigmaSchedule(sigma_min=0.002, sigma_max=80)
    steps = schedule.steps(18)
    assert steps[2:5] == pytest.approx([0.0229, 0.0599, 0.1395], abs=5e-5)
    assert (steps[0], steps[-1]) == pytest.approx((0.002, 80))
    assert schedule.level("step 3/18").time == pytest.approx(steps[3], rel=1e-8)
