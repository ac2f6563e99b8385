"""Losses of predictions: mixtures of data and noise, and the squared error that is learned at them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import ArrayLike

from diffrep.errors import ConfigError
from diffrep.noise import Schedule, mix
from diffrep.train.order import StepRandom


@dataclass(frozen=True, eq=False)
class Mixture:
    """Noise levels of a batch and what is learned there; fp32 tensors (B,).

    The network is given x = signal * x_0 + noise * eps and the time. A sample's loss is
    weight * mean((scale * output - clean_share * x_0 - eps_share * eps)^2).

    Attributes:
        time: Native time, as the network takes it.
        signal: Coefficient of the clean sample in the input.
        noise: Coefficient of the noise there.
        clean_share: Coefficient of the clean sample in the target.
        eps_share: Coefficient of the noise there.
        scale: Of the output.
        weight: Of the squared error.
        place: Share of the way to noise, in [0, 1]; losses are logged by it.
    """

    time: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor
    clean_share: torch.Tensor
    eps_share: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, **parts: ArrayLike) -> Mixture:
        """Makes one of fp64 arrays and numbers, in fp32 on the CPU.

        Raises:
            ConfigError: A number is infinite, as the velocity is at the data end of the vp path.
        """
        shape = np.shape(parts["time"])
        for name, part in parts.items():
            bad = ~np.broadcast_to(np.isfinite(part), shape)
            if bad.any():
                raise ConfigError(
                    f"there is nothing to learn at time {parts['time'][bad][0]:.9g}, where {name} is infinite; "
                    "take a time farther from that end"
                )
        return cls(
            **{name: torch.tensor(np.broadcast_to(part, shape), dtype=torch.float32) for name, part in parts.items()}
        )

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, rows: slice) -> Mixture:
        return Mixture(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def squared(self, error: torch.Tensor) -> torch.Tensor:
        """Returns the loss of each sample (B,) of scaled outputs minus their targets (B, C, H, W)."""
        return self.weight * error.square().flatten(1).mean(1)

    def to(self, device: torch.device | str) -> Mixture:
        """Returns it on a device."""
        return Mixture(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class PredictionLoss(ABC):
    """A weighted squared error of a prediction, at noise levels that are drawn at random.

    Attributes:
        schedule: Noise levels, times and the kind of prediction of a network that is trained with it.
        least: Least share of the way to noise that is trained.
    """

    schedule: Schedule
    least: float

    def draw(self, count: int, rng: StepRandom) -> Mixture:
        """Draws the levels of samples, one number each of `rng`."""
        return self.at(self._drawn(count, rng))

    @abstractmethod
    def at(self, times: ArrayLike) -> Mixture:
        """Returns what is learned at native times (B,).

        Raises:
            ConfigError: The schedule has no such time, or nothing can be learned there.
        """

    def nearer(self, mixture: Mixture, gap: ArrayLike) -> Mixture:
        """Returns the same samples with less noise, but not less than is trained.

        Args:
            mixture: Theirs.
            gap: Share of the way to noise to take off, (B,) in [0, 1].

        Returns:
            Their mixture, on the device of the given one.
        """
        # Not of `place`, in which fp32 has no digits left for EDM's greatest levels.
        places = self._places(mixture.time.cpu().double().numpy())
        places = np.maximum(places - np.asarray(gap), np.minimum(places, self.least))
        return self.at(self._times(places)).to(mixture.time.device)

    def noised(self, mixture: Mixture, clean: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Returns the network's input (B, C, H, W), in the dtype of `clean`.

        Args:
            mixture: Levels.
            clean: Clean samples (B, C, H, W).
            eps: Unit Gaussian noise (B, C, H, W).
        """
        return mix(clean, eps, mixture.signal, mixture.noise)

    def losses(self, mixture: Mixture, clean: torch.Tensor, eps: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns the loss of each sample, (B,) fp32.

        Args:
            mixture: Levels.
            clean: Clean samples (B, C, H, W).
            eps: Unit Gaussian noise (B, C, H, W).
            output: What the network gave for `noised`, (B, C, H, W).

        Raises:
            ConfigError: The output has another shape.
        """
        return mixture.squared(self._error(mixture, clean, eps, output))

    def _error(self, mixture: Mixture, clean: torch.Tensor, eps: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns the scaled output minus its target (B, C, H, W), fp32."""
        if output.shape != clean.shape:
            raise ConfigError(
                f"the network's output is {tuple(output.shape)} for inputs {tuple(clean.shape)}; a network that is "
                f"trained to predict {self.schedule.prediction!r} gives the shape it is given"
            )
        shape = (-1, *[1] * (clean.ndim - 1))
        return mixture.scale.view(shape) * output.float() - mix(
            clean.float(), eps, mixture.clean_share, mixture.eps_share
        )

    @abstractmethod
    def _drawn(self, count: int, rng: StepRandom) -> np.ndarray:
        """Draws native times (B,)."""

    @abstractmethod
    def _places(self, times: np.ndarray) -> np.ndarray:
        """Returns shares of the way to noise of native times."""

    @abstractmethod
    def _times(self, places: np.ndarray) -> np.ndarray:
        """Returns native times of shares of the way to noise."""


def checked_times(times: ArrayLike, low: float, high: float) -> np.ndarray:
    """Returns native times as fp64.

    Raises:
        ConfigError: One lies outside, or is no number.
    """
    times = np.asarray(times, dtype=np.float64)
    outside = ~((times >= low) & (times <= high))
    if outside.any():
        bounds = "above 0" if high == np.inf else f"between {low:g} and {high:g}"
        raise ConfigError(f"time {times[outside][0]:.9g}: this network's times lie {bounds}")
    return times
