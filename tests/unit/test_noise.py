import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from diffrep.errors import ConfigError, UnknownNameError
from diffrep.noise import DiscreteSchedule, FlowSchedule, LevelTable, SigmaSchedule, mix, sample_noise

IDDPM_TABLE = (80.0, 10.0, 1.0, 0.5, 0.01)
CONTINUOUS = {
    "flow": FlowSchedule(),
    "flow in thousands": FlowSchedule(scale=1000.0),
    "flow, data at 1": FlowSchedule(data_time=1),
    "cosine": FlowSchedule("cosine"),
    "cosine, data at 1": FlowSchedule("cosine", data_time=1),
    "vp": FlowSchedule("vp"),
    "vp, data at 1": FlowSchedule("vp", data_time=1),
    "edm": SigmaSchedule(),
    "ve": SigmaSchedule("ve", 0.02, 100.0),
}


@pytest.fixture(scope="module")
def scheduler():
    return DDPMScheduler()


@pytest.fixture(scope="module")
def schedule(scheduler):
    return DiscreteSchedule.from_diffusers(scheduler)


@pytest.mark.parametrize("spec", [261, "261", "t=261", " t = 261 "])
def test_spellings_of_a_timestep_are_one_level(schedule, spec):
    level = schedule.level(spec)
    assert (level.key, level.time) == ("t=261", 261)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_mixture_is_the_schedulers(scheduler, schedule, t):
    generator = torch.Generator().manual_seed(0)
    clean, eps = torch.randn(2, 2, 1, 4, 4, generator=generator)
    level = schedule.level(t)
    mixed = mix(clean, eps, torch.full((2,), level.signal), torch.full((2,), level.noise))
    torch.testing.assert_close(mixed, scheduler.add_noise(clean, eps, torch.tensor([t, t])), atol=1e-6, rtol=0)


def test_sigma_and_logsnr_take_the_nearest_timestep_and_its_own_mixture(schedule):
    exact = schedule.level(261)
    near = schedule.level(f"sigma={exact.sigma * 1.0001}")
    assert near == exact
    assert schedule.level(f"logsnr={-2 * math.log(exact.sigma)}") == exact
    assert schedule.level("sigma=0").time == 0
    assert schedule.level("sigma=1e9").time == 999


def test_clean_is_unmixed_at_any_time(schedule):
    clean = schedule.level("clean")
    assert (clean.key, clean.time, clean.signal, clean.noise) == ("clean", 0, 1.0, 0.0)
    assert schedule.level("clean@-1").time == -1
    assert schedule.level("clean@261.5").key == "clean@261.5"


@pytest.mark.parametrize("spec", [-1, 1000, 0.42, "261.5", "sigma=-1", "sigma=x", "noisy", "t=", "clean@x", "nan", ""])
def test_unreadable_levels(schedule, spec):
    with pytest.raises(ConfigError, match="level"):
        schedule.level(spec)


# Schedules of every kind


@pytest.mark.parametrize("schedule", CONTINUOUS.values(), ids=CONTINUOUS)
@pytest.mark.parametrize("sigma", [0.01, 0.0599473, 0.7, 1.0, 3.3, 42.0])
def test_sigma_to_time_and_back(schedule, sigma):
    level = schedule.level(f"sigma={sigma}")
    assert level.sigma == pytest.approx(sigma, rel=1e-6)
    assert schedule.level(level.key) == level
    assert schedule.level(level.time) == level
    near = schedule.level(f"logsnr={-2 * math.log(sigma)}")
    assert near.sigma == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("schedule", [DiscreteSchedule.linear(), DiscreteSchedule.cosine()])
def test_every_timestep_is_the_nearest_to_its_own_sigma(schedule):
    for t in range(0, 1000, 37):
        level = schedule.at(t)
        assert schedule.level(f"sigma={level.sigma!r}") == level
        assert level.signal**2 + level.noise**2 == pytest.approx(1)


def test_rounding_to_the_levels_that_iddpm_knows():
    schedule = SigmaSchedule("iddpm", 0.01, 80.0, IDDPM_TABLE)
    assert [schedule.level(f"sigma={sigma}").time for sigma in (0.7, 0.8, 3, 1e9, 1e-9)] == [0.5, 1.0, 1.0, 80.0, 0.01]
    assert schedule.level("sigma=0.7").key == "sigma=0.5", "the key names the level that is used"


