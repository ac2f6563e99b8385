"""What a training run minimises: the form of an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffrep.train.order import StepRandom

if TYPE_CHECKING:
    from diffrep.train.average import Average
    from diffrep.train.data import TrainingSet
    from diffrep.train.log import Stopwatch


@dataclass(frozen=True)
class Batch:
    """What of a step is one process's, on the device.

    Attributes:
        rows: Places of the samples in the data set.
        tensors: "image" (B, C, H, W) in [0, 1], or "latents" (B, C, h, w), or "moments" (B, 2C, h, w); "label" (B,)
            int64; "targets.NAME" (B, D, h, w).
    """

    rows: list[int]
    tensors: Mapping[str, torch.Tensor]

    @property
    def clean(self) -> torch.Tensor:
        """Images, latents or moments."""
        return next(self.tensors[name] for name in ("image", "latents", "moments") if name in self.tensors)


@dataclass
class Loss:
    """What an objective gives for a batch.

    Attributes:
        total: What is minimised, a scalar in fp32.
        parts: Scalars that are logged, by name.
        places: Of each sample's loss: the share of the way to noise (B,) in [0, 1]; None where that means nothing.
        values: The losses (B,) that belong to `places`.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    places: torch.Tensor | None = None
    values: torch.Tensor | None = None


class Objective(ABC):
    """A loss, what it draws at random, and what is left of it at the end.

    The trainer owns the module that is trained, data, optimizer and processes, and asks an objective in each step:

        drawn = objective.draw(shape, rng)                                 # for the samples of all processes, then cut
        loss = objective.loss(model, step, *objective.inputs(batch, drawn))    # for each part of this process's share
    """

    @property
    @abstractmethod
    def image_channels(self) -> int:
        """Channels of the images that it is trained on, 1 or 3."""

    @property
    def flops(self) -> int | None:
        """FLOPs of the model's forward on one sample; None where they are not known."""
        return None

    @property
    def teacher_watch(self) -> Stopwatch | None:
        """Times the targets of a step; None where there are none."""
        return None

    def attach(self, data: TrainingSet) -> None:  # noqa: B027 - most need no more
        """Takes note of the data set, for objectives that need more of a sample than its tensors."""

    @abstractmethod
    def module(self) -> nn.Module:
        """Returns what is trained, at its start; called once, after `attach`."""

    def follow(self, average: Average) -> None:  # noqa: B027 - most need no more
        """Takes note of the averaged weights, for objectives whose targets come from them."""

    def parameters(self, module: nn.Module) -> list[dict[str, Any]]:
        """Returns the parameter groups of the optimizer; a group's "scale" multiplies the learning rate."""
        return [{"params": [weight for weight in module.parameters() if weight.requires_grad]}]

    @abstractmethod
    def draw(self, shape: tuple[int, ...], rng: StepRandom) -> tuple[Any, ...]:
        """Draws what a step needs at random.

        Args:
            shape: Of `Batch.clean` over all processes.
            rng: The step's randomness.

        Returns:
            Tensors (B, ...), or values that are cut and moved as tensors are: `value[slice]`, `value.to(device)`.
        """

    @abstractmethod
    def inputs(self, batch: Batch, drawn: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns what `loss` takes besides the model and the step, without gradients.

        Args:
            batch: The samples.
            drawn: Their rows of what `draw` gave, on the device.
        """

    @abstractmethod
    def loss(self, model: nn.Module, step: int, *inputs: Any) -> Loss:
        """Returns the mean loss over the samples.

        Args:
            model: The module as the trainer has prepared it.
            step: Steps that are done.
            inputs: What `inputs` gave.
        """

    @abstractmethod
    def export(self, module: nn.Module, target: Path, dtype: torch.dtype) -> None:
        """Writes a folder that `diffrep.load_backbone` opens; the module holds the averaged weights."""

    def facts(self, module: nn.Module) -> dict[str, Any]:
        """Returns what results.json says besides the loss; the module holds the averaged weights."""
        return {}
