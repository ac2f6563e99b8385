"""What a training step minimises."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch.nn import functional as F

from diffrep.config import ScheduleConfig


class Denoising:
    """Mean squared error of the network's prediction of the noise, or of v (Ho et al., 2020; Salimans and Ho, 2022).

    Args:
        schedule: Noise schedule and prediction type.
        timesteps: "uniform", or "low" for t = T u^2.
    """

    def __init__(self, schedule: ScheduleConfig, timesteps: str = "uniform"):
        self.scheduler = DDPMScheduler(**schedule.model_dump(), clip_sample=False)
        self.timesteps = timesteps

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws what a step needs at random.

        Args:
            shape: (B, C, H, W) of the batch over all processes.
            rng: The step's generator.

        Returns:
            Timesteps (B,) int64 and unit Gaussian noise (B, C, H, W) fp32, both on the CPU.
        """
        u = rng.random(shape[0])
        total = self.scheduler.config.num_train_timesteps
        t = np.floor(total * (u**2 if self.timesteps == "low" else u)).astype(np.int64)
        return torch.from_numpy(t), torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    def loss(self, network: torch.nn.Module, clean: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared error, a scalar in fp32.

        Args:
            network: Called as network(x_t, t); gives an object with `.sample` (B, C, H, W).
            clean: Clean images (B, C, H, W) in [-1, 1].
            t: Timesteps (B,).
            eps: Noise (B, C, H, W).
        """
        noisy = self.scheduler.add_noise(clean, eps, t)
        target = eps
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(clean, eps, t)
        return F.mse_loss(network(noisy, t).sample.float(), target)
