"""How much of the accuracy is left with few training samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from diffrep.config import ProbeConfig
from diffrep.errors import ConfigError
from diffrep.metrics import standard_error
from diffrep.probe.measure import Measure
from diffrep.probe.methods import fit
from diffrep.probe.split import few_shot_rows, fraction_rows
from diffrep.probe.sweep import Judged, on_device
from diffrep.probe.task import Task


def check_low_data(task: Task, config: ProbeConfig) -> None:
    """Raises ConfigError, before any work is done, when a class has too few samples for the shots asked for."""
    if config.low_data is None:
        return
    for head in config.low_data_heads:
        if head not in config.heads:
            raise ConfigError(f"low_data.heads names {head!r}, which is not among the heads {list(config.heads)}")
    for shots in config.low_data.shots:
        few_shot_rows(task.labels[task.fit].numpy(), shots, config.seed)


def low_data(
    features: torch.Tensor, chosen: Judged, task: Task, config: ProbeConfig, seed: int
) -> list[dict[str, Any]]:
    """Scores one chosen head on the test samples after fits on few of the training and validation samples.

    Reading and setting stay those that were chosen with all samples, so that nothing is chosen on the test samples. A
    kNN with more neighbours than samples takes as many as there are.

    Args:
        features: Of the chosen reading, (N, D).
        chosen: Head, reading and setting.
        task: Who is who.
        config: `low_data` says how many samples and draws.
        seed: Seed of the first draw.

    Returns:
        One row for each amount: head, train, samples, mean, standard error (None for one draw), values.
    """
    wanted, labels = config.low_data, task.labels[task.fit].numpy()
    draws = [
        (f"{shots} per class", lambda number, shots=shots: few_shot_rows(labels, shots, number))
        for shots in wanted.shots
    ]
    draws += [
        (f"{share:.4g} %", lambda number, share=share: fraction_rows(labels, share / 100, number))
        for share in (100 * fraction for fraction in wanted.fractions)
    ]
    measure, test = Measure(config.metric, task), on_device(features, task.test, config)
    found = []
    for amount, draw in tqdm(draws, f"few samples, {chosen.head}", leave=False):
        values, counts = [], []
        for attempt in range(wanted.tries):
            rows = task.fit[draw(seed + attempt)]
            x, y = on_device(features, rows, config), task.labels[rows]
            setting = dict(chosen.setting)
            if chosen.head == "knn":
                setting["k"] = min(setting["k"], len(rows))
            fitted = fit(chosen.head, x, y.to(x.device), task.classes, [setting], config, seed + attempt)
            values.append(measure(fitted.scores(test)[0].cpu(), task.labels[task.test]))
            counts.append(len(rows))
        row = {"head": chosen.head, "train": amount, "samples": round(float(np.mean(counts)))}
        error = standard_error(values) if len(values) > 1 else None
        found.append(row | {"mean": float(np.mean(values)), "error": error, "values": values})
    return found
