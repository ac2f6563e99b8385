"""Splits that keep the share of every class."""

from __future__ import annotations

import numpy as np


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts samples in two, class by class.

    Args:
        labels: (N,) integers.
        fraction: Share of each class in the second part; a class of two samples or more has at least one in each.
        seed: Seeds the choice.

    Returns:
        Positions of the first and of the second part, sorted.
    """
    rng = np.random.default_rng(seed)
    second = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        second.append(rows[:count])
    held = np.sort(np.concatenate(second))
    return np.setdiff1d(np.arange(len(labels)), held), held
