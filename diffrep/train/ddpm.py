"""Training on discrete timesteps, and the variational bound by which a network learns its variance."""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import ArrayLike

from diffrep.config import DDPMConfig
from diffrep.errors import ConfigError
from diffrep.noise import DiscreteSchedule
from diffrep.train.mixture import Mixture, PredictionLoss, checked_times
from diffrep.train.order import StepRandom

# The published code takes images in [-1, 1] to be of 8 bits, latents as well.
HALF_BIN, ENDS = 1 / 255, 0.999
LEAST_PROBABILITY = 1e-12


class DDPMLoss(PredictionLoss):
    """Training on discrete timesteps (Ho et al., 2020), v (Salimans and Ho, 2022) and learned variances.

    A network with 2C output channels learns its variance by a bound that is added to the squared error, in bits per
    dimension and with no gradient for the mean (Nichol and Dhariwal, 2021), as DiT (Peebles and Xie, 2023) is trained.

    Args:
        config: Noise levels, prediction, density, weight of the bound.
        schedule: The network's, with the noise levels of `config`.

    Raises:
        ConfigError: The schedule has other noise levels.
    """

    least = 0.0

    def __init__(self, config: DDPMConfig, schedule: DiscreteSchedule):
        betas = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"}
        wanted = DiscreteSchedule.from_diffusers(DDPMScheduler(**config.model_dump(include=betas), clip_sample=False))
        given, asked = np.asarray(schedule.alphas_cumprod), np.asarray(wanted.alphas_cumprod)
        if given.shape != asked.shape or not np.allclose(given, asked, rtol=1e-3, atol=1e-8):
            raise ConfigError(
                f"objective describes {len(asked)} timesteps of {config.beta_schedule!r} betas, with signal powers "
                f"{asked[0]:.6g} to {asked[-1]:.6g}, and the network's schedule has {len(given)}, {given[0]:.6g} to "
                f"{given[-1]:.6g}; give objective the betas of that schedule, or the network a schedule of these"
            )
        self.config = config
        self.schedule = schedule if schedule.prediction == config.prediction_type else wanted
        self.total = len(asked)
        self._powers = np.asarray(self.schedule.alphas_cumprod)
        self._bound = VariationalBound(self.schedule)

    def at(self, times: ArrayLike) -> Mixture:
        """Returns what is learned at integer timesteps (B,).

        Raises:
            ConfigError: There is no such timestep.
        """
        times = checked_times(times, 0, self.total - 1)
        if (times != np.rint(times)).any():
            raise ConfigError(f"time {times[times != np.rint(times)][0]:.9g}: this schedule has integer timesteps")
        powers = self._powers[times.astype(np.int64)]
        signal, noise = np.sqrt(powers), np.sqrt(1 - powers)
        clean_share, eps_share = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-noise, signal)}[
            self.config.prediction_type
        ]
        return Mixture.of(
            time=times,
            signal=signal,
            noise=noise,
            clean_share=clean_share,
            eps_share=eps_share,
            scale=1,
            weight=1,
            place=self._places(times),
        )

    def losses(self, mixture: Mixture, clean: torch.Tensor, eps: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns the loss of each sample, (B,) fp32.

        Args:
            mixture: Levels.
            clean: Clean samples (B, C, H, W).
            eps: Unit Gaussian noise (B, C, H, W).
            output: What the network gave for `noised`, (B, C, H, W), or (B, 2C, H, W) with a learned variance.

        Raises:
            ConfigError: The output has another shape.
        """
        channels = clean.shape[1]
        if output.shape[1] != 2 * channels:
            return super().losses(mixture, clean, eps, output)
        error = self._error(mixture, clean, eps, output[:, :channels])
        bound = self._bound(mixture.time, clean, error, output[:, channels:].float())
        return mixture.squared(error) + self.config.vlb_weight * bound

    def _drawn(self, count: int, rng: StepRandom) -> np.ndarray:
        u = rng.uniform(count)
        return np.floor(self.total * (u**2 if self.config.density == "low" else u))

    def _places(self, times: np.ndarray) -> np.ndarray:
        return times / self.total

    def _times(self, places: np.ndarray) -> np.ndarray:
        return np.rint(places * self.total)


class VariationalBound:
    """Bound of the negative log-likelihood at one timestep, in bits per dimension (Nichol and Dhariwal, 2021).

    The network's second half v gives the variance between the two that are known to bound it:
    log var = (v + 1) / 2 log beta_t + (1 - v) / 2 log(beta_t (1 - a_{t-1}) / (1 - a_t)), for cumulative powers a. The
    first variance of the second kind, which is 0, is taken to be the next one.

    Args:
        schedule: Noise levels, and what the network's first half predicts.
    """

    def __init__(self, schedule: DiscreteSchedule):
        betas = _betas(schedule)
        powers = np.cumprod(1 - betas)
        before = np.append(1.0, powers[:-1])
        signal, noise = np.sqrt(powers), np.sqrt(1 - powers)
        variance = betas * (1 - before) / (1 - powers)
        variance[0] = variance[1] if len(betas) > 1 else betas[0]
        # How far the clean sample moves with what is predicted, and the step's mean with the clean sample.
        clean = {"epsilon": -noise / signal, "v_prediction": -noise, "sample": np.ones_like(signal)}
        mean = betas * np.sqrt(before) / (1 - powers) * clean[schedule.prediction]
        self._table = torch.from_numpy(np.stack([mean, np.log(variance), np.log(betas)], axis=1)).float()

    def __call__(
        self, times: torch.Tensor, clean: torch.Tensor, error: torch.Tensor, range_: torch.Tensor
    ) -> torch.Tensor:
        """Returns the bound, whose gradient is that of the variances only.

        Args:
            times: Timesteps (B,).
            clean: Clean samples (B, C, H, W).
            error: Prediction minus its target (B, C, H, W), fp32.
            range_: v, the place between the two variances, mostly in [-1, 1]; (B, C, H, W), fp32.

        Returns:
            (B,) fp32: KL divergence of the step from the true posterior; at timestep 0, where the step ends in data,
            the negative log-likelihood of 8-bit values.
        """
        if self._table.device != times.device:
            self._table = self._table.to(times.device)
        rows = self._table[times.long()].view(-1, 3, *[1] * (clean.ndim - 1))
        mean, low, high = rows.unbind(1)
        # That it is a difference of means and not two keeps it exact in fp32 where variances are small.
        gap = mean * error.detach()
        log_variance = low + (range_ + 1) / 2 * (high - low)
        divergence = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + gap**2 * (-log_variance).exp())
        likelihood = _log_likelihood(clean.float(), -gap, log_variance / 2)
        first = (times == 0).view(-1, *[1] * (clean.ndim - 1))
        return torch.where(first, -likelihood, divergence).flatten(1).mean(1) / math.log(2)


def _betas(schedule: DiscreteSchedule) -> np.ndarray:
    """Returns betas in fp64; the sampler's own, because a ratio of fp32 powers near 1 has few digits of them."""
    if schedule.sampler is not None:
        return schedule.sampler.betas.double().numpy()
    powers = np.asarray(schedule.alphas_cumprod)
    return 1 - powers / np.append(1.0, powers[:-1])


def _log_likelihood(values: torch.Tensor, centred: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Returns the log probability of the bin of 8-bit values in [-1, 1] under a Gaussian.

    Args:
        values: The values, (B, C, H, W).
        centred: Values minus the mean.
        log_scale: Log of the standard deviation.
    """
    precision = (-log_scale).exp()
    above = _normal_cdf(precision * (centred + HALF_BIN))
    below = _normal_cdf(precision * (centred - HALF_BIN))
    # The bins at both ends are open.
    inside = torch.where(values > ENDS, 1 - below, above - below)
    return torch.where(values < -ENDS, above, inside).clamp(min=LEAST_PROBABILITY).log()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """Returns the tanh approximation of the Gaussian distribution function that the published training uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
