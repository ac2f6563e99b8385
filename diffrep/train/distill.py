"""Feature distillation: a student that reads clean images, as CleanDIFT (Stracke et al., 2025) trains it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from diffrep.backbones import Backbone
from diffrep.backbones.conditioning import Condition
from diffrep.backbones.fresh import trainable
from diffrep.backbones.saving import options_of, save_backbone
from diffrep.config import DistillConfig, LevelSpec
from diffrep.errors import ConfigError, LayerError
from diffrep.extract.job import open_backbone
from diffrep.noise import DiscreteSchedule, Schedule, mix
from diffrep.taps import Recorder
from diffrep.train.adapters import TimeAdapters, TimeAxis, positions, save_adapters
from diffrep.train.conditions import Conditions
from diffrep.train.data import TrainingSet
from diffrep.train.objective import Batch, Loss, Objective
from diffrep.train.order import StepRandom

# Where CleanDIFT's students start, of 1,000 timesteps, and the noise-to-signal ratio of Stable Diffusion there.
START, START_SIGMA = 261, 0.72


class Student(nn.Module):
    """A trainable copy of a teacher's network that is told one learned time, and adapters to the teacher's features.

    What no chosen layer depends on stays as the teacher has it and is not trained. The network is in eval mode
    whatever mode this module is in: dropout and dropped labels would be noise in the features.

    Args:
        teacher: The frozen backbone, which says how the network is called; no submodule.
        config: Layers, first time and adapters.

    Raises:
        LayerError: A layer does not exist, has no positions, or does not depend on any weight.
        ConfigError: The first time is none of the schedule's.
    """

    def __init__(self, teacher: Backbone, config: DistillConfig):
        super().__init__()
        self.teacher = teacher
        self.addresses = teacher.addresses(config.layers)
        axis = TimeAxis.of(teacher.schedule)
        self.first = float(_first_time(teacher.schedule, config.time_init))
        # A share of all times and no native time, so that Adam's steps, which have the size of the learning rate,
        # mean the same for timesteps up to 999 and for flows up to 1.
        self.drift = nn.Parameter(torch.zeros(()))
        self.network = trainable(teacher.network)
        self.adapters = TimeAdapters(_channels(teacher, self.addresses), axis, config.adapter)
        self.to(teacher.device)
        # torch.compile ignores hooks that come after it.
        self._recorder = Recorder(self.network, self.addresses.values(), detach=False).register()
        self._freeze_unreached(config.learn_time)

    @property
    def time(self) -> torch.Tensor:
        """The native time that the network is told, a scalar."""
        return self.adapters.axis.moved(self.first, self.drift)

    def features(self, clean: torch.Tensor, cond: Condition) -> dict[str, torch.Tensor]:
        """Reads clean inputs, as `Backbone.capture` does with `tokens=True`, with gradients.

        Args:
            clean: (B, C, h, w).
            cond: Named tensors of one row, or one for each sample.
        """
        teacher, count = self.teacher, len(clean)
        rows = {name: row.expand(count, *row.shape[1:]) for name, row in cond.items()}
        time = self.time.expand(count)
        with teacher.attention or nullcontext():
            found = self._recorder.run(lambda: teacher.call(self.network, clean, time, rows))
        return {name: found[address] for name, address in self.addresses.items()}

    def forward(self, clean: torch.Tensor, cond: Condition, times: torch.Tensor) -> dict[str, torch.Tensor]:
        """Predicts the teacher's features (B, T, N, C) of each layer at its times (B, T), in one pass."""
        return self.adapters(self.features(clean, cond), times)

    def train(self, mode: bool = True) -> Student:
        """Sets the mode of the adapters."""
        super().train(mode)
        self.network.eval()
        return self

    def _freeze_unreached(self, learn_time: bool) -> None:
        teacher = self.teacher
        size = teacher.sample_size
        clean = torch.zeros(1, teacher.in_channels, size, size, device=teacher.device)
        example = teacher.conditioner.example()
        cond = {name: torch.zeros(row.shape, dtype=row.dtype, device=teacher.device) for name, row in example.items()}
        features = self.features(clean, cond)
        without = [name for name, feature in features.items() if not feature.requires_grad]
        if without:
            raise LayerError(
                f"a student cannot learn {', '.join(map(repr, without))}: no gradient passes from there to a weight; "
                "attention maps and the network's input are such layers"
            )
        weights = [self.drift, *(weight for weight in self.network.parameters() if weight.requires_grad)]
        total = sum(feature.float().sum() for feature in features.values())
        for weight, grad in zip(weights, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
            weight.requires_grad_(grad is not None)
        # Networks that round their time, by iDDPM's table, give it no gradient either.
        self.drift.requires_grad_(learn_time and self.drift.requires_grad)


class Distillation(Objective):
    """Distance between a student's adapted features and its teacher's, summed over layers.

    The teacher sees each image once in each bin of its times, with Gaussian noise; the student sees it once, clean.

    Args:
        config: Teacher, layers and sizes.
        device: Where both are.

    Attributes:
        teacher: The frozen backbone.

    Raises:
        ConfigError: The teacher cannot be written as a folder, or has no such times.
        LayerError: A layer does not exist or cannot be learned.
    """

    def __init__(self, config: DistillConfig, device: torch.device):
        self.config = config
        self.teacher = open_backbone(config.teacher.model_copy(update={"device": str(device), "dtype": "float32"}))
        options_of(self.teacher)  # which fails now, or else after the training
        self.layers = list(self.teacher.addresses(config.layers))
        self.times = _range(self.teacher.schedule, config.times)
        self.axis = TimeAxis.of(self.teacher.schedule)
        self.conditions: Conditions | None = None
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}

    @property
    def image_channels(self) -> int:
        """Channels of the teacher's images."""
        return self.teacher.image_channels

    def module(self) -> Student:
        """Returns a student at its start."""
        return Student(self.teacher, self.config)

    def attach(self, data: TrainingSet) -> None:
        """Reads what the images are conditioned on.

        Raises:
            ConfigError: The condition does not fit the network, or the data have no labels.
            DataError: An image has no caption.
        """
        self.conditions = Conditions(self.config, self.teacher, data.images)

    def parameters(self, module: Student) -> list[dict[str, Any]]:
        """Returns the weights, and the time, which must not decay to zero."""
        weights = [weight for weight in module.parameters() if weight.requires_grad and weight is not module.drift]
        return [{"params": weights}] + (
            [{"params": [module.drift], "weight_decay": 0.0}] if module.drift.requires_grad else []
        )

    def draw(self, shape: tuple[int, ...], rng: StepRandom) -> tuple[torch.Tensor, ...]:
        """Draws times and noise.

        Returns:
            Native times, signal and noise coefficients (B, T), noise (B, T, C, h, w); and where the codec's posterior
            is sampled, noise (B, C, h, w).
        """
        count, bins = shape[0], self.config.bins
        place = (np.arange(bins) + rng.uniform(count, bins)) / bins
        levels = [self.teacher.schedule.at(time) for time in self._native(place).reshape(-1).tolist()]
        numbers = zip(*((level.time, level.signal, level.noise) for level in levels), strict=True)
        inner = (self.teacher.in_channels, *self._latent_size(*shape[-2:]))
        drawn = [rng.noise(count, bins, *inner)]
        if self.teacher.codec.random and self.config.posterior == "sample":
            drawn.append(rng.noise(count, *inner))
        return (*(torch.tensor(one).view(count, bins) for one in numbers), *drawn)

    @torch.no_grad()
    def inputs(
        self, batch: Batch, drawn: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, Condition, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns clean inputs of the network (B, C, h, w), their condition, and what was drawn for them."""
        time, signal, noise, eps, *spread = drawn
        posterior = self.teacher.codec.encode(batch.tensors["image"])
        clean = posterior.mean.float()
        if spread:
            clean = clean + posterior.std.float() * spread[0]
        return clean, self.conditions(batch.rows), time, signal, noise, eps

    def loss(
        self,
        model: nn.Module,
        step: int,
        clean: torch.Tensor,
        cond: Condition,
        time: torch.Tensor,
        signal: torch.Tensor,
        noise: torch.Tensor,
        eps: torch.Tensor,
    ) -> Loss:
        """Returns the sum over layers of the mean distance over images, times and positions.

        Args:
            model: Called as a `Student` is.
            step: Steps that are done.
            clean: (B, C, h, w).
            cond: One row for all or one for each image.
            time: Native times (B, T).
            signal: Coefficients (B, T).
            noise: Coefficients (B, T).
            eps: Noise (B, T, C, h, w).
        """
        count, bins = time.shape
        noised = mix(clean.repeat_interleave(bins, 0), eps.flatten(0, 1), signal.flatten(), noise.flatten())
        many = {name: row if len(row) == 1 else row.repeat_interleave(bins, 0) for name, row in cond.items()}
        wanted = self.teacher.capture(noised, time.flatten(), self.layers, many, tokens=True)
        found = model(clean, cond, time)
        distances = {
            name: distance(found[name], positions(wanted[name]).unflatten(0, (count, bins)), self.config.loss)
            for name in self.layers
        }
        return Loss(sum(distances.values()), {f"distill/{name}": one.detach() for name, one in distances.items()})

    def export(self, module: Student, target: Path, dtype: torch.dtype) -> None:
        """Writes the student as a backbone like the teacher, with adapters, time and level beside it."""
        # Past diffusers' own `to` and `float`, as in `Generative`.
        save_backbone(self.teacher, nn.Module.to(module.network, dtype), target)
        nn.Module.float(module.network)
        save_adapters(module.adapters, target, **self.facts(module), note=self._note())

    def facts(self, module: Student) -> dict[str, Any]:
        """Returns the level that the student's features are read at, which holds its time."""
        return {"level": f"clean@{module.time.item():.9g}"}

    def _note(self) -> dict[str, Any]:
        teacher = {"source": self.config.teacher.source, "weights": self.teacher.weights_hash}
        return {"teacher": teacher, "loss": self.config.loss, "load_backbone": options_of(self.teacher)}

    def _native(self, place: np.ndarray) -> np.ndarray:
        """Returns native times of places on [0, 1) of the range."""
        low, high = self.times
        if isinstance(self.teacher.schedule, DiscreteSchedule):
            return np.floor(low + (high - low + 1) * place)
        width = self.axis.share(torch.tensor([low, high])).diff().item()
        return self.axis.moved(low, torch.from_numpy(width * place)).clamp(max=high).numpy()

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        if (height, width) not in self._sizes:
            self._sizes[height, width] = self.teacher.codec.latent_size(height, width)
        return self._sizes[height, width]


def distance(found: torch.Tensor, wanted: torch.Tensor, kind: str) -> torch.Tensor:
    """Returns the mean distance over all positions of features (..., C) of equal shape, in fp32.

    Args:
        found: Of the student.
        wanted: Of the teacher.
        kind: "cosine" (minus the cosine over channels, from -1 to 1), "mse" or "l1".
    """
    found, wanted = found.float(), wanted.float()
    if kind == "cosine":
        return -F.cosine_similarity(found, wanted, dim=-1).mean()
    return F.mse_loss(found, wanted) if kind == "mse" else F.l1_loss(found, wanted)


def _channels(teacher: Backbone, addresses: Mapping[str, Any]) -> dict[str, int]:
    shapes = teacher.shapes(addresses, teacher.sample_size, teacher.sample_size, tokens=True)
    flat = [f"{name} {shape}" for name, shape in shapes.items() if len(shape) not in (2, 3)]
    if flat:
        raise LayerError(
            f"a student learns maps (C, H, W) and tokens (N, C), and these are neither: {', '.join(flat)}"
        )
    return {name: shape[0] if len(shape) == 3 else shape[1] for name, shape in shapes.items()}


def _first_time(schedule: Schedule, spec: LevelSpec | None) -> float:
    if spec is not None:
        return schedule.level(spec).time
    if isinstance(schedule, DiscreteSchedule):
        return START * len(schedule.alphas_cumprod) / 1000
    return schedule.at_sigma(START_SIGMA).time


def _range(schedule: Schedule, given: tuple[LevelSpec, LevelSpec] | None) -> tuple[float, float]:
    """Returns the least and the greatest native time that the teacher sees."""
    if given is None:
        low, high = schedule.time_range
        return (1.0, high) if isinstance(schedule, DiscreteSchedule) else (low, high)
    low, high = sorted(float(schedule.level(spec).time) for spec in given)
    if low == high:
        raise ConfigError(f"distill.times {list(given)} is one time; give the first and the last")
    return low, high
