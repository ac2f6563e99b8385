"""Noise levels, schedules, the forward process, and noise that is a function of the sample.

One coordinate for all schedules: sigma = noise / signal of the mixture x_t = signal * x_0 + noise * eps
(log-SNR = -2 ln sigma). A schedule maps it to and from the time that its network takes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from diffrep.config import LevelSpec
from diffrep.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class Level:
    """One noise level of one schedule.

    Attributes:
        key: Canonical name: "t=261", "sigma=0.7", "clean", "clean@-1".
        time: What is passed to the network.
        signal: Coefficient of the clean sample.
        noise: Coefficient of the noise.
    """

    key: str
    time: int | float
    signal: float
    noise: float

    @property
    def sigma(self) -> float:
        """Noise over signal; infinite for pure noise."""
        return self.noise / self.signal if self.signal else math.inf


class Schedule(Protocol):
    """What a backbone needs to know of its noise schedule."""

    def level(self, spec: LevelSpec) -> Level:
        """Reads a level as users write it."""

    def describe(self) -> dict[str, object]:
        """Plain values that identify the schedule; they go into a store's meta.json."""


@dataclass(frozen=True)
class DiscreteSchedule:
    """A DDPM schedule: integer timesteps 0..T-1 with cumulative signal powers (Ho et al., 2020).

    Args:
        alphas_cumprod: Signal power of each timestep, in (0, 1]; x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps.
        prediction: What the network predicts: "epsilon", "v_prediction" or "sample". Features do not depend on it.
    """

    alphas_cumprod: tuple[float, ...]
    prediction: str = "epsilon"

    @classmethod
    def from_diffusers(cls, scheduler: object) -> DiscreteSchedule:
        """Takes the training noise levels of a diffusers scheduler that has `alphas_cumprod`."""
        return cls(tuple(scheduler.alphas_cumprod.tolist()), scheduler.config.get("prediction_type", "epsilon"))

    def level(self, spec: LevelSpec) -> Level:
        """Reads a level as users write it.

        Args:
            spec: A timestep (261, "261", "t=261"), "sigma=0.7" or "logsnr=1.2" (the nearest timestep), "clean" (no
                noise, time 0) or "clean@TIME" (no noise, any time, also a fraction or -1).

        Raises:
            ConfigError: The spec cannot be read or lies outside the schedule.
        """
        text = str(spec).strip()
        if text == "clean" or text.startswith("clean@"):
            time = _number(text[6:] or "0", text)
            time = int(time) if time == int(time) else time
            return Level("clean" if time == 0 else f"clean@{time}", time, 1.0, 0.0)
        kind, value = _kind_and_value(text)
        if kind == "t":
            if value != int(value) or not 0 <= value < len(self.alphas_cumprod):
                raise ConfigError(
                    f"level {text!r}: this schedule has the integer timesteps 0 to {len(self.alphas_cumprod) - 1}; "
                    "write 'sigma=...' for a noise-to-signal ratio"
                )
            return self._at(int(value))
        sigma = value if kind == "sigma" else math.exp(-value / 2)
        if sigma < 0:
            raise ConfigError(f"level {text!r}: sigma is a ratio of noise to signal, at least 0")
        return self._at(self._nearest(sigma))

    def describe(self) -> dict[str, object]:
        """Returns length, end points and digest of the schedule."""
        packed = np.asarray(self.alphas_cumprod, dtype=np.float64).tobytes()
        return {
            "kind": "discrete",
            "timesteps": len(self.alphas_cumprod),
            "prediction": self.prediction,
            "digest": hashlib.sha256(packed).hexdigest()[:16],
        }

    def _at(self, t: int) -> Level:
        power = self.alphas_cumprod[t]
        return Level(f"t={t}", t, math.sqrt(power), math.sqrt(1 - power))

    def _nearest(self, sigma: float) -> int:
        # Nearest in log sigma, the scale on which schedules are even; the floor keeps sigma = 0 finite.
        power = np.asarray(self.alphas_cumprod)
        log_sigmas = 0.5 * (np.log1p(-np.minimum(power, 1 - 1e-12)) - np.log(np.maximum(power, 1e-12)))
        return int(np.abs(log_sigmas - math.log(max(sigma, 1e-12))).argmin())


class LevelTable:
    """The levels of a request, looked up in any way a user may write them.

    Args:
        levels: Each spec as requested, with the level it stands for.
    """

    def __init__(self, levels: Iterable[tuple[LevelSpec, Level]]):
        self.levels: dict[str, Level] = {}
        self._keys: dict[str, str] = {}
        for spec, level in levels:
            self.levels.setdefault(level.key, level)
            for name in (level.key, level.key.removeprefix("t="), str(spec).strip()):
                self._keys[name] = level.key

    def key(self, spec: LevelSpec) -> str:
        """Returns the canonical key.

        Raises:
            UnknownNameError: The request had no such level.
        """
        spec = int(spec) if isinstance(spec, float) and spec.is_integer() else spec
        try:
            return self._keys[str(spec).strip()]
        except KeyError:
            raise UnknownNameError("level", str(spec), self.levels) from None


def mix(clean: torch.Tensor, eps: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Forward process, one level a row.

    Args:
        clean: Clean samples (B, C, H, W).
        eps: Unit Gaussian noise (B, C, H, W).
        signal: Signal coefficients (B,).
        noise: Noise coefficients (B,).

    Returns:
        signal * clean + noise * eps, (B, C, H, W) in the dtype of `clean`; the coefficients are applied in fp32.
    """
    shape = (-1, *[1] * (clean.ndim - 1))
    return (signal.float().view(shape) * clean.float() + noise.float().view(shape) * eps.float()).to(clean.dtype)


def sample_noise(
    shape: tuple[int, ...], seed: int, sample_id: str, level: str, draw: int, purpose: str = "noise"
) -> torch.Tensor:
    """Draws unit Gaussian noise that depends on nothing but its arguments.

    A 64-bit BLAKE2b digest keys numpy's counter-based Philox generator. torch's CPU generator is not used because it
    keeps only the low 32 bits of its seed.

    Args:
        shape: Shape of the result.
        seed: The request's seed.
        sample_id: The sample's id.
        level: Canonical key of the noise level.
        draw: Index of the draw.
        purpose: "noise" or "posterior": separate streams.

    Returns:
        fp32 CPU tensor of `shape`.
    """
    text = "\x1f".join((purpose, str(seed), sample_id, level, str(draw)))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _kind_and_value(text: str) -> tuple[str, float]:
    match = re.fullmatch(r"(?:(t|sigma|logsnr)\s*=\s*)?(\S+)", text)
    if match is None:
        raise ConfigError(
            f"cannot read the level {text!r}; write 261, 'sigma=0.7', 'logsnr=1.2', 'clean' or 'clean@-1'"
        )
    return match[1] or "t", _number(match[2], text)


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(
            f"cannot read the level {whole!r}; write 261, 'sigma=0.7', 'logsnr=1.2', 'clean' or 'clean@-1'"
        )
    return value
