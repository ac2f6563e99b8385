"""Pooling of features over positions."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def pooled(feature: torch.Tensor, pool: str | int) -> torch.Tensor:
    """Pools maps (B, C, H, W) or tokens (B, N, C): "none" keeps them, "mean" gives (B, C), k (B, C, k, k)."""
    if pool == "none":
        return feature
    if feature.ndim == 3:
        return feature.mean(1)
    if pool == "mean":
        return feature.mean((2, 3))
    grid = (min(pool, feature.shape[2]), min(pool, feature.shape[3]))
    return F.adaptive_avg_pool2d(feature, grid)


def pooled_shape(shape: tuple[int, ...], pool: str | int) -> tuple[int, ...]:
    """Returns the shape of a feature after pooling: maps are (C, H, W), tokens (N, C)."""
    if pool == "none":
        return shape
    if len(shape) == 2:
        return shape[1:]
    if pool == "mean":
        return shape[:1]
    return (shape[0], min(pool, shape[1]), min(pool, shape[2]))
