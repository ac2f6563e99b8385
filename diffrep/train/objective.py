"""What a training run minimises: the form of an objective, and denoising."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.nn import functional as F

from diffrep.config import ScheduleConfig
from diffrep.data import ImageSet


class Objective(ABC):
    """A loss, what it draws at random, and what is left of it at the end.

    The trainer owns the module that is trained, images, optimizer and processes, and asks an objective in each step:

        drawn = objective.draw(shape, rng)                                  # for the images of all processes, then cut
        loss = objective.loss(model, *objective.inputs(images, rows, drawn))   # for each part of this process's share
    """

    def attach(self, images: ImageSet) -> None:  # noqa: B027 - most need no more
        """Takes note of the data set, for objectives that need more of a sample than its pixels."""

    def parameters(self, module: nn.Module) -> list[dict[str, Any]]:
        """Returns the parameter groups of the optimizer; a group's "scale" multiplies the learning rate."""
        return [{"params": [weight for weight in module.parameters() if weight.requires_grad]}]

    @abstractmethod
    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """Draws what a step needs at random.

        Args:
            shape: (B, C, H, W) of the images over all processes.
            rng: The step's generator.

        Returns:
            CPU tensors (B, ...).
        """

    @abstractmethod
    def inputs(self, images: torch.Tensor, rows: Sequence[int], drawn: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Returns what `loss` takes besides the model.

        Args:
            images: (B, C, H, W) in [0, 1], on the device.
            rows: Their places in the data set.
            drawn: Their rows of what `draw` gave, on the device.
        """

    @abstractmethod
    def loss(self, model: nn.Module, *inputs: Any) -> torch.Tensor:
        """Returns the mean loss over the images, a scalar in fp32.

        Args:
            model: The module as the trainer has prepared it.
            inputs: What `inputs` gave.
        """

    @abstractmethod
    def export(self, module: nn.Module, target: Path, dtype: torch.dtype) -> None:
        """Writes a folder that `diffrep.load_backbone` opens; the module holds the averaged weights."""

    def facts(self, module: nn.Module) -> dict[str, Any]:
        """Returns what results.json says besides the loss; the module holds the averaged weights."""
        return {}


class Denoising(Objective):
    """Mean squared error of the network's prediction of the noise, or of v (Ho et al., 2020; Salimans and Ho, 2022).

    Args:
        schedule: Noise schedule and prediction type.
        timesteps: "uniform", or "low" for t = T u^2.
    """

    def __init__(self, schedule: ScheduleConfig, timesteps: str = "uniform"):
        self.scheduler = DDPMScheduler(**schedule.model_dump(), clip_sample=False)
        self.timesteps = timesteps

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws timesteps (B,) int64 and unit Gaussian noise (B, C, H, W) fp32."""
        u = rng.random(shape[0])
        total = self.scheduler.config.num_train_timesteps
        t = np.floor(total * (u**2 if self.timesteps == "low" else u)).astype(np.int64)
        return torch.from_numpy(t), torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    def inputs(
        self, images: torch.Tensor, rows: Sequence[int], drawn: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the images in [-1, 1], and what was drawn."""
        t, eps = drawn
        return images * 2 - 1, t, eps

    def loss(self, model: nn.Module, clean: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared error.

        Args:
            model: Called as model(x_t, t); gives an object with `.sample` (B, C, H, W).
            clean: Clean images (B, C, H, W) in [-1, 1].
            t: Timesteps (B,).
            eps: Noise (B, C, H, W).
        """
        noisy = self.scheduler.add_noise(clean, eps, t)
        target = eps
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(clean, eps, t)
        return F.mse_loss(model(noisy, t).sample.float(), target)

    def export(self, module: nn.Module, target: Path, dtype: torch.dtype) -> None:
        """Writes the network as a folder of diffusers, with its scheduler."""
        # Past diffusers' own `to` and `float`, which warn of modules to keep in fp32 even when there are none.
        nn.Module.to(module, dtype).save_pretrained(target)
        nn.Module.float(module)
        self.scheduler.save_pretrained(target / "scheduler")
