"""Matryoshka heads: scores from prefixes of one feature vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.errors import ConfigError
from diffrep.heads.head import Head, flatten


class MatryoshkaHead(Head):
    """Class scores from the first m values of the features, for several m at once.

    Matryoshka representation learning (Kusupati et al., 2022). State-dict keys are the published ones:
    `nesting_classifier_0` and on, or the first alone when tied. Features of a frozen network come in no order, so that
    their first m are any m; `project` learns z = P f first, and the prefixes are of z.

    Args:
        dim: Length of the flattened features.
        classes: Number of classes.
        nesting: Granularities m, ascending; None takes 8, 16, 32, ... and the whole length.
        tied: One linear map, cut to its first m columns, in place of one for each m (MRL-E).
        project: Length of z; None reads prefixes of the features themselves.

    Raises:
        ConfigError: The granularities do not ascend, or exceed the length.
    """

    applied: ClassVar[str] = "head({features})[-1]"

    def __init__(
        self,
        dim: int,
        classes: int,
        nesting: Sequence[int] | None = None,
        tied: bool = False,
        project: int | None = None,
    ):
        super().__init__()
        length = project or dim
        self.dim, self.tied = dim, tied
        self.nesting = _doubling(length) if nesting is None else list(nesting)
        if not self.nesting or self.nesting != sorted(set(self.nesting)) or not 0 < self.nesting[0] <= length:
            raise ConfigError(f"nesting must ascend from 1 or more, got {self.nesting}")
        if self.nesting[-1] > length:
            raise ConfigError(f"nesting {self.nesting} goes beyond the {length} values that the head reads")
        self.project = nn.Linear(dim, project, bias=False) if project else None
        for index, size in enumerate(self.nesting[-1:] if tied else self.nesting):
            self.add_module(f"nesting_classifier_{index}", nn.Linear(size, classes))

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Returns one tensor of scores (B, classes) for each granularity, for features that flatten to (B, dim)."""
        z = flatten(features, self.dim)
        if self.project is not None:
            z = self.project(z)
        if self.tied:
            whole = self.nesting_classifier_0
            return [F.linear(z[:, :size], whole.weight[:, :size], whole.bias) for size in self.nesting]
        return [self.get_submodule(f"nesting_classifier_{i}")(z[:, :size]) for i, size in enumerate(self.nesting)]


def matryoshka_loss(
    scores: Sequence[torch.Tensor], labels: torch.Tensor, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """Returns the sum over granularities of their cross-entropy (Kusupati et al., 2022).

    A sum and not a mean: the learning rate has to account for their number.

    Args:
        scores: Scores (B, classes) of each granularity.
        labels: (B,) int64.
        weights: A factor for each granularity; None takes 1.

    Raises:
        ConfigError: There are not as many weights as granularities.
    """
    weights = [1.0] * len(scores) if weights is None else weights
    if len(weights) != len(scores):
        raise ConfigError(f"{len(weights)} weights for {len(scores)} granularities; give one for each")
    return sum(weight * F.cross_entropy(score, labels) for weight, score in zip(weights, scores, strict=True))


def _doubling(length: int) -> list[int]:
    sizes = [8]
    while 2 * sizes[-1] < length:
        sizes.append(2 * sizes[-1])
    return [*(size for size in sizes if size < length), length]
