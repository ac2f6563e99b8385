"""What a probe reports of a head, and what its features cost."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffrep.extract.plan import BYTES
from diffrep.metrics import mean_average_precision, per_class_accuracy, standard_error, top_k
from diffrep.probe.measure import Measure
from diffrep.probe.reading import Reading
from diffrep.probe.sweep import Judged
from diffrep.probe.task import Task
from diffrep.store import FeatureStore


@dataclass(frozen=True)
class Cost:
    """What the features of one image take.

    Attributes:
        bytes: Bytes in the store.
        forwards: Forward passes, a truncated one counted by its share of the network's FLOPs.
        flops: FLOPs with those of encoding the image; None for stores that do not tell.
    """

    bytes: int | None = None
    forwards: float | None = None
    flops: float | None = None


def cost_of(pairs: Iterable[tuple[str, str]], store: FeatureStore) -> Cost:
    """Returns the least cost of features: each level is one forward, which ends after its deepest layer.

    Levels of a trajectory share the whole forwards that lead to them, so the last one alone counts.
    """
    about, costs = store.meta["layers"], store.meta.get("costs")
    pairs = list(pairs)
    if not pairs:
        return Cost()
    size = BYTES[store.meta["request"].get("dtype", "float16")]
    taken = sum(prod(about[layer]["shape"]) for layer, _ in pairs) * size
    deepest: dict[str, float] = {}
    for layer, level in pairs:
        deepest[level] = max(deepest.get(level, 0.0), about[layer]["cost"])
    draws = costs["draws"] if costs else dict.fromkeys(deepest, 1)
    before = (costs or {}).get("before", {})
    runs: dict[str, float] = {}
    for level, share in deepest.items():
        run = re.sub(r"\d+/", "/", level) if level in before else level
        runs[run] = max(runs.get(run, 0.0), (before.get(level, 0) + share) * draws[level])
    forwards = sum(runs.values())
    flops = costs["encode_flops"] + forwards * costs["network_flops"] if costs else None
    return Cost(taken, forwards, flops)


@dataclass
class Score:
    """A head on the test samples.

    Attributes:
        name: What it is, for tables.
        head: "logistic", "sgd", "ridge", "knn", "ncm", or the kind of a trained head.
        layer: Address, "all layers", or the name of a baseline.
        level: Canonical level, or "all levels".
        pool: Side its maps were pooled to; None for as stored.
        val: Validation score it was chosen by; the mean over seeds.
        test: Test score; the mean over seeds.
        interval: 95 % bootstrap interval of the test score, over the test samples.
        tests: Test score of each seed.
        error: Standard error of the mean over seeds; None for one seed.
        top5: Top-5 accuracy; None for fewer than six classes and for multi-label data.
        mean_per_class: Mean over classes of their accuracy; None for multi-label data.
        per_class: Accuracy of each class, or average precision of each label, the mean over seeds; None for those
            without a test sample.
        dim: Length of the flattened features.
        cost: What the features of one image cost.
        setting: What was chosen, or how the head was trained.
        network: Whose features it read, where a report shows several networks; None for baselines.
    """

    name: str
    head: str
    layer: str
    level: str
    pool: int | None
    val: float
    test: float
    interval: tuple[float, float]
    tests: list[float]
    error: float | None
    top5: float | None
    mean_per_class: float | None
    per_class: list[float | None]
    dim: int | None
    cost: Cost
    setting: dict[str, object] = field(default_factory=dict)
    network: str | None = None

    def plain(self) -> dict[str, Any]:
        """Returns the score as JSON values, with the cost's among them."""
        values = asdict(self)
        return values | values.pop("cost") | {"interval": list(self.interval)}


@dataclass(frozen=True)
class Result:
    """A score and the predictions behind it.

    Attributes:
        score: The numbers.
        predicted: Class of each test sample with the first seed, (M,); empty for multi-label data.
        confidence: Softmax probability of that class, (M,).
    """

    score: Score
    predicted: np.ndarray
    confidence: np.ndarray


