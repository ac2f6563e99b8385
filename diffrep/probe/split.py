"""Splits that keep the share of every class."""

from __future__ import annotations

import numpy as np


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Returns the fold of each sample, (N,) from 0 to folds - 1, with every class spread evenly."""
    rng = np.random.default_rng(seed)
    fold = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        # The first fold of each class is drawn, or small classes would all miss the last folds.
        fold[rows] = (np.arange(len(rows)) + rng.integers(folds)) % folds
    return fold


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
