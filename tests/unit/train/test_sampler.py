import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffrep import Backbone
from diffrep.backbones.conditioning import ClassLabels
from diffrep.config import SamplerConfig
from diffrep.errors import ConfigError
from diffrep.noise import DiscreteSchedule, FlowSchedule, SigmaSchedule
from diffrep.train.sampler import Respaced, adds_noise, evaluations, generate, levels_of, method_of

MEAN, STD = 0.3, 0.6


class Gaussian(nn.Module):
    """The best prediction for data that are Gaussian with MEAN and STD, in fp64."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.dtype = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, time):
        level = self.schedule.at(float(time[0]))
        signal, noise = level.signal, level.noise
        clean = MEAN + STD**2 * signal / (signal**2 * STD**2 + noise**2) * (x - signal * MEAN)
        eps = (x - signal * clean) / noise
        kind = self.schedule.prediction
        if kind == "velocity":
            signal_slope, noise_slope = self.schedule.slopes(level)
            return signal_slope * clean + noise_slope * eps
        given = {"epsilon": eps, "sample": clean, "denoised": clean, "score": -eps / noise}
        return given[kind] if kind in given else signal * eps - noise * clean


def gaussian(schedule):
    return Backbone.from_module(Gaussian(schedule), schedule, in_channels=4, sample_size=8)


def noise(number, count=2):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(number))


FLOWS = [
    FlowSchedule(),
    FlowSchedule(data_time=1, scale=1000),
    FlowSchedule("cosine"),
    FlowSchedule("cosine", data_time=1, prediction="score"),
    FlowSchedule(prediction="epsilon"),
    FlowSchedule(prediction="sample"),
]
SCHEDULES = [
    *FLOWS,
    FlowSchedule("vp"),
    SigmaSchedule(),
    DiscreteSchedule.linear(),
    DiscreteSchedule(DiscreteSchedule.cosine().alphas_cumprod[:980], "v_prediction"),
]
NAMES = [f"{one.describe()['kind']}-{getattr(one, 'path', '')}-{one.prediction}" for one in SCHEDULES]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_the_probability_flow_leads_to_the_right_sample(schedule):
    """Of Gaussian data it keeps each sample at the same number of standard deviations from the mean."""
    backbone, start = gaussian(schedule), noise(0)

    def error(method, steps):
        config = SamplerConfig(method=method, steps=steps)
        first = levels_of(schedule, config)[0]
        spread = math.hypot(first.signal * STD, first.noise)
        exact = MEAN + STD * (start * schedule.spread(first) - first.signal * MEAN) / spread
        return float((generate(backbone, config, start) - exact).abs().mean())

    euler, heun = ([error(method, steps) for steps in (20, 40)] for method in ("euler", "heun"))
    assert euler[0] < 0.1
    assert euler[0] / euler[1] > 1.8
    if getattr(schedule, "path", None) != "vp":  # where the noise is like a square root of the time: no second order
        assert heun[0] < euler[0] / 3
    assert heun[0] / heun[1] > 3


RANDOM = [(one, {"method": "sde", "steps": 100}) for one in FLOWS[:4]]
RANDOM += [
    (FlowSchedule("vp"), {"method": "sde", "steps": 100, "last": 0.02}),
    (SigmaSchedule(), {"steps": 100, "churn": 50}),
    (DiscreteSchedule.linear(), {"steps": 400}),
    (DiscreteSchedule.linear(), {"steps": 200, "method": "ddim", "eta": 0.5}),
]


@pytest.mark.parametrize(("schedule", "config"), RANDOM)
def test_noise_leaves_mean_and_spread_right(schedule, config):
    config = SamplerConfig(**config)
    assert adds_noise(schedule, config)
    found = generate(gaussian(schedule), config, noise(0, 100), None, lambda step: noise(1 + step, 100))
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(found.std()) == pytest.approx(STD, rel=0.025)
    # Without noise at the steps a sample is a function of the initial noise, and the correlation 1.
    assert float(torch.corrcoef(torch.stack([found.flatten(), noise(0, 100).flatten()]))[0, 1]) < 0.6


def test_euler_on_a_discrete_schedule_is_ddim_without_noise():
    backbone = gaussian(DiscreteSchedule.linear())
    euler, ddim = (generate(backbone, SamplerConfig(method=one, steps=13), noise(0)) for one in ("euler", "ddim"))
    torch.testing.assert_close(euler, ddim, atol=1e-6, rtol=0)


@pytest.mark.parametrize("learned", [False, True])
def test_a_step_of_ddpm_is_that_of_diffusers(learned):
    schedule = DiscreteSchedule(DiscreteSchedule.linear().alphas_cumprod[::80][:12])
    step = Respaced(schedule, [schedule.at(time) for time in reversed(range(12))], clip=True)
    betas = [1 - now / before for before, now in zip((1, *schedule.alphas_cumprod), schedule.alphas_cumprod)]  # noqa: B905
    scheduler = DDPMScheduler(12, trained_betas=betas, variance_type="learned_range" if learned else "fixed_small")
    x, output = noise(0), torch.cat([noise(1)] + [noise(2).clamp(-1, 1)] * learned, dim=1)
    for number in (0, 4, 11):
        fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        generator = torch.Generator().manual_seed(3)
        expected = scheduler.step(output, 11 - number, x, generator=generator).prev_sample
        found = step.ddpm_step(number, x.double(), output.double(), lambda _, fresh=fresh: fresh.double())
        torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)  # its tables are fp32


def test_a_schedule_that_ends_without_signal():
    schedule = DiscreteSchedule((*DiscreteSchedule.linear().alphas_cumprod[:-1], 0.0), "v_prediction")
    for method in ("ddpm", "ddim"):
        found = generate(
            gaussian(schedule), SamplerConfig(method=method, steps=50), noise(0, 50), None, lambda k: noise(k, 50)
        )
        assert float(found.std()) == pytest.approx(STD, rel=0.1)
    with pytest.raises(ConfigError, match="sampler.method=heun needs some signal at each step and t=999 has none"):
        generate(gaussian(schedule), SamplerConfig(method="heun"), noise(0))


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_the_clean_sample_is_held_where_it_is_asked_for(method):
    backbone, start = gaussian(DiscreteSchedule.linear()), noise(0)  # of four channels, and without a scheduler
    free, held, left = (
        generate(
            backbone, SamplerConfig(method=method, steps=20, clip=clip), start, None, lambda step: noise(1 + step)
        )
        for clip in (False, True, None)
    )
    assert torch.equal(left, free) and free.abs().max() > 1.2
    assert held.abs().max() <= 1


def test_one_step_begins_at_the_most_noise():
    for schedule in (DiscreteSchedule.linear(), SigmaSchedule(), FlowSchedule()):
        (level,) = levels_of(schedule, SamplerConfig(steps=1, method="euler"))
        assert level.sigma > 75


# Guidance


class Table(nn.Module):
    """A velocity that is the label's alone: 1 for class 0, 2 for class 1, 4 for none. Remembers its calls."""

    def __init__(self, sign=1, outputs=2):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
        self.sign, self.outputs, self.calls = sign, outputs, []

    def forward(self, x, time, labels):
        self.calls.append((len(x), float(time[0])))
        return self.sign * self.table[labels].view(-1, 1, 1, 1).expand(-1, self.outputs, *x.shape[2:])


