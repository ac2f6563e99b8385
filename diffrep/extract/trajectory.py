"""Features along trajectories: the state stays on the device, and what is read of it comes level by level.

A call whose features are wanted gives them and the network's output in one pass; the last call, where nothing follows
from it, ends after the deepest layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diffrep.backbones.conditioning import Condition
from diffrep.extract.plan import Leg
from diffrep.noise import Level

if TYPE_CHECKING:
    from diffrep.backbones import Backbone


@dataclass(frozen=True)
class Step:
    """One call on a trajectory.

    Attributes:
        level: Where the network was called.
        features: What was read, by address, as `Backbone.capture` gives it; empty where the level is not wanted.
        x: The state after the call (B, C, h, w) fp32, or before it where the state does not move on.
    """

    level: Level
    features: dict[str, torch.Tensor]
    x: torch.Tensor


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans, 2022): output = null + scale * (conditional - null).

    Attributes:
        scale: The scale.
        null: Condition of the other call, one row for all or one for each.
    """

    scale: float
    null: Condition


@torch.no_grad()
def walk(
    backbone: Backbone,
    leg: Leg,
    x: torch.Tensor,
    layers: Iterable[str],
    condition: Condition,
    guidance: Guidance | None = None,
    tokens: bool = False,
) -> Iterator[Step]:
    """Runs a batch along a trajectory and gives each call's features before the next is made.

    No features are held here once they are given: who sums them up as they come, and clears `Step.features`, needs no
    more memory for many levels than for one.

    Args:
        backbone: The frozen network.
        leg: What is run and read.
        x: First state (B, C, h, w): clean images or latents, or noise of the first level's spread.
        layers: Addresses or aliases.
        condition: As `Backbone.condition` gives it.
        guidance: Changes the path, not the call whose features are read.
        tokens: Keep token sequences as (B, N, C) in place of maps.
    """
    layers, x = list(layers), x.to(backbone.device).float()
    for index, level in enumerate(leg.trajectory.levels[: leg.calls]):
        if index >= leg.full:
            yield Step(level, backbone.capture(x, level.time, layers, condition, tokens), x)
            return
        features: dict[str, torch.Tensor] = {}
        null = None if guidance is None else backbone.denoise(x, level.time, guidance.null).float()
        if level.key in leg.wanted:
            features, output = backbone.capture_with_output(x, level.time, layers, condition, tokens)
        else:
            output = backbone.denoise(x, level.time, condition)
        if null is not None:
            output = null + guidance.scale * (output.float() - null)
        x, _ = leg.trajectory.update(backbone.schedule, x, output, index)
        yield Step(level, features, x)
        del features  # the next call would find them still here
