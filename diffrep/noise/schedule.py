"""Schedules: from levels as users write them to the time that a network takes, and the mixture at it."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from diffrep.config import LevelSpec
from diffrep.errors import ConfigError
from diffrep.noise import path as paths
from diffrep.noise.level import ON_TRAJECTORY, Level

FORMS = "write a native time such as 261, 'sigma=0.7', 'logsnr=1.2', 'step 4/18', 'clean' or 'clean@-1'"
# SiT's samplers keep this far from ends at which what the network predicts does not tell image from noise, and from
# the data end of the vp path, where the velocity is infinite.
MARGIN = 1e-3


class Schedule(ABC):
    """The noise levels of a network and the time it takes at each.

    Attributes:
        prediction: What the network predicts. Features depend on it along a trajectory only.
    """

    prediction: str

    def level(self, spec: LevelSpec) -> Level:
        """Reads a level as users write it.

        Args:
            spec: A native time (261, "261", "t=261"; for EDM sigma itself), "sigma=0.7", "logsnr=1.2", "step i/n" (the
                i-th of n sampling steps, counted from 0 at the least noise), "clean" (no noise, at the schedule's
                lowest time) or "clean@TIME" (no noise, at any time, also a fraction or -1).

        Raises:
            ConfigError: The spec cannot be read or lies outside the schedule, or names a call on a trajectory, which
                only `read_levels` knows.
        """
        text = str(spec).strip()
        place = ON_TRAJECTORY.fullmatch(text)
        if place is not None:
            raise ConfigError(
                f"level {text!r} lies on a trajectory; only requests with noise={place[2]!r} read it, in "
                "'diffrep extract' and Backbone.extract"
            )
        if text == "clean" or text.startswith("clean@"):
            time = self.clean_time if text == "clean" else _number(text[6:], text)
            low, high = self.time_range
            if not low <= time <= high:
                raise ConfigError(f"level {text!r}: this network's times lie between {low:g} and {high:g}")
            time = int(time) if time == int(time) and isinstance(self.clean_time, int) else time
            return Level("clean" if time == self.clean_time else f"clean@{_written(time)}", time, 1.0, 0.0)
        step = re.fullmatch(r"step\s+(\d+)\s*/\s*(\d+)", text)
        if step is not None:
            return self.at(self._step(int(step[1]), int(step[2]), text))
        match = re.fullmatch(r"(?:(t|sigma|logsnr)\s*=\s*)?(\S+)", text)
        if match is None:
            raise ConfigError(f"cannot read the level {text!r}; {FORMS}")
        value = _number(match[2], text)
        if match[1] in (None, "t"):
            return self.at(value)
        if match[1] == "logsnr" and abs(value) > 1000:
            raise ConfigError(f"level {text!r}: log-SNR lies between -1000 and 1000")
        sigma = value if match[1] == "sigma" else math.exp(-value / 2)
        if sigma < 0:
            raise ConfigError(f"level {text!r}: sigma is a ratio of noise to signal, at least 0")
        return self.at_sigma(sigma)

    @property
    @abstractmethod
    def clean_time(self) -> int | float:
        """Native time of the least noise."""

    @property
    def least_time(self) -> int | float:
        """Native time at which an image stands for a state of a trajectory: where the least noise is."""
        return self.clean_time

    @property
    @abstractmethod
    def time_range(self) -> tuple[float, float]:
        """Least and greatest native time that "clean@TIME" may name."""

    @abstractmethod
    def at(self, time: float) -> Level:
        """Returns the level at a native time.

        Raises:
            ConfigError: The schedule has no such time.
        """

    @abstractmethod
    def at_sigma(self, sigma: float) -> Level:
        """Returns the level of a noise-to-signal ratio: exact, or the nearest timestep of a discrete schedule."""

    @abstractmethod
    def steps(self, count: int) -> list[float]:
        """Returns the native times of a sampler with `count` steps, from the least noise to the most."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns plain values that identify the schedule; they go into a store's meta.json."""

    def spread(self, level: Level) -> float:
        """Returns what unit noise is multiplied by to start a sampler at a level: 1 for DDPM and flows."""
        return math.hypot(level.signal, level.noise)

    def _step(self, index: int, count: int, text: str) -> float:
        if count < 1:
            raise ConfigError(f"level {text!r}: a sampler takes at least 1 step")
        if index >= count:
            raise ConfigError(f"level {text!r}: steps of {count} are counted from 0 to {count - 1}")
        times = self.steps(count)
        if index >= len(times):
            raise ConfigError(f"level {text!r}: this schedule has only {len(times)} steps")
        return times[index]


