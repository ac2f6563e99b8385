"""From a student's features to its teacher's at any time: the adapters of feature distillation.

CleanDIFT (Stracke et al., 2025) trains them beside the student and leaves them away afterwards. The blocks are those
of the Hourglass Diffusion Transformer (Crowson et al., 2024). State-dict keys are our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from diffrep.backbones.checkpoint import check_state, read_state
from diffrep.backbones.folders import read_json
from diffrep.config import AdapterConfig
from diffrep.errors import CheckpointError
from diffrep.noise import DiscreteSchedule, Schedule, SigmaSchedule
from diffrep.store.layout import write_json

WEIGHTS, NOTE = "distill.safetensors", "distill.json"
# Inner width of the mapping network's blocks over its width.
MAPPING_EXPANSION = 3
EPS = 1e-6


@dataclass(frozen=True)
class TimeAxis:
    """The native times of a schedule, laid out on [0, 1].

    Attributes:
        low: Native time at 0.
        high: Native time at 1.
        log: Whether the axis is even in the logarithm of the time.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, schedule: Schedule) -> TimeAxis:
        """Returns the axis of all times of a schedule: t / (T - 1) for T timesteps, log sigma for EDM."""
        low, high = schedule.time_range
        if isinstance(schedule, SigmaSchedule):
            return cls(low, high, log=True)
        return cls(0.0 if isinstance(schedule, DiscreteSchedule) else low, high)

    def share(self, time: torch.Tensor) -> torch.Tensor:
        """Returns where native times lie, in fp32."""
        low, high, time = self._ends(time.float())
        return (time - low) / (high - low)

    def moved(self, time: float, by: torch.Tensor) -> torch.Tensor:
        """Returns the native times some shares of the axis away from one, at most its ends, in the dtype of `by`."""
        moved = time * (self.high / self.low) ** by if self.log else time + (self.high - self.low) * by
        return moved.clamp(self.low, self.high)

    def _ends(self, time: torch.Tensor) -> tuple[float, float, torch.Tensor]:
        if self.log:
            return math.log(self.low), math.log(self.high), time.log()
        return self.low, self.high, time


class TimeAdapters(nn.Module):
    """An adapter for each layer, and what tells them the time.

    Each is the identity at first: a stack of residual feed-forward blocks whose last layers start at zero.

    Args:
        channels: Channels of each layer, by its address.
        axis: Places the teacher's times on [0, 1].
        config: Sizes.

    Attributes:
        level: Level that the student's features are read at, such as "clean@261.3"; empty until it is known.
    """

    def __init__(self, channels: Mapping[str, int], axis: TimeAxis, config: AdapterConfig | None = None):
        super().__init__()
        self.channels, self.axis, self.config = dict(channels), axis, config or AdapterConfig()
        self.level = ""
        width = self.config.width
        self.fourier = FourierFeatures(width)
        self.time_in = nn.Linear(width, width, bias=False)
        self.mapping = MappingNetwork(width, self.config.depth)
        # Addresses hold dots, which names of modules may not.
        self.layers = nn.ModuleList(
            nn.ModuleList(
                FeedForward(count, max(1, round(count * self.config.expansion)), width)
                for _ in range(self.config.blocks)
            )
            for count in self.channels.values()
        )

    def forward(self, features: Mapping[str, torch.Tensor], times: torch.Tensor) -> dict[str, torch.Tensor]:
        """Turns features of clean images into what the teacher would give at some noise levels.

        Args:
            features: For each layer the student's features, as maps (B, C, H, W) or as tokens (B, N, C).
            times: Native times (B, T) of the teacher, T for each image.

        Returns:
            (B, T, N, C) for each layer, N positions in row-major order. The features come once, whatever T is.
        """
        cond = self.mapping(self.time_in(self.fourier(self.axis.share(times))))[:, :, None]
        adapted = {}
        for name, blocks in zip(self.channels, self.layers, strict=True):
            x = positions(features[name])[:, None]
            for block in blocks:
                x = block(x, cond)
            adapted[name] = x
        return adapted


