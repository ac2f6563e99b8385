"""Bilinear sampling of maps at any positions, axis by axis, and the norms of what would be sampled.

A bilinear sample is a weighted sum of the four cells around it. So the dot product of a vector with an upsampled map
is the upsampled map of dot products, and the squared norm of a sample is a weighted sum of the dot products of those
cells with each other (their Gram values), which are computed once for a map. Neither needs the upsampled map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diffrep.data.frame import Frame

TOGETHER = 32  # channels whose fp64 copies are made at once, so that they stay in a cache


@dataclass(frozen=True)
class Axis:
    """Where samples lie between the cells of a map, along one axis.

    Attributes:
        low: Cell before each sample, (n,) int64.
        high: Cell after it, (n,) int64; the last cell where there is none.
        share: Weight of `high`, (n,) fp64 in [0, 1); `low` has the rest.
        cells: Cells of the map.
    """

    low: torch.Tensor
    high: torch.Tensor
    share: torch.Tensor
    cells: int

    def matrix(self) -> torch.Tensor:
        """Returns the map from cells to samples, (n, cells) fp32."""
        rows = torch.arange(len(self.low), device=self.low.device)
        weights = self.share.new_zeros(len(self.low), self.cells)
        weights[rows, self.low] = 1 - self.share
        weights[rows, self.high] += self.share
        return weights.float()


def axis_of(positions: np.ndarray, cells: int, device: torch.device | str = "cpu") -> Axis:
    """Returns the sampling of an axis as `F.interpolate(mode="bilinear", align_corners=False)` does it.

    Args:
        positions: (n,) in cells of the map; 0 is the centre of the first one. Those beyond the outer centres are
            clamped, so they all have the outer cell's value.
        cells: Cells of the map.
        device: Where the weights go.
    """
    # Positions come through two frames; a cell's own centre must not mix in 1e-14 of the next.
    whole = np.rint(positions)
    inside = np.where(np.abs(positions - whole) < 1e-9, whole, positions).clip(0, cells - 1)
    low = np.floor(inside).astype(np.int64)
    parts = (low, np.minimum(low + 1, cells - 1), inside - low)
    return Axis(*(torch.from_numpy(part).to(device) for part in parts), cells)


def map_positions(positions: np.ndarray, frame: Frame, size: tuple[int, int], axis: int) -> np.ndarray:
    """Takes positions along one axis of an image to cells of a map that covers a canvas.

    Args:
        positions: Pixels from the image's corner, any shape.
        frame: Where the image lies on the canvas.
        size: (h, w) of the map.
        axis: 0 for x, 1 for y.
    """
    canvas = positions * frame.scale[axis] + frame.offset[axis]
    return canvas * (size[1 - axis] / frame.canvas[1 - axis]) - 0.5


def sample(features: torch.Tensor, rows: Axis, columns: Axis) -> torch.Tensor:
    """Samples a map at points.

    Args:
        features: (C, h, w).
        rows: The points' positions along y, n of them.
        columns: Their positions along x, n of them.

    Returns:
        (n, C).
    """
    down, across = (axis.share.to(features.dtype) for axis in (rows, columns))
    upper = torch.lerp(features[:, rows.low, columns.low], features[:, rows.low, columns.high], across)
    lower = torch.lerp(features[:, rows.high, columns.low], features[:, rows.high, columns.high], across)
    return torch.lerp(upper, lower, down).T


def resample(maps: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Samples maps (K, h, w) on a grid whose axes are given as matrices; returns (K, n_rows, n_columns)."""
    return torch.matmul(torch.matmul(rows, maps), columns.T)


def squared_norms(features: torch.Tensor, rows: Axis, columns: Axis) -> torch.Tensor:
    """Returns the squared norms of the samples of a map on a grid.

    In fp64, as neighbours that point away from each other cancel.

    Args:
        features: (C, h, w).
        rows: The grid's rows.
        columns: The grid's columns.

    Returns:
        (n_rows, n_columns) fp64, not below 0.
    """
    # Of the cells on both sides of a row, each column has: the dot products of the blend with itself, and with the
    # blend one column on.
    grams: dict[str, torch.Tensor] = {}
    for part in features.split(TOGETHER):
        for name, dots in _grams(part.double()).items():
            grams[name] = grams[name] + dots if name in grams else dots
    upper, lower = (1 - rows.share)[:, None], rows.share[:, None]
    itself = upper**2 * grams["own"][rows.low] + lower**2 * grams["own"][rows.high]
    itself += 2 * upper * lower * grams["below"][rows.low]
    beside = upper**2 * grams["right"][rows.low] + lower**2 * grams["right"][rows.high]
    beside += upper * lower * (grams["falling"] + grams["rising"])[rows.low]
    left, right = 1 - columns.share, columns.share
    norms = left**2 * itself[:, columns.low] + right**2 * itself[:, columns.high]
    norms += 2 * left * right * beside[:, columns.low]
    return norms.clamp_(min=0)


def _grams(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the dot products (h, w) of each cell with itself and its neighbours; the last ones are their own."""
    right = torch.cat([features[:, :, 1:], features[:, :, -1:]], dim=2)
    below = torch.cat([features[:, 1:], features[:, -1:]], dim=1)
    across = torch.cat([right[:, 1:], right[:, -1:]], dim=1)

    def dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one * other).sum(0)

    return {
        "own": dots(features, features),
        "right": dots(features, right),
        "below": dots(features, below),
        "falling": dots(features, across),
        "rising": dots(below, right),
    }
