"""Nearest neighbours of points over a whole image, without an upsampled feature map, and exact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn.functional import normalize

from diffrep.config.protocol import Protocol
from diffrep.correspond.grid import Axis, axis_of, map_positions, resample, sample, squared_norms
from diffrep.correspond.protocol import Layout, layout_of
from diffrep.correspond.soft import soft_argmax
from diffrep.data.frame import Frame
from diffrep.errors import ConfigError, DataError

LARGEST = 2**24  # numbers in one block of similarities, 64 MiB
TINY = 1e-12  # norms below it count as it, as in torch.nn.functional.normalize


@dataclass(frozen=True, eq=False)
class Side:
    """An image's map, prepared for a protocol. What is computed for it serves every pair that the image is in.

    Attributes:
        features: (C, h, w) fp32.
        frame: Where the image lies on the canvas that the map covers.
        layout: The image's cells.
        mask: (H, W) bool, the object in the image; None for all of the frame. Pose alignment reads it.
    """

    features: torch.Tensor
    frame: Frame
    layout: Layout
    mask: np.ndarray | None = None

    @property
    def protocol(self) -> Protocol:
        """The rules it was prepared for."""
        return self.layout.protocol

    def cells(self) -> tuple[torch.Tensor, np.ndarray]:
        """Returns unit descriptors that stand for the image, and which of them lie on its object.

        They are those of the protocol's grid; where that is every pixel, those of the map's own cells.

        Returns:
            (N, C) fp32, row by row, and (N,) bool; all True without a mask.
        """
        if self.protocol.grid is not None:
            maps, places = resample(self.features, *self._matrices), [self.layout.middles(axis) for axis in (0, 1)]
        else:
            maps, places = self.features, [self._own_middles(axis) for axis in (0, 1)]
        units = normalize(maps.flatten(1).T, eps=TINY)
        if self.mask is None:
            return units, np.ones(len(units), dtype=bool)
        columns, rows = (np.floor(one).astype(np.int64) for one in places)
        height, width = self.mask.shape
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        on = self.mask[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)]
        return units, (inside & on).ravel()

    def lookup(self, points: np.ndarray) -> torch.Tensor:
        """Returns the descriptors of annotated points (K, 2), (K, C) fp32."""
        found = self.layout.lookup(np.asarray(points, dtype=np.float64))
        if self.protocol.query != "aligned":
            return self._at(found)
        low = np.floor(found)
        share = torch.from_numpy(found - low).to(self.features)
        parts = []
        for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
            weight = (share[:, 0] if right else 1 - share[:, 0]) * (share[:, 1] if down else 1 - share[:, 1])
            cells = (low + (right, down)).clip(0, self.layout.last)
            parts.append(normalize(self._at(cells), eps=TINY) * weight[:, None])
        return sum(parts)

    def check(self, queries: torch.Tensor) -> None:
        """Raises ConfigError where descriptors (K, C) are not of this map's kind."""
        channels = self.features.shape[0]
        if queries.ndim != 2 or queries.shape[1] != channels:
            raise ConfigError(
                f"descriptors {tuple(queries.shape)} meet a map of {channels} channels; (K, {channels}) are needed: "
                "read both images from the same layers"
            )

    def similarity(self, queries: torch.Tensor) -> torch.Tensor:
        """Compares descriptors with those of all cells.

        Args:
            queries: (K, C).

        Returns:
            (K, rows, columns) fp32: cosines, or negated distances.
        """
        dots = self._dots(queries)
        if self.protocol.similarity == "cosine":
            return dots.mul_(self._inverse).div_(queries.norm(dim=1).clamp(min=TINY)[:, None, None])
        own = queries.square().sum(1)[:, None, None]
        return dots.mul_(-2).add_(self._squares).add_(own).clamp_(min=0).sqrt_().neg_()

    def match(self, queries: torch.Tensor) -> torch.Tensor:
        """Returns the grid coordinates (x, y) of what is most alike to each query.

        Of equally similar cells the first counts, row by row, as in `argmax`. Queries of several pairs may come at
        once; memory does not grow with their number.

        Args:
            queries: (K, C).

        Returns:
            (K, 2) fp32.
        """
        self.check(queries)
        if not len(queries):
            return queries.new_zeros(0, 2)
        rows, columns = self.layout.grid
        together = max(1, LARGEST // (rows * columns))
        return torch.cat([self._match(part) for part in queries.split(together)])

    def _match(self, queries: torch.Tensor) -> torch.Tensor:
        protocol = self.protocol
        if protocol.match == "soft":
            return soft_argmax(
                self.similarity(queries), protocol.temperature, protocol.window, protocol.kernel, protocol.outside
            )
        # What is the same for all cells does not move the peak: the query's norm, and a distance's root.
        scores = self._dots(queries)
        if protocol.similarity == "cosine":
            scores.mul_(self._inverse)
        else:
            scores.mul_(2).sub_(self._squares)
        peak, columns = _first_peaks(scores.flatten(1)), self.layout.grid[1]
        return torch.stack([peak % columns, peak // columns], dim=1).float()

    def _dots(self, queries: torch.Tensor) -> torch.Tensor:
        self.check(queries)
        dots = (queries @ self.features.flatten(1)).view(len(queries), *self.features.shape[1:])
        return resample(dots, *self._matrices)

    def _at(self, found: np.ndarray) -> torch.Tensor:
        """Returns the descriptors at grid coordinates (K, 2), (K, C)."""
        position = self.layout.position(found)
        columns, rows = (self._axis(position[:, axis], axis) for axis in (0, 1))
        return sample(self.features, rows, columns)

    def _axis(self, positions: np.ndarray, axis: int) -> Axis:
        size = tuple(self.features.shape[1:])
        return axis_of(map_positions(positions, self.frame, size, axis), size[1 - axis], self.features.device)

    def _own_middles(self, axis: int) -> np.ndarray:
        """Returns the positions in the image of the centres of the map's own columns (axis 0) or rows (axis 1)."""
        count = self.features.shape[2 - axis]
        canvas = (np.arange(count) + 0.5) * (self.frame.canvas[1 - axis] / count)
        return (canvas - self.frame.offset[axis]) / self.frame.scale[axis]

    @cached_property
    def _axes(self) -> tuple[Axis, Axis]:
        columns, rows = (self._axis(self.layout.middles(axis), axis) for axis in (0, 1))
        return rows, columns

    @cached_property
    def _matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = self._axes
        return rows.matrix(), columns.matrix()

    @cached_property
    def _inverse(self) -> torch.Tensor:
        return squared_norms(self.features, *self._axes).sqrt().clamp(min=TINY).reciprocal().float()

    @cached_property
    def _squares(self) -> torch.Tensor:
        return squared_norms(self.features, *self._axes).float()


def prepare(features: torch.Tensor, frame: Frame, protocol: Protocol, mask: np.ndarray | None = None) -> Side:
    """Prepares an image's map.

    Args:
        features: (C, h, w) of any float type, cast to fp32; it covers the whole canvas.
        frame: Where the image lies on the canvas.
        protocol: The rules.
        mask: (H, W) bool of the image, True on the object.

    Raises:
        DataError: The map or the mask has another shape, or the map is not finite.
    """
    if features.ndim != 3 or not features.is_floating_point() or 0 in features.shape:
        raise DataError(f"a map is floats (C, h, w), got {features.dtype} {tuple(features.shape)}")
    if mask is not None and mask.shape != tuple(frame.original):
        raise DataError(f"the mask has the shape {mask.shape}, the image {tuple(frame.original)}")
    features = features.detach().float()
    if not all(torch.isfinite(one) for one in features.aminmax()):
        raise DataError("the map holds NaN or inf; extract it in another dtype, such as bfloat16 or float32")
    return Side(features, frame, layout_of(protocol, frame.original), mask)


def _first_peaks(scores: torch.Tensor) -> torch.Tensor:
    """Returns the first maximum of each row, (K,) int64."""
    if scores.device.type != "cpu":
        return scores.argmax(1)
    # The same numbers, and several times as fast as torch on a CPU.
    return torch.from_numpy(scores.numpy().argmax(1))


def mutual_nearest_neighbours(
    first: torch.Tensor, second: torch.Tensor, metric: str = "cosine", rows: int = 1024
) -> torch.Tensor:
    """Pairs the descriptors of two sets that are each other's nearest.

    Of equally near ones the first counts.

    Args:
        first: (N, C).
        second: (M, C).
        metric: "cosine" or "l2".
        rows: Rows of the (N, M) similarities that are held at once.

    Returns:
        (P, 2) int64: positions in `first`, rising, and in `second`.

    Raises:
        ConfigError: Shapes do not fit, a set is empty, or there is no such metric.
    """
    forth, back, _ = nearest(first, second, metric, rows)
    kept = torch.arange(len(forth), device=forth.device)[back[forth] == torch.arange(len(forth), device=forth.device)]
    return torch.stack([kept, forth[kept]], dim=1)


def nearest(
    first: torch.Tensor, second: torch.Tensor, metric: str, rows: int = 1024
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds the nearest of each descriptor of two sets in the other one.

    Args:
        first: (N, C).
        second: (M, C).
        metric: "cosine" or "l2".
        rows: Rows of the (N, M) similarities that are held at once.

    Returns:
        Position in `second` of the nearest of each in `first`, (N,) int64; the reverse, (M,); and the similarity of
        the former, (N,) fp32: the cosine, or the negated squared distance.
    """
    if metric not in ("cosine", "l2"):
        raise ConfigError(f"unknown metric {metric!r}; one of cosine, l2")
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or not len(first) or not len(second):
        raise ConfigError(
            f"descriptors of shapes {tuple(first.shape)} and {tuple(second.shape)}; (N, C) and (M, C) with the same C "
            "are needed, neither of them empty"
        )
    first, second = first.float(), second.float()
    if metric == "cosine":
        first, second = normalize(first, eps=TINY), normalize(second, eps=TINY)
    forth, found = [], []
    best = second.new_full((len(second),), -torch.inf)
    back = torch.zeros(len(second), dtype=torch.int64, device=second.device)
    for start in range(0, len(first), rows):
        part = first[start : start + rows]
        alike = part @ second.T
        if metric == "l2":
            alike = -(part.square().sum(1, keepdim=True) + second.square().sum(1) - 2 * alike)
        value, index = alike.max(1)
        forth.append(index)
        found.append(value)
        value = alike.amax(0)
        # The first row that has a column's maximum; argmax over columns is many times slower on a CPU.
        row, column = (alike == value).nonzero(as_tuple=True)
        index = torch.full_like(back, len(first)).scatter_reduce_(0, column, row + start, "amin")
        back = torch.where(value > best, index, back)
        best = torch.maximum(value, best)
    return torch.cat(forth), back, torch.cat(found)