class FourierFeatures(nn.Module):
    """Cosines and sines of a place on [0, 1] at frequencies drawn once from a unit normal.

    Args:
        width: Of the result, even.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width // 2))

    def forward(self, share: torch.Tensor) -> torch.Tensor:
        """Returns (..., width) for places (...)."""
        angles = 2 * math.pi * share[..., None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MappingNetwork(nn.Module):
    """Residual feed-forward blocks between two norms.

    Args:
        width: Of input and output.
        depth: Blocks.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.gain_in = nn.Parameter(torch.ones(width))
        self.blocks = nn.ModuleList(FeedForward(width, MAPPING_EXPANSION * width) for _ in range(depth))
        self.gain_out = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (..., width) to (..., width)."""
        x = _normed(x) * self.gain_in
        for block in self.blocks:
            x = block(x)
        return _normed(x) * self.gain_out


class FeedForward(nn.Module):
    """Residual SwiGLU block (Shazeer, 2020) behind an RMS norm, which a condition may scale channel by channel.

    Args:
        channels: Of input and output.
        inner: Width inside.
        condition: Width of the condition; None for an ordinary norm.
    """

    def __init__(self, channels: int, inner: int, condition: int | None = None):
        super().__init__()
        if condition is None:
            self.gain = nn.Parameter(torch.ones(channels))
        else:
            self.scale = _zeros(nn.Linear(condition, channels, bias=False))
        self.up = nn.Linear(channels, 2 * inner, bias=False)
        self.down = _zeros(nn.Linear(inner, channels, bias=False))

    def forward(self, x: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """Returns x plus the block's part of it.

        Args:
            x: (..., channels).
            cond: (..., condition); it and x are broadcast against each other.
        """
        gain = self.gain if cond is None else 1 + self.scale(cond)
        value, gate = self.up(_normed(x) * gain).chunk(2, dim=-1)
        return x + self.down(value * F.silu(gate))


def positions(feature: torch.Tensor) -> torch.Tensor:
    """Returns a map (B, C, H, W) or tokens (B, N, C) as (B, N, C), N in row-major order."""
    return feature.flatten(2).transpose(1, 2) if feature.ndim == 4 else feature


def save_adapters(adapters: TimeAdapters, folder: Path, level: str, note: Mapping[str, Any]) -> None:
    """Writes `distill.safetensors` and `distill.json`.

    Args:
        adapters: What is written.
        folder: Where to.
        level: Level that the student's features are read at.
        note: Further facts for the JSON.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapters.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    own = {
        "level": level,
        "noise": "none",
        "channels": adapters.channels,
        "axis": asdict(adapters.axis),
        "adapter": adapters.config.model_dump(),
    }
    write_json(folder / NOTE, own | dict(note))


def load_adapters(folder: str | Path) -> TimeAdapters:
    """Reads the adapters beside a distilled student; `.level` is the level that its features are read at.

    Example:
        >>> adapters = load_adapters("runs/student/model")  # doctest: +SKIP
        >>> student = load_backbone("runs/student/model")  # doctest: +SKIP
        >>> time = student.schedule.level(adapters.level).time  # doctest: +SKIP
        >>> features = student.capture(x, time, adapters.channels, tokens=True)  # doctest: +SKIP
        >>> noised = adapters(features, torch.tensor([[1, 261, 600]]))  # as the teacher's at these  # doctest: +SKIP

    Args:
        folder: The `model/` of a distillation.

    Raises:
        CheckpointError: There are none, or they are damaged.
    """
    folder = Path(folder)
    note = read_json(folder / NOTE)
    try:
        adapters = TimeAdapters(note["channels"], TimeAxis(**note["axis"]), AdapterConfig(**note["adapter"]))
        adapters.level = note["level"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / NOTE} does not describe adapters: {error!r}") from error
    state = read_state(folder / WEIGHTS)
    check_state(folder / WEIGHTS, adapters, state, "distill")
    adapters.load_state_dict(state)
    return adapters.requires_grad_(False).eval()


def _normed(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def _zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer
