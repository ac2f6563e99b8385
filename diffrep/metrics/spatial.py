"""How much of a feature map's similarity is where things are: the spatial metrics of iREPA (Singh et al., 2025).

All read cosines between the positions of one map, in fp64, and average over maps of the same grid. Greater values went
with better samples of models that were aligned to the encoder. The paper's fourth, SRSS, needs segmented images and is
not here.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from diffrep.errors import DataError

# Manhattan distance from which positions are far in LDS, and the last distance that CDS fits.
FAR, REACH = 6, 8


def lds(maps: torch.Tensor) -> float:
    """Local less distant similarity: mean cosine of 4-neighbours minus that of positions at Manhattan distance >= 6.

    Args:
        maps: (B, C, h, w) with h + w >= 8.

    Raises:
        DataError: The grid is too small, or values are not finite.
    """
    tokens = _unit(maps, FAR)
    sums, counts = _by_distance(tokens, FAR - 1)
    positions = tokens.shape[2] * tokens.shape[3]
    # All pairs come from the sum over positions; what is near is taken off, so no positions x positions are made.
    pairs = (tokens.sum((2, 3)).square().sum(1) - tokens.square().sum((1, 2, 3))) / 2
    far = (pairs - sums.sum(0)) / (positions * (positions - 1) // 2 - counts.sum())
    return (sums[0] / counts[0] - far).mean().item()


def cds(maps: torch.Tensor) -> float:
    """Decay of similarity: minus the slope of the mean cosine over the Manhattan distances 1 to 8, by least squares.

    Args:
        maps: (B, C, h, w) with h + w >= 10.

    Returns:
        Cosine lost for each step of distance.

    Raises:
        DataError: The grid is too small, or values are not finite.
    """
    sums, counts = _by_distance(_unit(maps, REACH), REACH)
    cosines = (sums / counts[:, None]).mean(1)
    steps = torch.arange(1, REACH + 1, dtype=cosines.dtype, device=cosines.device)
    steps = steps - steps.mean()
    return -((steps @ cosines) / (steps @ steps)).item()


def rmsc(maps: torch.Tensor) -> float:
    """Root mean square contrast, in [0, 1]: sqrt of the mean of ||u - mean u||^2 over positions, u unit tokens.

    Args:
        maps: (B, C, h, w).

    Raises:
        DataError: Values are not finite.
    """
    tokens = _unit(maps, 0)
    contrast = (tokens - tokens.mean((2, 3), keepdim=True)).square().sum(1)
    return contrast.mean((1, 2)).sqrt().mean().item()


def _unit(maps: torch.Tensor, reach: int) -> torch.Tensor:
    if maps.ndim != 4 or not len(maps):
        raise DataError(f"feature maps are (B, C, h, w), one or more; given: {tuple(maps.shape)}")
    height, width = maps.shape[2:]
    if height + width - 2 < reach:
        raise DataError(
            f"positions at Manhattan distance {reach} are compared, which needs h + w >= {reach + 2}; the grid is "
            f"{height} x {width}"
        )
    if not torch.isfinite(maps).all():
        raise DataError("the feature maps hold NaN or infinity")
    return F.normalize(maps.double(), dim=1)


def _by_distance(tokens: torch.Tensor, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the cosines of all pairs at Manhattan distance 1 to `last`: (last, B), and the numbers of pairs (last,)."""
    height, width = tokens.shape[2:]
    sums = tokens.new_zeros(last, len(tokens))
    counts = tokens.new_zeros(last)
    for down in range(min(last, height - 1) + 1):
        # A pair lies in one direction only: below, or on the same row to the right.
        for right in range(max(down - last, 1 - width) if down else 1, min(last - down, width - 1) + 1):
            upper = tokens[:, :, : height - down, max(-right, 0) : width - max(right, 0)]
            lower = tokens[:, :, down:, max(right, 0) : width - max(-right, 0)]
            distance = down + abs(right)
            sums[distance - 1] += (upper * lower).sum((1, 2, 3))
            counts[distance - 1] += upper.shape[2] * upper.shape[3]
    return sums, counts