@pytest.mark.parametrize(
    ("name", "spec", "key"),
    [
        ("flow", 0.42, "t=0.42"),
        ("flow", "t=0.42", "t=0.42"),
        ("flow", 0.1 + 0.2, "t=0.3"),
        ("flow", 1, "t=1"),
        ("flow", "sigma=1", "t=0.5"),
        ("flow", "step 0/4", "t=0.25"),
        ("flow in thousands", "420", "t=420"),
        ("flow in thousands", "step 3/4", "t=1000"),
        ("flow, data at 1", "sigma=3", "t=0.25"),
        ("flow, data at 1", "step 0/4", "t=0.75"),
        ("cosine", "sigma=1", "t=0.5"),
        ("edm", 0.7, "sigma=0.7"),
        ("edm", "0.7", "sigma=0.7"),
        ("edm", "logsnr=0", "sigma=1"),
        ("edm", "step 0/18", "sigma=0.002"),
        ("edm", "step 3/18", "sigma=0.0599473112"),
        ("edm", "step  17 / 18", "sigma=80"),
    ],
)
def test_keys_say_the_native_time(name, spec, key):
    schedule = CONTINUOUS[name]
    level = schedule.level(spec)
    assert level.key == key
    assert LevelTable([(spec, level)]).key(spec) == key


@pytest.mark.parametrize(
    ("name", "time"),
    [("flow", 0.0), ("flow, data at 1", 1.0), ("flow in thousands", 0.0), ("edm", 0.002), ("ve", 0.02)],
)
def test_clean_lies_at_the_data_end(name, time):
    schedule = CONTINUOUS[name]
    clean = schedule.level("clean")
    assert (clean.key, clean.time, clean.signal, clean.noise) == ("clean", time, 1.0, 0.0)
    elsewhere = schedule.level("clean@0.3")
    assert (elsewhere.key, elsewhere.time, elsewhere.sigma) == ("clean@0.3", 0.3, 0.0)
    assert schedule.level(f"clean@{time}") == clean


@pytest.mark.parametrize("name", ["flow", "cosine", "vp", "flow, data at 1", "vp, data at 1"])
def test_the_ends_of_a_path(name):
    schedule = CONTINUOUS[name]
    data, noise = schedule.at(schedule.data_time), schedule.at(1 - schedule.data_time)
    assert (data.signal, data.noise) == (1.0, 0.0)
    assert noise.noise == pytest.approx(1, abs=1e-4)
    assert noise.signal < 0.01
    assert noise.sigma > 150