@dataclass(frozen=True)
class DiscreteSchedule(Schedule):
    """A DDPM schedule: integer timesteps 0..T-1 with cumulative signal powers (Ho et al., 2020).

    Args:
        alphas_cumprod: Signal power of each timestep, in (0, 1]; x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps.
        prediction: What the network predicts: "epsilon", "v_prediction" or "sample".
        sampler: The diffusers scheduler it was read from, whose spacing `steps` follows; None spaces evenly from 0 to
            T-1, as guided-diffusion and DiT do.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    prediction: str = "epsilon"
    sampler: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> DiscreteSchedule:
        """Takes the training noise levels of a diffusers scheduler that has `alphas_cumprod`."""
        prediction = scheduler.config.get("prediction_type", "epsilon")
        return cls(tuple(scheduler.alphas_cumprod.tolist()), prediction, scheduler)

    @classmethod
    def linear(cls) -> DiscreteSchedule:
        """Betas from 1e-4 to 0.02 in 1000 steps: DDPM, guided-diffusion, DiT."""
        return cls(tuple(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).tolist()))

    @classmethod
    def cosine(cls) -> DiscreteSchedule:
        """The cosine schedule of Nichol and Dhariwal (2021) in 1000 steps, betas at most 0.999."""
        power = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        return cls(tuple(np.cumprod(1 - np.minimum(1 - power[1:] / power[:-1], 0.999)).tolist()))

    @property
    def clean_time(self) -> int:
        """0."""
        return 0

    @property
    def time_range(self) -> tuple[float, float]:
        """From -1, which Hyperfeatures calls its networks at, to the last timestep."""
        return -1.0, len(self.alphas_cumprod) - 1.0

    def at(self, time: float) -> Level:
        """Returns the level of an integer timestep."""
        if time != int(time) or not 0 <= time < len(self.alphas_cumprod):
            raise ConfigError(
                f"level {_written(time)!r}: this schedule has the integer timesteps 0 to "
                f"{len(self.alphas_cumprod) - 1}; write 'sigma=...' for a noise-to-signal ratio"
            )
        power = self.alphas_cumprod[int(time)]
        return Level(f"t={int(time)}", int(time), math.sqrt(power), math.sqrt(1 - power))

    def at_sigma(self, sigma: float) -> Level:
        """Returns the timestep nearest in log sigma, the scale on which schedules are even."""
        power = np.asarray(self.alphas_cumprod)
        log_sigmas = 0.5 * (np.log1p(-np.minimum(power, 1 - 1e-12)) - np.log(np.maximum(power, 1e-12)))
        # The floor keeps sigma = 0 finite.
        return self.at(int(np.abs(log_sigmas - math.log(max(sigma, 1e-12))).argmin()))

    def steps(self, count: int) -> list[int]:
        """Returns the sampler's timesteps, ascending, each once.

        Raises:
            ConfigError: The sampler cannot take so many steps.
        """
        if count > len(self.alphas_cumprod):
            raise ConfigError(f"{count} steps are more than the {len(self.alphas_cumprod)} timesteps of this schedule")
        if self.sampler is None:
            times = np.linspace(0, len(self.alphas_cumprod) - 1, count)
        else:
            times = _sampler_times(self.sampler, count)
        return sorted({round(float(time)) for time in times})

    def describe(self) -> dict[str, Any]:
        """Returns length, end points and digest of the schedule."""
        packed = np.asarray(self.alphas_cumprod, dtype=np.float64).tobytes()
        return {
            "kind": "discrete",
            "timesteps": len(self.alphas_cumprod),
            "prediction": self.prediction,
            "digest": hashlib.sha256(packed).hexdigest()[:16],
        }


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """An interpolant between data and noise over continuous time.

    With s in [0, 1] the share of the way to noise: linear, x_s = (1 - s) x_0 + s eps; cosine (GVP),
    x_s = cos(pi s / 2) x_0 + sin(pi s / 2) eps; vp, the variance-preserving path of Song et al. (2021).

    Args:
        path: "linear", "cosine" or "vp" (Ma et al., 2024, SiT).
        data_time: Time at the data end, in units of `scale`: 0 in REPA, SD3 and FLUX, 1 in SiT.
        scale: Native time of a full unit: 1000 in SD3.
        sampler: The diffusers scheduler it was read from, whose shift `steps` follows.
        prediction: What the network predicts: "velocity", "epsilon", "sample" or "score"; see `solve`.
    """

    path: Literal["linear", "cosine", "vp"] = "linear"
    data_time: Literal[0, 1] = 0
    scale: float = 1.0
    sampler: Any = field(default=None, repr=False, compare=False)
    prediction: str = "velocity"

    @property
    def clean_time(self) -> float:
        """The data end."""
        return float(self.data_time * self.scale)

    @property
    def least_time(self) -> float:
        """The data end, or a little before it; see `span`."""
        return abs(self.data_time - self.span[0]) * self.scale

    @property
    def span(self) -> tuple[float, float]:
        """Shares of the way to noise between which samplers call the network, SiT's `sample_eps` from some ends."""
        if self.path == "vp":
            return MARGIN, 1.0
        return (0.0, 1.0) if self.prediction == "velocity" else (MARGIN, 1 - MARGIN)

    @property
    def time_range(self) -> tuple[float, float]:
        """Both ends."""
        return 0.0, self.scale

    def at(self, time: float) -> Level:
        """Returns the level at a time between 0 and `scale`."""
        if not 0 <= time <= self.scale:
            raise ConfigError(
                f"level {_written(time)!r}: this schedule's times lie between 0 and {_written(self.scale)}, data at "
                f"{_written(self.clean_time)}; write 'sigma=...' for a noise-to-signal ratio"
            )
        time = float(_written(time))  # the key and the mixture name one level, however it was asked for
        signal, noise = paths.coefficients(self.path, abs(time / self.scale - self.data_time))
        return Level(f"t={_written(time)}", time, float(signal), float(noise))

    def at_sigma(self, sigma: float) -> Level:
        """Returns the exact level of a noise-to-signal ratio."""
        share = float(paths.share_at(self.path, sigma))
        if share > 1:
            raise ConfigError(f"sigma={_written(sigma)} lies beyond the end of the {self.path} path")
        return self.at(abs(self.data_time - share) * self.scale)

    def steps(self, count: int) -> list[float]:
        """Returns the times at which an Euler sampler calls the network: shifted as the sampler says, else even.

        The noise end is the end of `span`.
        """
        if self.sampler is None:
            shares = [(index + 1) / count for index in range(count)]
        else:
            whole = self.sampler.config.num_train_timesteps
            shares = sorted(float(time) / whole for time in _sampler_times(self.sampler, count))
        return [abs(self.data_time - min(share, self.span[1])) * self.scale for share in shares]

    def describe(self) -> dict[str, Any]:
        """Returns path, direction, scale, and what is predicted where that is not the velocity."""
        predicted = {} if self.prediction == "velocity" else {"prediction": self.prediction}
        return {"kind": "flow", "path": self.path, "data_time": self.data_time, "scale": self.scale} | predicted

    def slopes(self, level: Level) -> tuple[float, float]:
        """Returns the derivatives of signal and noise by the time over `scale`, in the direction in which it runs.

        Raises:
            ConfigError: They are infinite there, as at the data end of the vp path.
        """
        if self.path == "vp" and not level.noise:
            raise ConfigError(f"the velocity of the vp path is infinite at its data end, level {level.key!r}")
        sign = 1 if self.data_time == 0 else -1
        signal, noise = paths.slopes(self.path, abs(level.time / self.scale - self.data_time))
        return sign * float(signal), sign * float(noise)


