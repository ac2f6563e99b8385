"""Trajectories: the deterministic way from an image to noise (inversion) or from noise to an image (generation)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from diffrep.config import LevelSpec
from diffrep.errors import ConfigError
from diffrep.noise.level import ON_TRAJECTORY, Level
from diffrep.noise.prediction import solve
from diffrep.noise.schedule import DiscreteSchedule, Schedule


@dataclass(frozen=True)
class Trajectory:
    """The calls of a network along DDIM's path without noise (Song et al., 2021; eta = 0), for any prediction.

    Attributes:
        direction: "inversion" or "generation".
        levels: Where the network is called, in that order; a key is the call's spec, "inversion 3/10".
        end: Where the update after the last call leads; None where the last call has nothing after it.
    """

    direction: Literal["inversion", "generation"]
    levels: tuple[Level, ...]
    end: Level | None

    @property
    def name(self) -> str:
        """What it is called: "inversion of 10 steps"."""
        kind = self.levels[0].key.split()[0]
        return f"{kind} of {len(self.levels)} steps"

    @property
    def updates(self) -> int:
        """Number of calls after which the state moves on."""
        return len(self.levels) - (self.end is None)

    def update(
        self, schedule: Schedule, x: torch.Tensor, output: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Moves a state on.

        Args:
            schedule: The network's.
            x: The state (B, C, h, w) that call `index` was given.
            output: What the network gave for it.
            index: Number of the call, less than `updates`.

        Returns:
            The next state, and the clean sample as this call sees it; (B, C, h, w) fp32.

        Raises:
            ConfigError: The output does not determine them; see `solve`.
        """
        target = (*self.levels, self.end)[index + 1]
        clean, eps = solve(schedule, x, output, self.levels[index])
        return target.signal * clean + target.noise * eps, clean


def read_levels(
    schedule: Schedule, specs: Iterable[LevelSpec], noise: str
) -> tuple[list[tuple[LevelSpec, Level]], list[Trajectory]]:
    """Reads the levels of a request, on trajectories or not.

    "inversion k/N" and "generation k/N" are one of N calls, counted from 0 at the least noise. The calls of a
    generation are at the sampler's N steps, `Schedule.steps`. Those of an inversion are at the same steps after the
    image itself, which stands for the state at the least noise the network knows and has that level's coefficients;
    where the first step is nearer to that level than half way to the second, the image takes its place, else it comes
    before it and the last step is where the inversion leads.

    "hf.inversion k/N" and "hf.generation k/N" are the calls of Diffusion Hyperfeatures (Luo et al., 2023), and k is
    its save index: timesteps are T // N apart, from 0; an inversion is called at -1, where nothing is mixed, 0, ...
    with k = N - 1 first, and a generation at (N - 1) (T // N), ..., 0 with k = 0 first.

    Args:
        schedule: The network's.
        specs: As users write them.
        noise: The request's: "gaussian", "none", "inversion" or "generation".

    Returns:
        Each spec with its level, and the trajectories that have at least one of the levels.

    Raises:
        ConfigError: A spec cannot be read, lies outside the schedule, or does not go with `noise`.
    """
    if noise not in ("inversion", "generation"):
        return [(spec, schedule.level(spec)) for spec in specs], []
    found: list[tuple[LevelSpec, Level]] = []
    trajectories: dict[tuple[bool, int], Trajectory] = {}
    for spec in specs:
        text = str(spec).strip()
        match = ON_TRAJECTORY.fullmatch(text)
        if match is None or match[2] != noise:
            raise ConfigError(
                f"level {text!r} does not go with noise={noise!r}, whose levels are all written '{noise} k/N' or "
                f"'hf.{noise} k/N'"
            )
        place, count = int(match[3]), int(match[4])
        if not 0 <= place < count:
            raise ConfigError(f"level {text!r}: steps of N are counted from 0 to N - 1")
        published = match[1] is not None
        if (published, count) not in trajectories:
            build = _hyperfeatures if published else _sampler
            trajectories[published, count] = build(schedule, noise, count, text)
        key = f"{match[1] or ''}{noise} {place}/{count}"
        levels = trajectories[published, count].levels
        found.append((spec, next(level for level in levels if level.key == key)))
    return found, list(trajectories.values())


def _sampler(schedule: Schedule, direction: str, count: int, text: str) -> Trajectory:
    times = schedule.steps(count)
    if len(times) < count:
        raise ConfigError(f"level {text!r}: this schedule has only {len(times)} steps")
    steps = [schedule.at(time) for time in times]
    if direction == "generation":
        return _named(direction, steps[::-1], _clean(schedule), "generation", descending=True)
    first = schedule.at(schedule.least_time)
    beside = count > 1 and abs(steps[0].time - first.time) < abs(steps[1].time - steps[0].time) / 2
    path = [first, *steps[beside:]]
    return _named(direction, path[:count], path[count] if count < len(path) else None, "inversion", descending=False)


def _hyperfeatures(schedule: Schedule, direction: str, count: int, text: str) -> Trajectory:
    if not isinstance(schedule, DiscreteSchedule):
        raise ConfigError(
            f"level {text!r}: Hyperfeatures' timesteps are those of a discrete schedule, and this network's is "
            f"continuous; write '{direction} k/N'"
        )
    total = len(schedule.alphas_cumprod)
    if count > total:
        raise ConfigError(f"level {text!r}: this schedule has only {total} steps")
    steps = [schedule.at(index * (total // count)) for index in range(count)]
    clean = _clean(schedule)
    if direction == "generation":
        return _named(direction, steps[::-1], clean, "hf.generation", descending=False)
    return _named(direction, [clean, *steps[:-1]], steps[-1], "hf.inversion", descending=True)


def _clean(schedule: Schedule) -> Level:
    """Returns the image itself; Hyperfeatures calls its network there, at a time below all others."""
    return Level("clean", -1 if isinstance(schedule, DiscreteSchedule) else schedule.clean_time, 1.0, 0.0)


def _named(
    direction: Literal["inversion", "generation"], calls: list[Level], end: Level | None, kind: str, descending: bool
) -> Trajectory:
    places = range(len(calls))
    keys = [f"{kind} {place}/{len(calls)}" for place in (reversed(places) if descending else places)]
    levels = tuple(replace(level, key=key) for level, key in zip(calls, keys, strict=True))
    return Trajectory(direction, levels, end)
