"""Each sampler against its published formulas: a plain loop over the raw outputs of a published network.

No sampler's output was stored; the setting is that of REPA's: 8 steps, guidance 1.8 in [0.1, 0.7], null class 10.
"""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from diffrep import Backbone, load_backbone
from diffrep.backbones.conditioning import ClassLabels
from diffrep.config import SamplerConfig
from diffrep.noise import FlowSchedule
from diffrep.train.sampler import generate

TOLERANCE = {"atol": 2e-5, "rtol": 0}
STEPS, SCALE, LOW, HIGH, NULL = 8, 1.8, 0.1, 0.7, 10
GUIDED = {"steps": STEPS, "guidance": SCALE, "interval": (LOW, HIGH)}
LABELS = torch.tensor([3, 7, 10])


def open_golden(golden, place, family):
    config = json.loads((golden / f"{place}.json").read_text())["config"]
    return load_backbone(golden / f"{place}.safetensors", family=family, config=config, device="cpu")


def unit_noise(channels, size, number):
    shape = (len(LABELS), channels, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).double()


def latents(number):
    return unit_noise(4, 8, number)


def noise_of(step, channels=4, size=8):
    return unit_noise(channels, size, 100 + step)


def compare(backbone, expected, start, noise=noise_of, cond=LABELS, **config):
    """The tolerance is in units of the samples' standard deviation: random networks may lead far out."""
    found = generate(backbone, SamplerConfig(**config), start.float(), cond, noise)
    unit = expected.std()
    torch.testing.assert_close(found / unit, (expected / unit).to(found), **TOLERANCE)


@pytest.fixture(scope="module")
def repa(golden):
    return open_golden(golden, "dit/repa_sit_tiny", "repa")


def velocity(repa, x, t):
    """REPA's drift with guidance: t runs to the noise, and guides where LOW <= t <= HIGH."""
    conditional = repa.denoise(x, t, LABELS).double()
    if not LOW <= t <= HIGH:
        return conditional
    null = repa.denoise(x, t, torch.full_like(LABELS, NULL)).double()
    return null + SCALE * (conditional - null)


