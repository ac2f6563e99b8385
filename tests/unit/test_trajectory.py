"""Trajectories: where a network is called, and what its predictions make of the state."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffrep.errors import ConfigError
from diffrep.noise import DiscreteSchedule, FlowSchedule, Level, SigmaSchedule, read_levels, solve

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def discrete(prediction="epsilon", **options):
    return DiscreteSchedule.from_diffusers(DDIMScheduler(**SD | {"prediction_type": prediction} | options))


SCHEDULES = {
    "epsilon": discrete(),
    "v": discrete("v_prediction"),
    "sample": discrete("sample"),
    "flow": FlowSchedule(),
    "flow in thousands": FlowSchedule(scale=1000.0),
    "flow, data at 1": FlowSchedule(data_time=1),
    "cosine": FlowSchedule("cosine"),
    "cosine, data at 1": FlowSchedule("cosine", data_time=1),
    "vp": FlowSchedule("vp"),
    "vp, data at 1": FlowSchedule("vp", data_time=1),
    "flow, epsilon": FlowSchedule(prediction="epsilon"),
    "flow, sample": FlowSchedule(data_time=1, prediction="sample"),
    "cosine, score": FlowSchedule("cosine", data_time=1, prediction="score"),
    "vp, score": FlowSchedule("vp", prediction="score"),
    "edm": SigmaSchedule(),
}


def trajectory(schedule, spec):
    return read_levels(schedule, [spec], spec.split()[0].removeprefix("hf."))[1][0]


def times(schedule, spec):
    return [level.time for level in trajectory(schedule, spec).levels]


def prediction(schedule, level, clean, eps):
    """What a perfect network would give for a mixture; velocities are differentiated numerically."""
    if schedule.prediction == "velocity":
        h = 1e-6 * schedule.scale
        after, before = schedule.at(level.time + h), schedule.at(level.time - h)
        slopes = [
            (getattr(after, part) - getattr(before, part)) / (after.time - before.time) * schedule.scale
            for part in ("signal", "noise")
        ]
        return slopes[0] * clean + slopes[1] * eps
    v = level.signal * eps - level.noise * clean
    score = -eps / level.noise
    known = {"epsilon": eps, "v_prediction": v, "sample": clean, "denoised": clean, "score": score}
    return known[schedule.prediction]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0, 12.0])
def test_a_perfect_prediction_is_solved_for_what_was_mixed(schedule, sigma):
    clean, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = schedule.at_sigma(sigma)
    x = level.signal * clean + level.noise * eps
    output = prediction(schedule, level, clean, eps)
    # Learned variances after the prediction are not looked at.
    for given in (output, torch.cat([output, torch.full_like(output, torch.nan)], dim=1)):
        found = solve(schedule, x.float(), given.float(), level)
        torch.testing.assert_close(found[0], clean.float(), atol=2e-5 * (1 + sigma), rtol=1e-5)
        torch.testing.assert_close(found[1], eps.float(), atol=2e-5 * (1 + 1 / sigma), rtol=1e-5)


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("data_time", [0, 1])
def test_velocities_are_solved_at_both_ends(path, data_time):
    clean, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    schedule, rate = FlowSchedule(path, data_time), math.pi / 2 if path == "cosine" else 1
    sign = 1 if data_time == 0 else -1
    for share in (0, 1):
        level = schedule.at(abs(share - data_time))
        x, straight = (clean, eps) if share == 0 else (eps, clean)
        # At its ends the cosine path moves towards the other end only, the linear one along the difference.
        velocity = straight * (1 if share == 0 else -1) if path == "cosine" else eps - clean
        found = solve(schedule, x, sign * rate * velocity, level)
        torch.testing.assert_close(found[0], clean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found[1], eps, atol=1e-6, rtol=1e-6)


# Where the network is called


@pytest.mark.parametrize(
    ("schedule", "inversion", "end", "generation"),
    [
        # SD: the first step, 1, is next to the clean end, so the image takes its place.
        (discrete(steps_offset=1), [0, 201, 401, 601, 801], None, [801, 601, 401, 201, 1]),
        (discrete(), [0, 200, 400, 600, 800], None, [800, 600, 400, 200, 0]),
        (discrete(timestep_spacing="trailing"), [0, 199, 399, 599, 799], 999, [999, 799, 599, 399, 199]),
        (DiscreteSchedule.linear(), [0, 250, 500, 749, 999], None, [999, 749, 500, 250, 0]),
        (FlowSchedule(), [0, 0.2, 0.4, 0.6, 0.8], 1, [1, 0.8, 0.6, 0.4, 0.2]),
        (FlowSchedule(data_time=1), [1, 0.8, 0.6, 0.4, 0.2], 0, [0, 0.2, 0.4, 0.6, 0.8]),
        (FlowSchedule("vp", data_time=1), [0.999, 0.8, 0.6, 0.4, 0.2], 0, [0, 0.2, 0.4, 0.6, 0.8]),
        (FlowSchedule(prediction="score"), [0.001, 0.2, 0.4, 0.6, 0.8], 0.999, [0.999, 0.8, 0.6, 0.4, 0.2]),
        (  # the class goes down to a thousandth before it shifts
            FlowSchedule(scale=1000.0, sampler=FlowMatchEulerDiscreteScheduler(shift=3.0)),
            [0, 502.985046, 751.121094, 900.35907, 1000],
            None,
            [1000, 900.35907, 751.121094, 502.985046, 8.928572],
        ),
    ],
)
def test_calls_of_a_trajectory(schedule, inversion, end, generation):
    path = trajectory(schedule, "inversion 0/5")
    assert [level.time for level in path.levels] == pytest.approx(inversion, rel=1e-6)
    assert [level.key for level in path.levels] == [f"inversion {k}/5" for k in range(5)]
    assert (path.end is None) == (end is None)
    if end is not None:
        assert path.end.time == pytest.approx(end)
    back = trajectory(schedule, "generation 0/5")
    assert [level.time for level in back.levels] == pytest.approx(generation, rel=1e-6)
    assert [level.key for level in back.levels] == [f"generation {k}/5" for k in reversed(range(5))]
    assert (back.end.signal, back.end.noise) == (1, 0)


def test_calls_of_edm():
    steps = SigmaSchedule().steps(18)
    assert times(SigmaSchedule(), "generation 0/18") == pytest.approx(steps[::-1])
    path = trajectory(SigmaSchedule(), "inversion 3/18")
    assert [level.time for level in path.levels] == pytest.approx(steps)
    assert path.levels[0].noise == 0.002, "the image stands for the state at the least noise"
    assert path.end is None


def test_one_call(sd=SCHEDULES["epsilon"]):
    assert times(sd, "inversion 0/1") == [0]
    assert times(sd, "generation 0/1") == [0]
    assert times(FlowSchedule(), "generation 0/1") == [1]
    assert times(sd, "hf.inversion 0/1") == [-1]


def test_calls_of_hyperfeatures():
    schedule = discrete(steps_offset=1)  # the published code makes a scheduler of its own, without Stable Diffusion's
    path = trajectory(schedule, "hf.inversion 9/10")
    assert [level.time for level in path.levels] == [-1, 0, 100, 200, 300, 400, 500, 600, 700, 800]
    assert [level.key for level in path.levels] == [f"hf.inversion {k}/10" for k in reversed(range(10))]
    assert (path.levels[0].signal, path.levels[0].noise) == (1, 0)
    assert path.end.time == 900
    back = trajectory(schedule, "hf.generation 9/10")
    assert [level.time for level in back.levels] == list(range(900, -1, -100))
    assert [level.key for level in back.levels] == [f"hf.generation {k}/10" for k in range(10)]
    fifty = {level.key: level.time for level in trajectory(schedule, "hf.inversion 0/50").levels}
    assert fifty["hf.inversion 49/50"] == -1
    assert all(fifty[f"hf.inversion {k}/50"] == 960 - 20 * k for k in range(49))
    assert times(schedule, "hf.generation 0/3") == [666, 333, 0], "T // N apart"


def test_levels_are_read_under_canonical_keys_and_share_trajectories():
    levels, paths = read_levels(discrete(), ["inversion  3 / 10", "hf.inversion 3/10", " inversion 0/10"], "inversion")
    assert [level.key for _, level in levels] == ["inversion 3/10", "hf.inversion 3/10", "inversion 0/10"]
    assert levels[0][0] == "inversion  3 / 10"
    assert [path.name for path in paths] == ["inversion of 10 steps", "hf.inversion of 10 steps"]
    several, paths = read_levels(discrete(), ["inversion 3/10", "inversion 3/20", "inversion 4/20"], "inversion")
    assert [path.name for path in paths] == ["inversion of 10 steps", "inversion of 20 steps"]
    assert several[0][1].time == 300
    plain, none = read_levels(discrete(), [261, "clean"], "gaussian")
    assert [level.key for _, level in plain] == ["t=261", "clean"]
    assert none == []


@pytest.mark.parametrize(
    ("schedule", "spec", "noise", "message"),
    [
        (discrete(), 261, "inversion", r"level '261' does not go with noise='inversion'.*'inversion k/N'"),
        (discrete(), "clean", "generation", r"does not go with noise='generation'.*'hf.generation k/N'"),
        (discrete(), "generation 0/5", "inversion", "'generation 0/5' does not go with noise='inversion'"),
        (discrete(), "inversion 0/5", "gaussian", "lies on a trajectory; only requests with noise='inversion'"),
        (discrete(), "hf.generation 0/5", "none", "lies on a trajectory; only requests with noise='generation'"),
        (discrete(), "inversion 5/5", "inversion", "counted from 0 to N - 1"),
        (discrete(), "inversion 0/0", "inversion", "counted from 0 to N - 1"),
        (discrete(), "inversion -1/5", "inversion", "does not go with"),
        (discrete(), "inversion 3", "inversion", "does not go with"),
        (discrete(), "inversion 3/2000", "inversion", "2000 steps are more than the 1000 timesteps"),
        (discrete(), "hf.inversion 3/2000", "inversion", "this schedule has only 1000 steps"),
        (FlowSchedule(), "hf.inversion 3/10", "inversion", "those of a discrete schedule.*write 'inversion k/N'"),
        (SigmaSchedule(), "hf.generation 3/10", "generation", "those of a discrete schedule"),
        (
            FlowSchedule(sampler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
            "inversion 3/10",
            "inversion",
            "depend on the image size.*load the backbone with another schedule",
        ),
    ],
)
def test_levels_that_are_refused(schedule, spec, noise, message):
    with pytest.raises(ConfigError, match=message):
        read_levels(schedule, [spec], noise)


# What an update makes of the state


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("offset", [0, 1])
def test_generation_is_the_step_of_ddim(kind, offset):
    scheduler = DDIMScheduler(**SD, prediction_type=kind, steps_offset=offset)
    schedule = DiscreteSchedule.from_diffusers(scheduler)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 3, 4, 4, generator=generator)
    path = trajectory(schedule, "generation 0/10")
    for index, t in enumerate(scheduler.timesteps):
        assert path.levels[index].time == t
        output = torch.randn(2, 3, 4, 4, generator=generator)
        ours, clean = path.update(schedule, ours, output, index)
        step = scheduler.step(output, t, theirs, eta=0.0)
        torch.testing.assert_close(clean, step.pred_original_sample, atol=1e-4, rtol=1e-4)
        theirs = step.prev_sample
        if index < 9 or offset == 0:  # with an offset the class ends at the least timestep's mixture, not at the clean
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours, clean), "a generation leads to its last estimate of the clean sample"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_generation_of_a_flow_is_eulers_step(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = FlowSchedule(scale=1000.0, sampler=scheduler)
    path = trajectory(schedule, "generation 0/8")
    fresh = FlowMatchEulerDiscreteScheduler(shift=shift)
    fresh.set_timesteps(8)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 3, 4, 4, generator=generator)
    for index, t in enumerate(fresh.timesteps):
        assert path.levels[index].time == pytest.approx(float(t), rel=1e-6)
        output = torch.randn(2, 3, 4, 4, generator=generator)
        ours, _ = path.update(schedule, ours, output, index)
        theirs = fresh.step(output, t, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


MEAN, SPREAD = 0.3, 0.5


def gaussian_network(schedule, x, level):
    """The best prediction there is for data from N(MEAN, SPREAD^2), and what it is made of."""
    power = level.signal**2 * SPREAD**2 + level.noise**2
    clean = MEAN + level.signal * SPREAD**2 / power * (x - level.signal * MEAN)
    eps = level.noise / power * (x - level.signal * MEAN)
    if schedule.prediction == "velocity":
        signal, noise = schedule.slopes(level)
        return signal * clean + noise * eps
    return prediction(schedule, level, clean, eps)


def exact(x, start, end):
    """Where the probability-flow ODE takes a state of Gaussian data: every quantile stays one."""
    return end.signal * MEAN + spread(end) / spread(start) * (x - start.signal * MEAN)


def spread(level):
    return math.hypot(level.signal * SPREAD, level.noise)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("direction", ["inversion", "generation"])
def test_many_steps_solve_the_ode_of_gaussian_data(schedule, direction):
    errors = []
    for count in (20, 160):
        path = trajectory(schedule, f"{direction} 0/{count}")
        start, end = path.levels[0], path.levels[-1]
        state = x = spread(start) * torch.linspace(-2, 2, 9).view(1, 1, 3, 3)
        for index in range(count - 1):
            state, _ = path.update(schedule, state, gaussian_network(schedule, state, path.levels[index]), index)
        errors.append(((state - exact(x, start, end)).abs().max() / spread(end)).item())
    assert errors[1] < errors[0] / 4, "first order: eight times the steps, an eighth of the error"
    assert errors[1] < 0.05


def test_predictions_that_tell_nothing_are_refused():
    x, pure, clean = torch.ones(1, 3, 2, 2), Level("t=999", 999, 0.0, 1.0), Level("clean", 0, 1.0, 0.0)
    with pytest.raises(ConfigError, match="'epsilon' does not tell image from noise at level 't=999'"):
        solve(discrete(), x, x, pure)
    with pytest.raises(ConfigError, match="'sample' does not tell"):
        solve(discrete("sample"), x, x, clean)
    with pytest.raises(ConfigError, match="'denoised' does not tell"):
        solve(SigmaSchedule(), x, x, clean)
    with pytest.raises(ConfigError, match="infinite at its data end"):
        solve(FlowSchedule("vp"), x, x, FlowSchedule("vp").at(0))
    for end in (0, 1):
        with pytest.raises(ConfigError, match="'score' does not tell.*'score' above both"):
            solve(FlowSchedule(prediction="score"), x, x, FlowSchedule().at(end))
    with pytest.raises(ConfigError, match="'flow_prediction' does not tell"):
        solve(DiscreteSchedule((0.9, 0.5), "flow_prediction"), x, x, Level("t=0", 0, 0.9, 0.4))
    assert all(part.isfinite().all() for part in solve(discrete("v_prediction"), x, x, pure))
    for shape in ((1, 4, 2, 2), (1, 3, 4, 4)):
        with pytest.raises(ConfigError, match="predicts neither image nor noise; a trajectory needs 3 channels"):
            solve(discrete(), x, torch.ones(shape), pure)