def summarise(
    name: str,
    head: str,
    reading: Reading,
    runs: list[tuple[float, torch.Tensor]],
    task: Task,
    metric: str,
    seed: int,
    dim: int | None,
    cost: Cost,
    setting: dict[str, object],
    network: str | None = None,
) -> Result:
    """Makes a result of a head's validation score and test scores (M, K) with each seed.

    Args:
        name: For tables.
        head: Kind of head.
        reading: What it read.
        runs: (validation score, test scores (M, K)) of each seed.
        task: Who is who.
        metric: "accuracy" or "mean_per_class".
        seed: Seeds the bootstrap.
        dim: Length of the flattened features.
        cost: What they cost.
        setting: What was chosen.
        network: Whose features they are, where that needs to be told.
    """
    labels, measure = task.labels[task.test], Measure(metric, task)
    tests = [measure(scores, labels) for _, scores in runs]
    first = runs[0][1]
    interval = measure.interval([scores for _, scores in runs], labels, seed)
    single = not task.multilabel
    each = [
        per_class_accuracy(s.argmax(1), labels, task.classes) if single else mean_average_precision(s, labels).each
        for _, s in runs
    ]
    by_class = torch.stack(each).mean(0).tolist()
    score = Score(
        name=name,
        head=head,
        layer=reading.layer,
        level=reading.level,
        pool=reading.pool,
        val=float(np.mean([val for val, _ in runs])),
        test=float(np.mean(tests)),
        interval=interval,
        tests=tests,
        error=standard_error(tests) if len(tests) > 1 else None,
        top5=float(np.mean([top_k(s, labels, 5) for _, s in runs])) if single and task.classes > 5 else None,
        mean_per_class=float(np.mean([np.nanmean(one.numpy()) for one in each])) if single else None,
        per_class=[None if value != value else value for value in by_class],
        dim=dim,
        cost=cost,
        setting=setting,
        network=network,
    )
    if not single:
        return Result(score, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
    confidence, predicted = first.float().softmax(1).max(1)
    return Result(score, predicted.numpy(), confidence.numpy())


def map_of(sweeps: list[list[Judged]], store: FeatureStore) -> dict[str, Any]:
    """Returns the layers, levels and costs of a store and its cells as JSON values: what a report's maps show."""
    return {
        "layers": [{"name": name, **about} for name, about in store.meta["layers"].items()],
        "levels": [{"key": key, "time": level.time, "sigma": level.sigma} for key, level in store.levels.items()],
        "costs": store.meta.get("costs"),
        "cells": cells_of(sweeps, store),
    }


def write_trials(file: Path, seeds: list[int], sweeps: list[list[Judged]]) -> None:
    """Writes the validation score of every setting that was tried, a line each."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["seed", "layer", "level", "pool", "dim", "head", "setting", "validation"])
        for seed, judged in zip(seeds, sweeps, strict=True):
            for one in judged:
                where = [one.reading.layer, one.reading.level, one.reading.pool or "stored", one.dim, one.head]
                for setting, value in one.trials:
                    writer.writerow([seed, *where, json.dumps(setting), value])


def cells_of(sweeps: list[list[Judged]], store: FeatureStore) -> list[dict[str, Any]]:
    """Returns the validation results as JSON values: one row for each reading and head, the mean over seeds."""
    rows = []
    for same in zip(*sweeps, strict=True):
        one = same[0]
        low, high = np.mean([j.interval for j in same], axis=0).tolist()
        rows.append(
            {
                "layer": one.reading.layer,
                "level": one.reading.level,
                "pool": one.reading.pool,
                "dim": one.dim,
                **asdict(cost_of(one.reading.pairs, store)),
                "head": one.head,
                "val": float(np.mean([j.val for j in same])),
                "interval": [low, high],
                "setting": one.setting,
            }
        )
    return rows
