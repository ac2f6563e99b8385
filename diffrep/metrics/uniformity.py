"""Alignment and uniformity on the unit sphere (Wang and Isola, 2020): what features are worth, told without labels.

Over two noise draws of the same images, as DDAE (Xiang et al., 2023) does it, alignment tells how much of a feature is
noise, and uniformity how much it tells images apart. Both are better when lower.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from diffrep.errors import DataError


def alignment(a: torch.Tensor, b: torch.Tensor, alpha: float = 2) -> float:
    """Returns E ||a_i - b_i||^alpha over L2-normalised rows, computed in fp64.

    Args:
        a: Features (N, ...) of one view or noise draw.
        b: Features (N, ...) of the same samples in another.
        alpha: Power of the distance.

    Raises:
        DataError: The shapes differ, or values are not finite.
    """
    if a.shape != b.shape:
        raise DataError(f"alignment compares the same samples twice; given: {tuple(a.shape)} and {tuple(b.shape)}")
    return (_normalise(a) - _normalise(b)).norm(dim=1).pow(alpha).mean().item()


def uniformity(x: torch.Tensor, t: float = 2, chunk: int = 1024) -> float:
    """Returns log E exp(-t ||x_i - x_j||^2) over all pairs i < j of L2-normalised rows, computed in fp64.

    Args:
        x: Features (N, ...).
        t: Sharpness of the kernel.
        chunk: Rows compared with all others at a time; the memory is chunk x N numbers.

    Raises:
        DataError: There are fewer than two samples, or values are not finite.
    """
    if len(x) < 2:
        raise DataError(f"uniformity compares pairs of samples; given: {len(x)}")
    x = _normalise(x)
    total = 0.0
    for start in range(0, len(x), chunk):
        # On the unit sphere ||a - b||^2 = 2 - 2 ab; the upper triangle holds each pair once.
        squared = 2 - 2 * x[start : start + chunk] @ x[start:].T
        total += (-t * squared).exp().triu(1).sum().item()
    return math.log(total) - math.log(len(x) * (len(x) - 1) / 2)


def _normalise(x: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(x).all():
        raise DataError("the features hold NaN or infinity")
    return F.normalize(x.flatten(1).double(), dim=1)
