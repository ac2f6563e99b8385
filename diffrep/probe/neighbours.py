"""Weighted nearest-neighbour classification."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from diffrep.errors import ConfigError


def knn_scores(
    train: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    classes: int,
    neighbours: tuple[int, ...],
    temperature: float = 0.07,
    chunk: int = 1024,
    normalise: Literal["k", "most"] = "k",
) -> dict[int, torch.Tensor]:
    """Votes of the k nearest training samples by cosine, weighted exp(cosine / temperature) (Wu et al., 2018; DINOv2).

    Args:
        train: Training features (N, ...).
        labels: Their labels (N,) int64, or (N, classes) of 0 and 1, where a neighbour votes for each of its labels.
        queries: Features to classify (M, ...).
        classes: Number of classes.
        neighbours: Values of k; all come from one search.
        temperature: Temperature of the votes.
        chunk: Queries of one product.
        normalise: The weights of which neighbours sum to 1: of the k, or of as many as the largest k, as in DINOv2
            (`dinov2/eval/knn.py`), where the votes of a smaller k then sum to less. Predictions are the same.

    Returns:
        Votes (M, classes) for each k; with (N,) labels and `normalise` "k" they sum to 1.

    Raises:
        ConfigError: k is larger than the number of training samples.
    """
    most = max(neighbours)
    if most > len(train):
        raise ConfigError(f"kNN with k={most} needs at least {most} training samples, there are {len(train)}")
    train = F.normalize(train.flatten(1).float(), dim=1)
    queries = F.normalize(queries.flatten(1).float(), dim=1)
    votes: dict[int, list[torch.Tensor]] = {k: [] for k in neighbours}
    for part in queries.split(chunk):
        cosine, index = (part @ train.T).topk(most, dim=1)
        for k in neighbours:
            counted = k if normalise == "k" else most
            weights = F.softmax(cosine[:, :counted] / temperature, dim=1)[:, :k]
            votes[k].append(_votes(labels[index[:, :k]], weights, classes))
    return {k: torch.cat(parts) for k, parts in votes.items()}


def _votes(labels: torch.Tensor, weights: torch.Tensor, classes: int) -> torch.Tensor:
    """Returns votes (M, classes) of neighbours with labels (M, k) or (M, k, classes) and weights (M, k)."""
    if labels.ndim == 3:
        return torch.einsum("mk,mkc->mc", weights, labels.to(weights))
    return weights.new_zeros(len(weights), classes).scatter_add(1, labels, weights)
