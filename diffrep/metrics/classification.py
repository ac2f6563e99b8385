"""Accuracy and its uncertainty."""

from __future__ import annotations

import numpy as np
import torch


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the share of equal entries of two (N,) tensors, in [0, 1]."""
    return (predicted == labels).double().mean().item()


def bootstrap_interval(
    correct: np.ndarray, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a mean (Efron, 1979).

    Args:
        correct: 0 or 1 for each test sample, (N,).
        seed: Seeds the resampling.
        resamples: Number of resamples.
        level: Coverage.
    """
    # A resample of a 0/1 vector is a binomial draw of its mean, so the samples themselves need not be drawn.
    means = np.random.default_rng(seed).binomial(len(correct), np.mean(correct), resamples) / len(correct)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
