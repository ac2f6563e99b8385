"""The number that heads are chosen by."""

from __future__ import annotations

import numpy as np
import torch

from diffrep.metrics import accuracy, bootstrap_interval, mean_average_precision, per_class_accuracy
from diffrep.probe.task import Task

RESAMPLES_OF_SLOW_METRICS = 200


class Measure:
    """Score of predictions in [0, 1], higher is better.

    Args:
        metric: "accuracy" or "mean_per_class".
        task: Multi-label tasks are measured by mean average precision whatever `metric` says.
    """

    def __init__(self, metric: str, task: Task):
        self.name = "map" if task.multilabel else metric
        self.classes = task.classes

    def __call__(self, scores: torch.Tensor, labels: torch.Tensor) -> float:
        """Measures scores (M, K) against labels (M,), or (M, K) 0 or 1.

        Scores that hold NaN or infinity, as of a head whose training diverged, are worth nothing: they give minus
        infinity. Minus infinity is a score, of classes that a head has not seen.
        """
        if scores.isnan().any() or scores.isposinf().any():
            return float("-inf")
        if self.name == "map":
            return mean_average_precision(scores, labels).mean
        predicted = scores.argmax(1)
        if self.name == "accuracy":
            return accuracy(predicted, labels)
        return float(np.nanmean(per_class_accuracy(predicted, labels, self.classes).numpy()))

    def interval(self, runs: list[torch.Tensor], labels: torch.Tensor, seed: int) -> tuple[float, float]:
        """Returns the 95 % percentile bootstrap interval over samples of the mean over runs of scores (M, K)."""
        if self.name == "accuracy":
            return bootstrap_interval(np.mean([(s.argmax(1) == labels).double().numpy() for s in runs], axis=0), seed)
        rng = np.random.default_rng(seed)
        values = []
        for _ in range(RESAMPLES_OF_SLOW_METRICS):
            rows = torch.from_numpy(rng.integers(len(labels), size=len(labels)))
            values.append(np.mean([self(scores[rows], labels[rows]) for scores in runs]))
        low, high = np.nanquantile(values, [0.025, 0.975])
        return float(low), float(high)
