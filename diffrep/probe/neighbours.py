"""Weighted nearest-neighbour classification."""

from __future__ import annotations

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
) -> dict[int, torch.Tensor]:
    """Votes of the k nearest training samples by cosine, weighted exp(cosine / temperature) (Wu et al., 2018; DINOv2).

    Args:
        train: Training features (N, ...).
        labels: Their labels (N,) int64.
        queries: Features to classify (M, ...).
        classes: Number of classes.
        neighbours: Values of k; all come from one search.
        temperature: Temperature of the votes.
        chunk: Queries of one product.

    Returns:
        Votes (M, classes) for each k, summing to 1.

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
            weights = F.softmax(cosine[:, :k] / temperature, dim=1)
            empty = torch.zeros(len(part), classes, device=part.device)
            votes[k].append(empty.scatter_add(1, labels[index[:, :k]], weights))
    return {k: torch.cat(parts) for k, parts in votes.items()}
