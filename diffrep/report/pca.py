"""Feature maps as colours: the first three principal components as red, green and blue."""

from __future__ import annotations

import numpy as np


def pca_rgb(maps: np.ndarray) -> np.ndarray:
    """Projects maps to colours in one basis for all of them, so that colours can be compared between images.

    Args:
        maps: (N, C, h, w).

    Returns:
        (N, h, w, 3) uint8; each component is stretched from its 1st to its 99th percentile. Components beyond the rank
        of the maps are mid-grey. The sign of a component is fixed by making its largest loading positive.
    """
    count, channels, height, width = maps.shape
    cells = maps.transpose(0, 2, 3, 1).reshape(-1, channels).astype(np.float64)
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
    return colours.reshape(count, height, width, 3)