@dataclass(frozen=True)
class SigmaSchedule(Schedule):
    """EDM's levels (Karras et al., 2022): x = x_0 + sigma eps, and sigma is the time.

    Args:
        kind: Preconditioning: "edm", "vp", "ve" or "iddpm".
        sigma_min: Least noise the network takes.
        sigma_max: Most.
        table: Levels that sigma is rounded to; empty for none.
    """

    kind: str = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    table: tuple[float, ...] = field(default=(), repr=False)
    prediction: str = "denoised"

    @property
    def clean_time(self) -> float:
        """The least noise."""
        return self.sigma_min

    @property
    def time_range(self) -> tuple[float, float]:
        """The levels of the network."""
        return self.sigma_min, self.sigma_max

    def at(self, time: float) -> Level:
        """Returns the level of sigma."""
        if time <= 0:
            raise ConfigError(f"level {_written(time)!r}: sigma is above 0 here; write 'clean' for no noise")
        if self.table:
            time = min(self.table, key=lambda level: abs(level - time))
        time = float(_written(time))
        return Level(f"sigma={_written(time)}", time, 1.0, time)

    def at_sigma(self, sigma: float) -> Level:
        """Returns the level of sigma."""
        return self.at(sigma)

    def steps(self, count: int) -> list[float]:
        """Returns EDM's sampling levels, rho = 7 (equation 5), ascending."""
        low, high = self.sigma_min ** (1 / 7), self.sigma_max ** (1 / 7)
        return [(low + (high - low) * index / max(1, count - 1)) ** 7 for index in range(count)]

    def describe(self) -> dict[str, Any]:
        """Returns the preconditioning and the range."""
        return {"kind": f"sigma-{self.kind}", "sigma_min": self.sigma_min, "sigma_max": self.sigma_max}

    def spread(self, level: Level) -> float:
        """Returns sigma."""
        return level.noise


def _sampler_times(sampler: Any, count: int) -> list[float]:
    sampler = copy.deepcopy(sampler)  # set_timesteps changes it
    if sampler.config.get("use_dynamic_shifting"):
        raise ConfigError(
            "the steps of this sampler depend on the image size; write the native time instead, or load the backbone "
            "with another schedule"
        )
    try:
        sampler.set_timesteps(count)
    except ValueError as error:
        raise ConfigError(f"{type(sampler).__name__} cannot take {count} steps: {error}") from error
    return sampler.timesteps.tolist()


def _written(value: float) -> str:
    """Writes a native time as in keys: integers plain, others with nine digits."""
    return f"{value:.9g}"


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"cannot read the level {whole!r}; {FORMS}")
    return value