def flow_ode(repa, x, heun):
    times = np.linspace(1, 0, STEPS + 1)
    for i, (t, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        d = velocity(repa, x, t)
        ahead = x + (after - t) * d
        if heun and i < STEPS - 1:
            ahead = x + (after - t) * (0.5 * d + 0.5 * velocity(repa, ahead, after))
        x = ahead
    return x


def flow_sde(repa, x):
    times = [*np.linspace(1, 0.04, STEPS), 0.0]
    for i, (t, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        v, dt, w = velocity(repa, x, t), after - t, 2 * t
        alpha, slope, sigma, sigma_slope = 1 - t, -1.0, t, 1.0
        ratio = alpha / slope
        score = (ratio * v - x) / (sigma**2 - ratio * sigma_slope * sigma)
        x = x + (v - 0.5 * w * score) * dt
        if i < STEPS - 1:
            x = x + math.sqrt(w) * math.sqrt(-dt) * noise_of(i)
    return x


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_probability_flow(repa, method):
    compare(repa, flow_ode(repa, latents(0), method == "heun"), latents(0), method=method, **GUIDED)


def test_reverse_sde(repa):
    compare(repa, flow_sde(repa, latents(0)), latents(0), method="sde", **GUIDED)


@pytest.mark.parametrize("method", ["euler", "heun", "sde"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_time_that_runs_to_the_data_gives_the_same_trajectory(repa, method, scale):
    turned = Backbone.from_module(
        repa.network,
        FlowSchedule(data_time=1, scale=scale),
        in_channels=4,
        sample_size=8,
        patch_size=2,
        conditioner=ClassLabels(11, null=NULL),
        call=lambda network, x, time, cond: -network(x, 1 - time / scale, cond["labels"]),
    )
    config = SamplerConfig(method=method, **GUIDED)
    there, here = (generate(one, config, latents(0).float(), LABELS, noise_of) for one in (repa, turned))
    torch.testing.assert_close(here, there, **TOLERANCE)


def ddpm_tables(steps):
    """DDPM's linear betas cut down to evenly spaced timesteps, as DiT and guided-diffusion respace them."""
    powers = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = np.linspace(0, 999, steps).round().astype(int)
    kept = powers[times]
    before = np.append(1.0, kept[:-1])
    return times, kept, before, 1 - kept / before


def dit_output(dit, x, t):
    """DiT's guidance: of the first 3 channels, everywhere; the others are those of the label."""
    conditional = dit.denoise(x, int(t), LABELS).double()
    null = dit.denoise(x, int(t), torch.full_like(LABELS, NULL)).double()
    guided = null + 4.0 * (conditional - null)
    return torch.cat([guided[:, :3], conditional[:, 3:]], dim=1).split(4, dim=1)


def test_ddpm_with_learned_variance(golden):
    dit = open_golden(golden, "dit/dit_tiny", "dit")
    times, powers, before, betas = ddpm_tables(STEPS)
    x = latents(0)
    for i in reversed(range(STEPS)):
        eps, values = dit_output(dit, x, times[i])
        clean = (x - math.sqrt(1 - powers[i]) * eps) / math.sqrt(powers[i])
        mean = math.sqrt(before[i]) * betas[i] / (1 - powers[i]) * clean
        mean = mean + math.sqrt(1 - betas[i]) * (1 - before[i]) / (1 - powers[i]) * x
        x = mean
        if i:
            least, share = math.log(betas[i] * (1 - before[i]) / (1 - powers[i])), (values + 1) / 2
            log_variance = share * math.log(betas[i]) + (1 - share) * least
            x = mean + (0.5 * log_variance).exp() * noise_of(STEPS - 1 - i)
    compare(dit, x, latents(0), method="ddpm", steps=STEPS, guidance=4.0, guided_channels=3)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim(golden, eta):
    dit = open_golden(golden, "dit/dit_tiny", "dit")
    times, powers, before, _ = ddpm_tables(STEPS)
    x = latents(0)
    for i in reversed(range(STEPS)):
        eps, _ = dit_output(dit, x, times[i])
        clean = (x - math.sqrt(1 - powers[i]) * eps) / math.sqrt(powers[i])
        sigma = eta * math.sqrt((1 - before[i]) / (1 - powers[i])) * math.sqrt(1 - powers[i] / before[i])
        x = math.sqrt(before[i]) * clean + math.sqrt(1 - before[i] - sigma**2) * eps
        x = x + sigma * noise_of(STEPS - 1 - i)
    compare(dit, x, latents(0), method="ddim", eta=eta, steps=STEPS, guidance=4.0, guided_channels=3)


@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_edm(golden, churn):
    edm = open_golden(golden, "edm/edm_ddpmpp", "edm")
    labels, noise = torch.eye(edm.conditioner.classes)[:3], partial(noise_of, channels=3, size=16)
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    sigmas = [(high + i / (STEPS - 1) * (low - high)) ** 7 for i in range(STEPS)] + [0.0]
    gamma = min(churn / STEPS, math.sqrt(2) - 1)
    x = unit_noise(3, 16, 0) * sigmas[0]
    for i in range(STEPS):
        raised = sigmas[i] + gamma * sigmas[i]
        x = x + math.sqrt(raised**2 - sigmas[i] ** 2) * noise(i)
        d = (x - edm.denoise(x, raised, labels).double()) / raised
        ahead = x + (sigmas[i + 1] - raised) * d
        if i < STEPS - 1:
            again = (ahead - edm.denoise(ahead, sigmas[i + 1], labels).double()) / sigmas[i + 1]
            ahead = x + (sigmas[i + 1] - raised) * (0.5 * d + 0.5 * again)
        x = ahead
    compare(edm, x, unit_noise(3, 16, 0), noise, labels, steps=STEPS, churn=churn)
