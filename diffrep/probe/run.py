"""`diffrep probe`: a store in, a run folder with results, heads and report out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from diffrep.config import ProbeConfig, write_results
from diffrep.errors import StoreError
from diffrep.probe.sweep import Cell, Score, Task, best, best_linear, make_task, score_knn, score_linear, sweep
from diffrep.probe.trained import train_attention
from diffrep.report import write_report
from diffrep.store import FeatureStore


def run_probe(config: ProbeConfig) -> dict[str, Any]:
    """Judges every (layer, level) of a store and writes `results.json`, `report.html` and the heads.

    Returns:
        The metrics that stand in results.json.

    Raises:
        StoreError: The store is missing or not finished, or the maps' store has other samples.
        DataError: The labels do not allow a probe.
    """
    store = FeatureStore(config.store)
    out = Path(config.out or Path(config.store) / "probe")
    task = make_task(store, config)
    cells = sweep(store, task, config)
    linear, knn = best_linear(store, cells, task, config), best(cells, "knn")
    score, head = score_linear("linear", linear, store[linear.layer, linear.level], task, config)
    scores = [score, score_knn("kNN", knn, store[knn.layer, knn.level], task, config)]
    heads: dict[str, nn.Module] = {"linear": head}
    if config.attention is not None:
        maps = store if config.attention.store is None else FeatureStore(config.attention.store)
        if maps.ids != store.ids:
            raise StoreError(f"{maps.path} and {store.path} hold different samples; extract both from the same data")
        layer = config.attention.layer or (linear.layer if maps is store else maps.layers[0])
        level = config.attention.level or (linear.level if maps is store else next(iter(maps.levels)))
        score, heads["attention"] = train_attention(
            maps, layer, level, task, config.attention, out / "attention", config.seed
        )
        scores.append(score)
    metrics = collect(f"{store.meta['backbone']['name']} on {store.meta['data']['path']}", store, task, cells, scores)
    write_results(out, config, config.seed, metrics)
    save_heads(out, heads)
    write_report(out)
    return metrics


def collect(
    title: str,
    store: FeatureStore,
    task: Task,
    cells: Iterable[Cell],
    scores: Iterable[Score],
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """Returns the metrics of a probe as JSON values: what the report is drawn from."""
    return {
        "title": title,
        "samples": {
            "train": len(task.train),
            "val": len(task.val),
            "test": len(task.test),
            "classes": task.classes,
        },
        "layers": [{"name": name, **about} for name, about in store.meta["layers"].items()],
        "levels": [{"key": key, "time": level.time, "sigma": level.sigma} for key, level in store.levels.items()],
        "cells": [asdict(cell) for cell in cells],
        "scores": [score.plain() for score in scores],
        "notes": list(notes),
    }


def save_heads(out: Path, heads: dict[str, nn.Module]) -> None:
    """Writes each head's state dict to `head-NAME.safetensors`."""
    for name, head in heads.items():
        save_file(
            {key: value.contiguous() for key, value in head.state_dict().items()}, out / f"head-{name}.safetensors"
        )


def table(metrics: dict[str, Any]) -> str:
    """Returns the scores as a text table."""
    rows = [("head", "features", "level", "val", "test", "95 % interval")]
    for score in sorted(metrics["scores"], key=lambda score: -score["test"]):
        low, high = score["interval"]
        rows.append(
            (
                score["name"],
                score["layer"],
                score["level"] or "-",
                f"{score['val']:.3f}",
                f"{score['test']:.3f}",
                f"{low:.3f} - {high:.3f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
