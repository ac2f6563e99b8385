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
from diffrep.metrics.frechet import FeatureStatistics, frechet_distance
from diffrep.metrics.kernels import cka, cknna, hsic, svcca
from diffrep.metrics.neighbours import chance, cycle_knn, edit_distance_knn, lcs_knn, mutual_knn, prepare
from diffrep.metrics.spatial import cds, lds, rmsc
from diffrep.metrics.uniformity import alignment, uniformity

__all__ = [
    "AveragePrecision",
    "FeatureStatistics",
    "accuracy",
    "alignment",
    "bootstrap_interval",
    "cds",
    "chance",
    "cka",
    "cknna",
    "confusion",
    "cycle_knn",
    "edit_distance_knn",
    "frechet_distance",
    "hsic",
    "lcs_knn",
    "lds",
    "mean_average_precision",
    "mutual_knn",
    "per_class_accuracy",
    "prepare",
    "rmsc",
    "standard_error",
    "svcca",
    "top_k",
    "uniformity",
]
