"""What a network learns to predict, without the network: flows, DDPM and EDM as one form of loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike

from diffrep.config import DDPMConfig, EDMConfig, FlowConfig
from diffrep.errors import ConfigError
from diffrep.noise import DiscreteSchedule, FlowSchedule, Schedule, SigmaSchedule
from diffrep.noise import path as paths
from diffrep.train.ddpm import DDPMLoss
from diffrep.train.mixture import Mixture, PredictionLoss, checked_times
from diffrep.train.order import StepRandom

__all__ = ["DDPMLoss", "EDMLoss", "FlowLoss", "Mixture", "PredictionLoss", "build_loss"]

# SiT's `train_eps`: how far its times keep from both ends for predictions other than the velocity, and from the data
# end of the vp path, where the velocity is infinite.
MARGIN, VP_MARGIN = 1e-3, 1e-5


class FlowLoss(PredictionLoss):
    """Training along an interpolant (Ma et al., 2024, SiT; Yu et al., 2025, REPA), in either direction of time.

    The velocity is the derivative of the input by the time over the schedule's scale, in the direction in which time
    runs. With D = noise noise' - noise^2 signal' / signal, slopes towards the noise, an error d of eps is an error
    (D / noise) d of the velocity: weighting "velocity" is (D / noise)^2. "likelihood" is D / noise^2, which bounds the
    likelihood of an SDE with diffusion 2 D, half of it times the squared error of the score. The squared error of a
    score is that of noise * score, against -eps.

    Args:
        config: Path, prediction, weighting and density.
        schedule: Direction and scale of the network's time.

    Raises:
        ConfigError: The weighting is none of the prediction's.
    """

    def __init__(self, config: FlowConfig, schedule: FlowSchedule):
        if config.weighting != "none" and config.prediction not in ("epsilon", "score"):
            raise ConfigError(
                f"objective.weighting {config.weighting!r} weighs errors of 'epsilon' and 'score', and "
                f"objective.prediction is {config.prediction!r}; write weighting=none, or predict one of the two"
            )
        self.config = config
        self.schedule = replace(schedule, path=config.path, prediction=config.prediction)
        if config.path == "vp":
            self.least, self._most = VP_MARGIN, 1.0
        else:
            margin = 0.0 if config.prediction == "velocity" else MARGIN
            self.least, self._most = margin, 1 - margin

    def at(self, times: ArrayLike) -> Mixture:
        """Returns what is learned at native times (B,) between 0 and the schedule's scale.

        Raises:
            ConfigError: A time lies outside, or nothing can be learned there.
        """
        times = checked_times(times, 0, self.schedule.scale)
        share = self._places(times)
        signal, noise = paths.coefficients(self.config.path, share)
        signal_slope, noise_slope = paths.slopes(self.config.path, share)
        sign = 1 if self.schedule.data_time == 0 else -1
        clean_share, eps_share, scale = {
            "velocity": (sign * signal_slope, sign * noise_slope, 1),
            "epsilon": (0, 1, 1),
            "sample": (1, 0, 1),
            "score": (0, -1, noise),
        }[self.config.prediction]
        return Mixture.of(
            time=times,
            signal=signal,
            noise=noise,
            clean_share=clean_share,
            eps_share=eps_share,
            scale=scale,
            weight=self._weight(signal, noise, signal_slope, noise_slope),
            place=share,
        )

    def _weight(
        self, signal: np.ndarray, noise: np.ndarray, signal_slope: np.ndarray, noise_slope: np.ndarray
    ) -> ArrayLike:
        if self.config.weighting == "none":
            return 1
        with np.errstate(divide="ignore", invalid="ignore"):  # at the ends, which `Mixture.of` refuses
            diffusion = noise * noise_slope - noise**2 * signal_slope / signal
            return (diffusion / noise) ** 2 if self.config.weighting == "velocity" else diffusion / noise**2

    def _drawn(self, count: int, rng: StepRandom) -> np.ndarray:
        low, high = sorted(abs(self.schedule.data_time - share) for share in (self.least, self._most))
        if self.config.density == "uniform":
            return (low + (high - low) * rng.uniform(count)) * self.schedule.scale
        share = paths.share_at(self.config.path, np.exp(self.config.mean + self.config.std * rng.normal(count)))
        return self._times(np.clip(share, self.least, self._most))

    def _places(self, times: np.ndarray) -> np.ndarray:
        return np.abs(times / self.schedule.scale - self.schedule.data_time)

    def _times(self, places: np.ndarray) -> np.ndarray:
        return np.abs(self.schedule.data_time - places) * self.schedule.scale


class EDMLoss(PredictionLoss):
    """EDM's training (Karras et al., 2022, section 5): the network gives the clean sample, D(x; sigma).

    The way to noise is counted in drawn samples: the share of them that have less noise.

    Args:
        config: Density of ln sigma, and the standard deviation of the data.
        schedule: The network's.
    """

    def __init__(self, config: EDMConfig, schedule: SigmaSchedule):
        self.config = config
        self.schedule = schedule
        self.least = float(self._places(np.array([schedule.sigma_min]))[0])

    def at(self, times: ArrayLike) -> Mixture:
        """Returns what is learned at sigmas (B,), rounded to the schedule's table where it has one.

        Raises:
            ConfigError: A sigma is not above 0.
        """
        sigma = checked_times(times, np.nextafter(0, 1), np.inf)
        if self.schedule.table:
            table = np.asarray(self.schedule.table)
            sigma = table[np.abs(sigma[:, None] - table).argmin(1)]
        data = self.config.sigma_data
        return Mixture.of(
            time=sigma,
            signal=1,
            noise=sigma,
            clean_share=1,
            eps_share=0,
            scale=1,
            weight=(sigma**2 + data**2) / (sigma * data) ** 2,
            place=self._places(sigma),
        )

    def _drawn(self, count: int, rng: StepRandom) -> np.ndarray:
        return np.exp(self.config.mean + self.config.std * rng.normal(count))

    def _places(self, times: np.ndarray) -> np.ndarray:
        normal = torch.from_numpy((np.log(times) - self.config.mean) / self.config.std)
        return torch.special.ndtr(normal).numpy()

    def _times(self, places: np.ndarray) -> np.ndarray:
        inside = np.clip(places, np.finfo(np.float64).tiny, np.nextafter(1, 0))  # the ends are infinitely far
        normal = torch.special.ndtri(torch.from_numpy(inside)).numpy()
        return np.exp(self.config.mean + self.config.std * normal)


# Kind of objective -> loss, and the schedule it needs.
KINDS: Mapping[str, tuple[type[PredictionLoss], type[Schedule]]] = {
    "flow": (FlowLoss, FlowSchedule),
    "ddpm": (DDPMLoss, DiscreteSchedule),
    "edm": (EDMLoss, SigmaSchedule),
}


def build_loss(config: FlowConfig | DDPMConfig | EDMConfig, schedule: Schedule) -> PredictionLoss:
    """Returns the loss that a config describes.

    Args:
        config: The objective.
        schedule: The network's, which says what time it takes.

    Raises:
        ConfigError: The network takes another kind of time, or the config contradicts itself or the schedule.
    """
    loss, needed = KINDS[config.kind]
    if not isinstance(schedule, needed):
        known = ", ".join(f"{kind} for a {other.__name__}" for kind, (_, other) in KINDS.items())
        raise ConfigError(
            f"objective.kind {config.kind!r} trains networks with a {needed.__name__}, and this one has a "
            f"{type(schedule).__name__}; the kinds are {known}"
        )
    return loss(config, schedule)
