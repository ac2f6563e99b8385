"""Nearest class mean."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from diffrep.errors import ConfigError


def class_mean_scores(
    train: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    classes: int,
    metrics: tuple[Literal["cosine", "euclidean"], ...] = ("cosine", "euclidean"),
) -> dict[str, torch.Tensor]:
    """Scores of queries by how near the mean of each class is.

    "cosine" is the cosine with the mean of the class's features of unit length, the imprinted weights of Qi et al.
    (2018); "euclidean" is the negative squared distance to the class's mean, as in prototypical networks (Snell et
    al., 2017).

    Args:
        train: Training features (N, ...).
        labels: Their labels (N,) int64.
        queries: Features to classify (M, ...).
        classes: Number of classes.
        metrics: Which scores to give.

    Returns:
        Scores (M, classes) for each metric; -inf for a class without training samples.

    Raises:
        ConfigError: Samples have several labels.
    """
    if labels.ndim == 2:
        raise ConfigError(
            "the nearest class mean needs one label a sample, and these have several; use the heads logistic, sgd, "
            "ridge or knn"
        )
    train, queries = train.flatten(1).float(), queries.flatten(1).float()
    counts = torch.bincount(labels, minlength=classes)
    scores = {}
    for metric in metrics:
        x, y = train, queries
        if metric == "cosine":
            x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        # Distances do not change with the origin, and near the features the squares below lose no digits.
        origin = x.mean(0) if metric == "euclidean" else torch.zeros_like(x[0])
        x, y = x - origin, y - origin
        means = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x) / counts.clamp(min=1)[:, None]
        if metric == "cosine":
            found = y @ F.normalize(means, dim=1).T
        else:
            found = 2 * y @ means.T - means.square().sum(1) - y.square().sum(1, keepdim=True)
        scores[metric] = found.masked_fill(counts == 0, -torch.inf)
    return scores