# Steps of samplers


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("count", [1, 7, 18, 50, 1000])
def test_steps_are_the_schedulers(kind, spacing, count):
    scheduler = kind(timestep_spacing=spacing)
    schedule = DiscreteSchedule.from_diffusers(scheduler)
    found = [schedule.level(f"step {i}/{count}").time for i in range(0, count, 1 + count // 20)]
    fresh = kind(timestep_spacing=spacing)
    fresh.set_timesteps(count)
    assert found == fresh.timesteps.flip(0).tolist()[:: 1 + count // 20]
    assert len(scheduler.timesteps) == 1000, "the scheduler that was given stays as it was"


def test_steps_with_an_offset_with_fractions_and_with_repeats():
    offset = PNDMScheduler(skip_prk_steps=True, steps_offset=1)  # Stable Diffusion's; it calls one timestep twice
    assert DiscreteSchedule.from_diffusers(offset).steps(50) == list(range(1, 1000, 20))
    fractions = EulerDiscreteScheduler(timestep_spacing="linspace")
    assert DiscreteSchedule.from_diffusers(fractions).steps(5) == [0, 250, 500, 749, 999]  # 249.75, 499.5, 749.25
    twice = DiscreteSchedule.from_diffusers(HeunDiscreteScheduler()).steps(5)  # second order
    assert twice == [0, 250, 500, 749, 999]


@pytest.mark.parametrize("count", [1, 4, 28, 50])
@pytest.mark.parametrize(("shift", "scale"), [(1.0, 1000.0), (3.0, 1000.0), (3.0, 1.0)])
def test_steps_of_a_flow_are_shifted(count, shift, scale):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = FlowSchedule("linear", data_time=0, scale=scale, sampler=scheduler)
    fresh = FlowMatchEulerDiscreteScheduler(shift=shift)
    fresh.set_timesteps(count)
    expected = [time / 1000 * scale for time in sorted(fresh.timesteps.tolist())]
    assert [schedule.level(f"step {i}/{count}").time for i in range(count)] == pytest.approx(expected, rel=1e-8)
    assert schedule.level(f"step {count - 1}/{count}").signal == 0


def test_steps_of_a_flow_trained_on_another_number_of_timesteps():
    sampler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=1.0)
    assert FlowSchedule(scale=1.0, sampler=sampler).steps(5)[-1] == 1.0


@pytest.mark.parametrize(
    ("schedule", "spec", "message"),
    [
        (DiscreteSchedule.linear(), "step 9/5", "steps of 5 are counted from 0 to 4"),
        (DiscreteSchedule.linear(), "step 5/5", "steps of 5 are counted from 0 to 4"),
        (DiscreteSchedule.linear(), "step 0/0", "at least 1 step"),
        (DiscreteSchedule.linear(), "step 3/2000", "2000 steps are more than the 1000 timesteps"),
        (DiscreteSchedule.linear(), "step -1/5", "cannot read the level 'step -1/5'"),
        (DiscreteSchedule.from_diffusers(DDPMScheduler()), "step 3/2000", "more than the 1000 timesteps"),
        (DiscreteSchedule.from_diffusers(LCMScheduler()), "step 3/60", "LCMScheduler cannot take 60 steps"),
        (DiscreteSchedule.linear(), "1000", "integer timesteps 0 to 999"),
        (DiscreteSchedule.linear(), "0.5", "integer timesteps 0 to 999"),
        (FlowSchedule(), "1.01", "times lie between 0 and 1, data at 0"),
        (FlowSchedule(), -0.2, "times lie between 0 and 1"),
        (FlowSchedule(data_time=1), "261", "times lie between 0 and 1, data at 1"),
        (FlowSchedule(scale=1000.0), 1001, "times lie between 0 and 1000"),
        (FlowSchedule("vp"), "sigma=200", "beyond the end of the vp path"),
        (FlowSchedule("vp"), "logsnr=-1000", "beyond the end of the vp path"),
        (SigmaSchedule(), "-1", "sigma is above 0 here"),
        (SigmaSchedule(), "sigma=0", "write 'clean' for no noise"),
        (SigmaSchedule(), "t=inf", "cannot read the level"),
        *[
            (schedule, spec, message)
            for schedule in (DiscreteSchedule.linear(), *CONTINUOUS.values())
            for spec, message in (
                ("sigma=-1", "at least 0"),
                ("logsnr=-2000", "between -1000 and 1000"),
                ("nonsense", "write a native time such as 261"),
                ("snr=3", "cannot read the level"),
                ("clean@", "cannot read the level"),
                ("step 3", "cannot read the level"),
            )
        ],
    ],
)
def test_levels_that_are_refused(schedule, spec, message):
    with pytest.raises(ConfigError, match=message):
        schedule.level(spec)


def test_steps_that_depend_on_the_image_size_are_refused():
    sampler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)  # FLUX
    schedule = FlowSchedule(sampler=sampler)
    with pytest.raises(ConfigError, match="depend on the image size; write the native time"):
        schedule.level("step 1/4")
    assert schedule.level(0.5).sigma == 1


@pytest.mark.parametrize("schedule", [DiscreteSchedule.linear(), *CONTINUOUS.values()])
def test_extreme_ratios_never_fail_with_anything_but_a_message(schedule):
    for spec in ("logsnr=1000", "logsnr=-1000", "sigma=1e300", "sigma=1e-300", "sigma=0"):
        try:
            level = schedule.level(spec)
        except ConfigError:
            continue
        assert math.isfinite(level.signal)
        assert math.isfinite(level.noise)


def test_table_finds_every_spelling(schedule):
    table = LevelTable((spec, schedule.level(spec)) for spec in (261, "sigma=0.5", "clean"))
    assert table.key(261) == table.key("t=261") == "t=261"
    assert table.key("sigma=0.5") == schedule.level("sigma=0.5").key
    with pytest.raises(UnknownNameError, match="unknown level '7'"):
        table.key(7)


def test_noise_depends_on_every_argument_and_on_nothing_else():
    base = sample_noise((3, 4), 0, "a", "t=1", 0)
    torch.manual_seed(123)
    assert torch.equal(base, sample_noise((3, 4), 0, "a", "t=1", 0))
    others = [(1, "a", "t=1", 0), (0, "b", "t=1", 0), (0, "a", "t=2", 0), (0, "a", "t=1", 1), (2**32, "a", "t=1", 0)]
    for arguments in others:
        assert not torch.equal(base, sample_noise((3, 4), *arguments))
    assert not torch.equal(base, sample_noise((3, 4), 0, "a", "t=1", 0, "posterior"))


def test_noise_is_unit_gaussian_and_fixed_for_ever():
    noise = sample_noise((100_000,), 0, "sample", "t=10", 0)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    # The stream is part of what a store means: a change here needs a new NUMERICS.
    expected = torch.tensor(FIRST)
    torch.testing.assert_close(noise[:4], expected, atol=0, rtol=0)


FIRST = [-0.8205346465110779, 0.3275553584098816, -0.33988434076309204, 0.28580135107040405]


@pytest.mark.parametrize(
    ("schedule", "spec"),
    [
        (DiscreteSchedule.linear(), "clean@1000"),
        (DiscreteSchedule.linear(), "clean@-2"),
        (FlowSchedule(), "clean@261"),
        (FlowSchedule(data_time=1), "clean@-1"),
        (SigmaSchedule(), "clean@0"),
    ],
)
def test_a_clean_image_at_a_time_that_the_network_does_not_know(schedule, spec):
    with pytest.raises(ConfigError, match="this network's times lie between"):
        schedule.level(spec)