def table(data_time=0, null=2, **options):
    schedule = FlowSchedule(data_time=data_time)
    return Backbone.from_module(
        Table(1 if data_time == 0 else -1, **options),
        schedule,
        in_channels=2,
        sample_size=4,
        conditioner=ClassLabels(3, null=null),
        call=lambda network, x, time, cond: network(x, time, cond["labels"]),
    )


@pytest.mark.parametrize("data_time", [0, 1])
def test_guidance_inside_its_interval_alone(data_time):
    """Steps of 0.1 from 1.0 on; guidance at 0.7, 0.6, ..., 0.3, both bounds included."""
    backbone, labels = table(data_time), torch.tensor([0, 1])
    config = SamplerConfig(steps=10, guidance=3, interval=(0.3, 0.7))
    found = generate(backbone, config, torch.zeros(2, 2, 4, 4), labels)
    plain, guided = torch.tensor([1.0, 2.0]), torch.tensor([4 + 3 * (1 - 4.0), 4 + 3 * (2 - 4.0)])
    expected = -(0.5 * plain + 0.5 * guided)
    torch.testing.assert_close(found, expected.view(2, 1, 1, 1).expand(2, 2, 4, 4))
    assert [rows for rows, _ in backbone.network.calls] == [2] * 3 + [4] * 5 + [2] * 2
    assert evaluations(backbone.schedule, config) == (10, 5)
    assert evaluations(backbone.schedule, SamplerConfig(method="heun", steps=10, guidance=3, interval=(0.3, 0.7))) == (
        19,
        10,
    )
    assert evaluations(backbone.schedule, SamplerConfig(steps=10)) == (10, 0)


def test_guided_channels():
    found = generate(table(), SamplerConfig(steps=2, guidance=3, guided_channels=1), torch.zeros(1, 2, 4, 4), 0)
    assert found[0, :, 0, 0].tolist() == [5.0, -1.0]


def test_networks_that_cannot_be_guided():
    guided = SamplerConfig(guidance=2)
    with pytest.raises(ConfigError, match="not trained without a condition, so nothing can guide it"):
        generate(table(null=None), guided, torch.zeros(1, 2, 4, 4), 0)
    with pytest.raises(ConfigError, match="is unconditional, so nothing can guide it"):
        generate(gaussian(FlowSchedule()), guided, noise(0))


@pytest.mark.parametrize(
    ("schedule", "method", "message"),
    [
        (FlowSchedule(), "ddim", "ddim does not go with a flow, .* use euler, heun or sde"),
        (
            DiscreteSchedule.linear(),
            "sde",
            "sde does not go with a discrete schedule, .* use euler, heun, ddpm or ddim",
        ),
        (SigmaSchedule(), "ddpm", "ddpm does not go with EDM's levels, .* use euler or heun"),
    ],
)
def test_methods_of_other_schedules_are_refused(schedule, method, message):
    with pytest.raises(ConfigError, match=message):
        method_of(schedule, SamplerConfig(method=method))


def test_noise_is_asked_for_where_it_is_needed():
    with pytest.raises(ConfigError, match="sampler.method=ddpm adds noise at its steps; give step_noise"):
        generate(gaussian(DiscreteSchedule.linear()), SamplerConfig(), noise(0))
    with pytest.raises(ConfigError, match="1001 steps are more than the 1000 timesteps"):
        levels_of(DiscreteSchedule.linear(), SamplerConfig(steps=1001))


@pytest.mark.gpu
@pytest.mark.parametrize(("schedule", "config"), RANDOM)
def test_on_cuda(schedule, config):
    config = SamplerConfig(**config)
    here, there = gaussian(schedule), gaussian(schedule)
    there.network.cuda()
    one, two = (generate(each, config, noise(0), None, lambda step: noise(1 + step)) for each in (here, there))
    assert two.device.type == "cuda"
    torch.testing.assert_close(two.cpu(), one, atol=1e-5, rtol=0)
