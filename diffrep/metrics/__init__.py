"""What a representation is worth."""

from diffrep.metrics.classification import (
    AveragePrecision,
    accuracy,
    bootstrap_interval,
    confusion,
    mean_average_precision,
    per_class_accuracy,
    standard_error,
    top_k,
)
from diffrep.metrics.uniformity import alignment, uniformity

__all__ = [
    "AveragePrecision",
    "accuracy",
    "alignment",
    "bootstrap_interval",
    "confusion",
    "mean_average_precision",
    "per_class_accuracy",
    "standard_error",
    "top_k",
    "uniformity",
]
