"""The classifiers that need no epochs, behind one call: fit all settings on a reading, then score any samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from diffrep.config import ProbeConfig
from diffrep.errors import ConfigError
from diffrep.probe.logistic import LogisticPath
from diffrep.probe.means import class_mean_scores
from diffrep.probe.neighbours import knn_scores
from diffrep.probe.ridge import RidgePath
from diffrep.probe.sgd import LinearSpec, SGDHeads, linear_specs

Setting = dict[str, Any]
# Heads whose choice among many readings is worth cross-validation: the others have few settings and less to overfit.
LINEAR = ("logistic", "sgd", "ridge")


@dataclass(frozen=True)
class Fitted:
    """A classifier fitted with several settings.

    Attributes:
        scores: Maps features (M, D) to scores (M, K), one tensor for each setting.
        head: Returns the classifier of one setting as a module; None for those that keep the samples themselves.
    """

    scores: Callable[[torch.Tensor], list[torch.Tensor]]
    head: Callable[[int], nn.Module] | None = None


def settings_of(name: str, config: ProbeConfig) -> list[Setting]:
    """Lists the settings of a head that the config asks for."""
    if name == "logistic":
        return [{"penalty": strength} for strength in config.strengths]
    if name == "ridge":
        return [{"penalty": ridge} for ridge in config.ridges]
    if name == "knn":
        return [{"k": k} for k in config.neighbours]
    if name == "ncm":
        return [{"metric": metric} for metric in ("cosine", "euclidean")]
    return [asdict(spec) for spec in linear_specs(config.sgd)]


def fit(
    name: str,
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    settings: list[Setting],
    config: ProbeConfig,
    seed: int,
) -> Fitted:
    """Fits one head with several settings.

    Args:
        name: "logistic", "sgd", "ridge", "knn" or "ncm".
        features: Training features (N, D).
        labels: Their labels: (N,) int64, or (N, K) 0 or 1.
        classes: Number of classes K.
        settings: Settings, as `settings_of` lists them.
        config: Iterations, temperature and the like.
        seed: Seeds first weights and data order of "sgd"; the others draw nothing.

    Raises:
        ConfigError: There are fewer samples than neighbours, or the head cannot do several labels a sample.
    """
    if name == "logistic":
        path = LogisticPath(tuple(s["penalty"] for s in settings), config.max_iter).fit(features, labels, classes)
        return Fitted(lambda queries: list(path.scores(queries)), path.head)
    if name == "ridge":
        ridge = RidgePath(tuple(s["penalty"] for s in settings)).fit(features, labels, classes)
        return Fitted(lambda queries: list(ridge.scores(queries)), ridge.head)
    if name == "sgd":
        specs = tuple(LinearSpec(**s) for s in settings)
        heads = SGDHeads(specs, config.sgd, seed, features.device).fit(features, labels, classes)
        return Fitted(lambda queries: list(heads.scores(queries)), heads.head)
    if name == "knn":
        ks = tuple(s["k"] for s in settings)
        return Fitted(
            lambda queries: list(knn_scores(features, labels, queries, classes, ks, config.temperature).values())
        )
    if name == "ncm":
        metrics = tuple(s["metric"] for s in settings)
        return Fitted(lambda queries: list(class_mean_scores(features, labels, queries, classes, metrics).values()))
    raise ConfigError(f"unknown head {name!r}")
