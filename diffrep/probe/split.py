"""Splits that keep the share of every class."""

from __future__ import annotations

import numpy as np
import torch

from diffrep.errors import ConfigError


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


def few_shot_rows(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Draws the same number of samples of every class.

    Classes are drawn in rising order with torch's generator, so that the same seed gives the rows of DINOv2's
    `filter_train`; the global generator is left alone.

    Args:
        labels: (N,) integers.
        shots: Samples of each class.
        seed: Seeds the choice.

    Returns:
        Positions (classes * shots,), class by class.

    Raises:
        ConfigError: A class has fewer samples, or samples have several labels.
    """
    if labels.ndim != 1:
        raise ConfigError("so many samples of each class are only defined for one label a sample; use fractions")
    values, counts = np.unique(labels, return_counts=True)
    if counts.min() < shots:
        raise ConfigError(
            f"{shots} samples of each class are asked for and class {values[counts.argmin()]} has {counts.min()}; "
            f"take at most that many"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for value in values:
        rows = np.flatnonzero(labels == value)
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:shots].numpy()])
    return np.concatenate(drawn)


def fraction_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws a share of the samples, at least one of every class.

    Args:
        labels: (N,) integers: the share is that of each class. Or (N, L) of 0 and 1: the share is that of all samples,
            and a label that it misses gets one of its samples in addition.
        fraction: Share, above 0 and below 1.
        seed: Seeds the choice.

    Returns:
        Positions, sorted.
    """
    rng = np.random.default_rng(seed)
    if labels.ndim == 1:
        classes = [np.flatnonzero(labels == value) for value in np.unique(labels)]
        drawn = [rng.permutation(rows)[: max(round(fraction * len(rows)), 1)] for rows in classes]
        return np.sort(np.concatenate(drawn))
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[rng.permutation(len(labels))[: max(round(fraction * len(labels)), 1)]] = True
    for column in labels.astype(bool).T:
        if column.any() and not (column & chosen).any():
            chosen[rng.choice(np.flatnonzero(column))] = True
    return np.flatnonzero(chosen)
