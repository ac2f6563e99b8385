"""How well classes are told apart, and how sure that number is.

Everything is counted over all samples at once, in integers or fp64, so no result depends on a batch size. torchmetrics
has the same measures, and the tests compare with it; but it gives fp32, passes scores outside [0, 1] through a sigmoid
that makes high ones equal, and takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from diffrep.errors import ConfigError, DataError


class AveragePrecision(NamedTuple):
    """Result of `mean_average_precision`.

    Attributes:
        mean: Over the labels that have a positive.
        each: For each label, (L,) fp64; NaN without a positive.
        left_out: Number of labels without a positive.
    """

    mean: float
    each: torch.Tensor
    left_out: int


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the share of equal entries of two (N,) tensors, in [0, 1]."""
    return (predicted == labels).double().mean().item()


def top_k(scores: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Returns the share of samples whose label is among the k highest scores, in [0, 1].

    Of equal scores the lower class number comes first, as in `argmax`.

    Args:
        scores: (N, K).
        labels: (N,) int64.
        k: From 1 to K.

    Raises:
        ConfigError: k is out of range.
        DataError: The scores hold NaN, or a label is not below K.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ConfigError(f"top-{k} of {scores.shape[1]} classes; k goes from 1 to the number of classes")
    _check_scores(scores)
    _check_range("labels", labels, scores.shape[1])
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return (rank < k).double().mean().item()


def confusion(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts samples by true class (row) and predicted class (column), (K, K) int64.

    Args:
        predicted: (N,) int64.
        labels: (N,) int64.
        classes: K.

    Raises:
        DataError: A number is not from 0 to K - 1.
    """
    _check_range("predictions", predicted, classes)
    _check_range("labels", labels, classes)
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def per_class_accuracy(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Returns the accuracy on the samples of each class, (K,) fp64; NaN for a class without samples.

    Raises:
        DataError: A number is not from 0 to K - 1.
    """
    counts = confusion(predicted, labels, classes).double()
    return counts.diagonal() / counts.sum(1)


def mean_average_precision(scores: torch.Tensor, targets: torch.Tensor) -> AveragePrecision:
    """Averages precision over recall for each label, and over the labels.

    AP = sum_n (R_n - R_{n-1}) P_n over the distinct scores, without interpolation (Manning et al., 2008, chapter 8).
    Labels without a positive have no recall: they are left out and counted.

    Args:
        scores: (N, L), of any range.
        targets: (N, L) of 0 and 1.

    Raises:
        DataError: Shapes differ, scores hold NaN, targets are not 0 and 1, or no label has a positive.
    """
    if scores.shape != targets.shape or scores.ndim != 2:
        raise DataError(f"scores are {tuple(scores.shape)} and targets {tuple(targets.shape)}; both must be (N, L)")
    _check_scores(scores)
    if not ((targets == 0) | (targets == 1)).all():
        raise DataError("targets of several labels must be 0 and 1")
    each = torch.stack([_average_precision(*column) for column in zip(scores.T, targets.T, strict=True)])
    known = each[~each.isnan()]
    if not len(known):
        raise DataError(f"none of the {len(each)} labels has a positive sample; there is nothing to average")
    return AveragePrecision(known.mean().item(), each, len(each) - len(known))


def _average_precision(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    scores, order = scores.sort(descending=True)
    hits = targets[order].double().cumsum(0)
    # Equal scores are one threshold, so their order does not matter.
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
    seen = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)[last]
    gained = hits[last].diff(prepend=hits.new_zeros(1))
    return (gained * hits[last] / seen).sum() / hits[-1]


def bootstrap_interval(
    values: np.ndarray,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    statistic: Callable[[np.ndarray], float] | None = None,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a statistic over samples (Efron, 1979).

    Args:
        values: A number for each sample, (N,): hits (0 or 1), errors, or for two heads on the same samples the
            differences of their hits. With a statistic, rows (N, ...), which are drawn whole.
        seed: Seeds the resampling.
        resamples: Number of resamples.
        level: Coverage.
        statistic: Turns drawn rows into a number; None is the mean.

    Raises:
        DataError: There are no samples, or NaN among them.
    """
    values = np.asarray(values)
    if not len(values) or np.isnan(values).any():
        raise DataError(f"a bootstrap interval needs samples without NaN; given: {len(values)} samples")
    random, count = np.random.default_rng(seed), len(values)
    if statistic is None and np.isin(values, (0, 1)).all():
        # A resample of a 0/1 vector is a binomial draw of its mean, so the samples themselves need not be drawn.
        drawn = random.binomial(count, np.mean(values), resamples) / count
    else:
        statistic = statistic or (lambda rows: float(np.mean(rows, dtype=np.float64)))
        drawn = [statistic(values[random.integers(count, size=count)]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def standard_error(values: np.ndarray) -> float:
    """Returns the standard error of a mean, s / sqrt(n) with s over n - 1, of repeated results such as seeds.

    Raises:
        DataError: There are fewer than two values.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        raise DataError(f"a standard error needs two values or more; given: {len(values)}")
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _check_scores(scores: torch.Tensor) -> None:
    if scores.isnan().any():
        raise DataError(f"the scores of {int(scores.isnan().any(1).sum())} of {len(scores)} samples hold NaN")


def _check_range(what: str, numbers: torch.Tensor, classes: int) -> None:
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < classes:
        given = f"{what} go from {numbers.min()} to {numbers.max()}"
        raise DataError(f"{given}; with {classes} classes they go from 0 to {classes - 1}")
