"""What is learned at a noise level: weights, directions, draws, less noise, the bound of a learned variance."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffrep.config import DDPMConfig, EDMConfig, FlowConfig
from diffrep.errors import ConfigError
from diffrep.noise import DiscreteSchedule, FlowSchedule, SigmaSchedule, solve
from diffrep.train.order import StepRandom, step_rng
from diffrep.train.prediction import build_loss

FLOWS = {"REPA's time": FlowSchedule(), "SiT's": FlowSchedule(data_time=1), "thousands": FlowSchedule(scale=1000.0)}
PATHS = ("linear", "cosine", "vp")
DDPM = DiscreteSchedule.linear()
EVERY = {
    **{
        f"{path} {prediction}": build_loss(FlowConfig(path=path, prediction=prediction), FLOWS["SiT's"])
        for path in PATHS
        for prediction in ("velocity", "epsilon", "sample", "score")
    },
    **{
        f"ddpm {kind}": build_loss(DDPMConfig(prediction_type=kind), DDPM)
        for kind in ("epsilon", "v_prediction", "sample")
    },
    "edm": build_loss(EDMConfig(), SigmaSchedule()),
}


class Extremes(StepRandom):
    """The least and the greatest numbers that a step may draw."""

    def uniform(self, *shape):
        return np.linspace(0, np.nextafter(1, 0), *shape)

    def normal(self, *shape):
        return np.linspace(-9, 9, *shape)


def samples(count=3, channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, count, channels, 4, 4, generator=generator)


def shaped(values):
    return values.view(-1, 1, 1, 1)


def share_of(loss, mixture):
    return (mixture.time / loss.schedule.scale - loss.schedule.data_time).abs()


# What is learned is what samplers solve for


@pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)
def test_an_output_without_loss_is_solved_for_what_was_mixed(loss):
    mixture = loss.draw(8, StepRandom(0, 0))
    clean, eps, _ = samples(8)
    x = loss.noised(mixture, clean, eps)
    perfect = (shaped(mixture.clean_share) * clean + shaped(mixture.eps_share) * eps) / shaped(mixture.scale)
    assert (loss.losses(mixture, clean, eps, perfect) <= 1e-9 * mixture.weight).all()
    for i in range(8):
        level = loss.schedule.at(float(mixture.time[i]))
        found = solve(loss.schedule, x[i : i + 1], perfect[i : i + 1], level)
        assert mixture.signal[i].item() == pytest.approx(level.signal, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(found[0][0], clean[i], atol=1e-4 * (1 + min(level.sigma, 100)), rtol=1e-4)
        torch.testing.assert_close(found[1][0], eps[i], atol=1e-4 * (1 + 1 / level.sigma), rtol=1e-4)


@pytest.mark.parametrize("schedule", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_weights_make_an_error_of_the_noise_one_of_the_velocity(schedule, path, prediction):
    loss = build_loss(FlowConfig(path=path, prediction=prediction, weighting="velocity"), schedule)
    velocity = build_loss(FlowConfig(path=path), schedule)
    mixture = loss.at(np.array([0.2, 0.5, 0.9]) * schedule.scale)
    clean, eps, output = samples()
    x = loss.noised(mixture, clean, eps)
    moved = []
    for i in range(3):
        level = loss.schedule.at(float(mixture.time[i]))
        found, noise = solve(loss.schedule, x[i : i + 1], output[i : i + 1], level)
        signal_slope, noise_slope = loss.schedule.slopes(level)
        moved.append(signal_slope * found + noise_slope * noise)
    expected = velocity.losses(velocity.at(mixture.time), clean, eps, torch.cat(moved))
    torch.testing.assert_close(loss.losses(mixture, clean, eps, output), expected, atol=0, rtol=1e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weighting", ["none", "velocity", "likelihood"])
def test_scores_and_noise_are_weighed_alike(path, weighting):
    noise, score = (
        build_loss(FlowConfig(path=path, prediction=kind, weighting=weighting), FLOWS["REPA's time"])
        for kind in ("epsilon", "score")
    )
    mixture = noise.draw(3, StepRandom(0, 0))
    clean, eps, output = samples()
    expected = noise.losses(mixture, clean, eps, output)
    found = score.losses(score.at(mixture.time), clean, eps, -output / shaped(mixture.noise))
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-4)


# Draws


@pytest.mark.parametrize("density", ["uniform", "low"])
def test_timesteps_are_drawn_before_the_noise_one_number_a_sample(density):
    loss = build_loss(DDPMConfig(density=density), DDPM)
    rng, plain = StepRandom(7, 3), step_rng(7, "step", 3)
    u = plain.random(5)
    assert loss.draw(5, rng).time.tolist() == np.floor(1000 * (u if density == "uniform" else u**2)).tolist()
    assert torch.equal(rng.noise(5, 2), torch.from_numpy(plain.standard_normal((5, 2), dtype=np.float32)))


@pytest.mark.parametrize("schedule", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("density", ["uniform", "logit-normal"])
@pytest.mark.parametrize(
    ("path", "prediction", "least", "most"),
    [
        ("linear", "velocity", 0, 1),
        ("cosine", "sample", 1e-3, 0.999),
        ("vp", "velocity", 1e-5, 1),
        ("vp", "score", 1e-5, 1),
    ],
)
def test_times_keep_from_ends_where_nothing_is_learned(schedule, density, path, prediction, least, most):
    loss = build_loss(FlowConfig(path=path, prediction=prediction, density=density, std=2.0), schedule)
    mixture = loss.draw(9, Extremes(0, 0))
    shares = mixture.place.double()
    assert shares.min().item() == pytest.approx(least, abs=1e-7)
    assert shares.max().item() == pytest.approx(most, abs=1e-6)
    torch.testing.assert_close(share_of(loss, mixture), mixture.place, atol=1e-6, rtol=0)
    assert all(getattr(mixture, field.name).isfinite().all() for field in dataclasses.fields(mixture))


@pytest.mark.parametrize("path", PATHS)
def test_sigmas_of_logit_normal_times_are_log_normal(path):
    loss = build_loss(FlowConfig(path=path, density="logit-normal", mean=0.4, std=0.7), FLOWS["SiT's"])
    mixture = loss.draw(6, StepRandom(1, 2))
    expected = 0.4 + 0.7 * step_rng(1, "step", 2).standard_normal(6)
    found = (mixture.noise / mixture.signal).log().double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Less noise


@pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)
def test_nearer_takes_off_a_share_of_the_way_and_stops_at_the_least(loss):
    mixture = loss.draw(16, StepRandom(0, 1))
    same = loss.nearer(mixture, np.zeros(16))
    for name in ("time", "place", "signal", "noise"):
        torch.testing.assert_close(getattr(same, name), getattr(mixture, name), atol=1e-6, rtol=1e-3)
    gap = np.linspace(0, 0.5, 16)
    expected = np.maximum(mixture.place.double().numpy() - gap, loss.least)
    found = loss.nearer(mixture, gap)
    np.testing.assert_allclose(
        found.place, expected, atol=6e-4 if "timesteps" in str(loss.schedule.describe()) else 1e-6
    )
    assert (found.noise <= mixture.noise * (1 + 1e-6)).all()
    np.testing.assert_allclose(loss.nearer(mixture, np.ones(16)).place, loss.least, atol=1e-6)


def test_less_noise_than_is_trained_is_left_as_it_is():
    loss = build_loss(FlowConfig(prediction="epsilon"), FLOWS["REPA's time"])
    assert loss.nearer(loss.at([5e-4]), [0.3]).time.item() == pytest.approx(5e-4)


# EDM


def test_places_of_edm_are_quantiles_of_its_density():
    loss = build_loss(EDMConfig(mean=-0.4, std=1.0), SigmaSchedule())
    places = loss.draw(4000, StepRandom(0, 0)).place
    counts = torch.histc(places, 4, 0, 1)
    assert (counts - 1000).abs().max() < 4 * math.sqrt(750)
    assert loss.at([math.exp(-0.4)]).place.item() == pytest.approx(0.5, abs=1e-6)
    assert loss.at([80.0]).noise.item() == 80


def test_levels_of_a_table_are_rounded_to():
    loss = build_loss(EDMConfig(), SigmaSchedule("iddpm", 0.1, 4.0, (4.0, 1.0, 0.1)))
    mixture = loss.at([0.2, 0.9, 77.0])
    np.testing.assert_allclose(mixture.time, [0.1, 1, 4], rtol=1e-6)
    np.testing.assert_allclose(mixture.weight, [(s**2 + 0.25) / (s / 2) ** 2 for s in (0.1, 1, 4)], rtol=1e-6)


# DDPM


def learned(schedule=DDPM, **options):
    """The weighted bound of a learned variance alone, as a function of times, clean samples, error and range."""
    loss = build_loss(DDPMConfig(vlb_weight=1, **options), schedule)
    plain = build_loss(DDPMConfig(vlb_weight=0, **options), schedule)

    def bound(times, clean, error, range_):
        mixture = loss.at(times)
        target = shaped(mixture.clean_share) * clean  # eps = 0
        output, eps = torch.cat([target + error, range_], 1), torch.zeros_like(clean)
        return loss.losses(mixture, clean, eps, output) - plain.losses(mixture, clean, eps, output)

    return bound


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_the_bound_is_the_divergence_of_two_gaussians(kind, schedule):
    """Nichol and Dhariwal (2021), equations 4 to 11 and 15, with means from x_0 as `DDPMScheduler` has them."""
    powers = {"linear": DiscreteSchedule.linear, "squaredcos_cap_v2": DiscreteSchedule.cosine}[schedule]()
    discrete = dataclasses.replace(powers, prediction=kind)
    bound = learned(discrete, prediction_type=kind, beta_schedule=schedule)
    clean, error, range_ = (part.double() for part in samples())
    error, times = error / 10, [1, 300, 900]
    found = bound(times, clean.float(), error.float(), range_.float())
    a = np.asarray(powers.alphas_cumprod)
    for i, t in enumerate(times):
        signal, noise, beta = math.sqrt(a[t]), math.sqrt(1 - a[t]), 1 - a[t] / a[t - 1]
        x = signal * clean[i]
        guess = {
            "epsilon": (x - noise * error[i]) / signal,
            "v_prediction": signal * x - noise * (error[i] - noise * clean[i]),
            "sample": clean[i] + error[i],
        }[kind]
        mean, posterior = (
            math.sqrt(a[t - 1]) * beta / (1 - a[t]) * start + math.sqrt(1 - beta) * (1 - a[t - 1]) / (1 - a[t]) * x
            for start in (guess, clean[i])
        )
        least, v = beta * (1 - a[t - 1]) / (1 - a[t]), (range_[i] + 1) / 2
        variance = (v * math.log(beta) + (1 - v) * math.log(least)).exp()
        step = torch.distributions.Normal(mean, variance.sqrt())
        truth = torch.distributions.Normal(posterior, torch.tensor(least).double().sqrt())
        expected = torch.distributions.kl_divergence(truth, step).mean() / math.log(2)
        assert found[i].item() == pytest.approx(expected.item(), rel=2e-3, abs=2e-6)


def test_the_last_step_gives_every_8_bit_value_its_probability():
    values = torch.linspace(-1, 1, 256).view(-1, 1, 1, 1)
    network = torch.full_like(values, 0.3)
    for range_ in (-1.0, 0.5, 30.0):  # wide enough in the end for the open bins
        bits = learned(DDPM, prediction_type="sample")(
            [0] * 256, values, network - values, torch.full_like(values, range_)
        )
        assert (0.5**bits).sum().item() == pytest.approx(1, abs=1e-3)
        assert bits[1:-1].argmin().item() + 1 == round((0.3 + 1) / 2 * 255)


def test_the_bound_moves_the_variance_only():
    loss, plain = (build_loss(DDPMConfig(vlb_weight=weight), DDPM) for weight in (0.5, 0))
    clean, eps, _ = samples()
    mixture = loss.at([0, 10, 700])
    output = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    whole, squared = (
        torch.autograd.grad(one.losses(mixture, clean, eps, output).sum(), output)[0] for one in (loss, plain)
    )
    assert torch.equal(whole[:, :2], squared[:, :2])
    assert (squared[:, 2:] == 0).all()
    assert (whole[:, 2:] != 0).any(dim=(1, 2, 3)).all()


def test_betas_in_fp32_powers_are_not_what_the_bound_is_made_of():
    """Powers near 1 hold three digits of their betas in fp32."""
    clean, error, range_ = samples()
    given = (clean, error, range_)
    of_scheduler = learned(DiscreteSchedule.from_diffusers(DDPMScheduler()))([0, 1, 2], *given)
    torch.testing.assert_close(of_scheduler, learned()([0, 1, 2], *given), atol=0, rtol=1e-5)


def test_the_exported_schedule_says_what_is_predicted():
    loss = build_loss(DDPMConfig(prediction_type="v_prediction"), DDPM)
    assert loss.schedule.prediction == loss.schedule.sampler.config.prediction_type == "v_prediction"
    assert build_loss(DDPMConfig(), DDPM).schedule is DDPM
    flow = build_loss(FlowConfig(path="cosine", prediction="score"), FlowSchedule(data_time=1, scale=1000.0)).schedule
    assert flow == FlowSchedule("cosine", 1, 1000.0, prediction="score")
    assert flow.describe()["prediction"] == "score"
    assert "prediction" not in FlowSchedule().describe(), "stores of velocity networks keep their keys"
    assert (flow.steps(4)[-1], flow.least_time) == (pytest.approx(1.0), pytest.approx(999.0))


# Mixtures


def test_parts_of_a_mixture_are_the_mixtures_of_parts():
    loss = EVERY["edm"]
    mixture, parts = loss.at([0.1, 1.0, 10.0]), (loss.at([0.1]), loss.at([1.0, 10.0]))
    assert len(mixture) == 3
    for rows, part in zip((slice(0, 1), slice(1, 3)), parts, strict=True):
        for field in dataclasses.fields(mixture):
            assert torch.equal(getattr(mixture[rows].to("cpu"), field.name), getattr(part, field.name))
            assert getattr(part, field.name).dtype == torch.float32


# Refusals


@pytest.mark.parametrize(
    ("config", "schedule", "message"),
    [
        (FlowConfig(weighting="velocity"), FlowSchedule(), "weighs errors of 'epsilon' and 'score'.*weighting=none"),
        (FlowConfig(prediction="sample", weighting="likelihood"), FlowSchedule(), "objective.prediction is 'sample'"),
        (FlowConfig(), DDPM, "'flow' trains networks with a FlowSchedule, and this one has a Discrete.*edm for"),
        (EDMConfig(), FlowSchedule(), "'edm' trains networks with a SigmaSchedule"),
        (DDPMConfig(beta_schedule="squaredcos_cap_v2"), DDPM, "1000 timesteps of 'squaredcos_cap_v2' betas"),
        (DDPMConfig(num_train_timesteps=500), DDPM, "500 timesteps.*schedule has 1000"),
        (
            DDPMConfig(),
            DiscreteSchedule.from_diffusers(DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.012)),
            "give objective the betas of that schedule",
        ),
    ],
)
def test_contradictions_are_refused(config, schedule, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(config, schedule)


@pytest.mark.parametrize(
    ("loss", "time", "message"),
    [
        ("vp velocity", 1.0, "nothing to learn at time 1, where eps_share is infinite"),
        ("linear velocity", 1.5, "time 1.5: this network's times lie between 0 and 1"),
        ("linear velocity", math.nan, "time nan"),
        ("ddpm epsilon", 1000, "between 0 and 999"),
        ("ddpm epsilon", 3.5, "time 3.5: this schedule has integer timesteps"),
        ("edm", 0.0, "lie above 0"),
    ],
)
def test_times_that_no_network_takes_are_refused(loss, time, message):
    with pytest.raises(ConfigError, match=message):
        EVERY[loss].at([0.5 if loss != "ddpm epsilon" else 5, time])


def test_outputs_of_another_shape_are_refused():
    clean, eps, _ = samples()
    for name, channels in (("linear velocity", 4), ("ddpm epsilon", 3)):
        mixture = EVERY[name].draw(3, StepRandom(0, 0))
        with pytest.raises(ConfigError, match=r"output is \(3, ., 4, 4\) for inputs \(3, 2, 4, 4\)"):
            EVERY[name].losses(mixture, clean, eps, torch.zeros(3, channels, 4, 4))
