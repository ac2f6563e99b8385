"""Feature maps as colours: the first three principal components as red, green and blue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from diffrep.errors import DataError


@overload
def pca_rgb(maps: np.ndarray) -> np.ndarray: ...
@overload
def pca_rgb(maps: Sequence[np.ndarray]) -> list[np.ndarray]: ...
def pca_rgb(maps: np.ndarray | Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """Projects maps to colours in one basis for all of them, so that colours can be compared between images.

    Args:
        maps: (N, C, h, w), or a sequence of (C, h, w) whose heights and widths may differ; each cell counts once.

    Returns:
        (N, h, w, 3) uint8, or a list of (h, w, 3); each component is stretched from its 1st to its 99th percentile.
        Components beyond the rank of the maps are mid-grey. The sign of a component is fixed by making its largest
        loading positive.

    Raises:
        DataError: Maps of a sequence differ in their number of channels, or there are none.
    """
    if isinstance(maps, np.ndarray):
        count, channels, height, width = maps.shape
        cells = maps.transpose(0, 2, 3, 1).reshape(-1, channels)
        return _colours(cells).reshape(count, height, width, 3)
    if len({len(one) for one in maps}) != 1:
        raise DataError(
            f"one basis needs maps with the same channels; given are maps of {[tuple(one.shape) for one in maps]}"
        )
    colours = _colours(np.concatenate([one.reshape(len(one), -1).T for one in maps]))
    ends = np.cumsum([one[0].size for one in maps])[:-1]
    return [part.reshape(*one.shape[1:], 3) for part, one in zip(np.split(colours, ends), maps, strict=True)]


def _colours(cells: np.ndarray) -> np.ndarray:
    """Returns (N, 3) uint8 for cells (N, C)."""
    cells = cells.astype(np.float64)
    cells -= cells.mean(0)
    variances, basis = np.linalg.eigh(cells.T @ cells / len(cells))
    order = np.argsort(variances)[::-1][:3]
    basis = basis[:, order] * np.sign(np.take_along_axis(basis[:, order], np.abs(basis[:, order]).argmax(0)[None], 0))
    projected = cells @ basis
    low, high = np.percentile(projected, [1, 99], axis=0)
    flat = high - low < 1e-9
    scaled = np.where(flat, 0.5, (projected - low) / np.where(flat, 1, high - low))
    colours = np.full((len(cells), 3), 127, dtype=np.uint8)
    colours[:, : scaled.shape[1]] = (scaled.clip(0, 1) * 255).astype(np.uint8)
    return colours
