"""`diffrep probe`: a store in, a run folder with results, heads and report out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from diffrep.config import AttentionConfig, ProbeConfig, write_results
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
    maps = None if config.attention is None else _maps(store, config.attention)
    cells = sweep(store, task, config)
    linear, knn = best_linear(store.tensor, cells, task, config), best(cells, "knn")
    score, head = score_linear("linear", linear, store[linear.layer, linear.level], task, config)
    scores = [score, score_knn("kNN", knn, store[knn.layer, knn.level], task, config)]
    heads: dict[str, nn.Module] = {"linear": head}
    if maps is not None:
        chosen = (linear.layer, linear.level) if maps is store else (maps.layers[0], next(iter(maps.levels)))
        wanted = (config.attention.layer, config.attention.level)
        layer, level = maps.key(*(c if w is None else w for w, c in zip(wanted, chosen, strict=True)))
        score, heads["attention"] = train_attention(
            maps, layer, level, task, config.attention, out / "attention", config.seed
        )
        scores.append(score)
    metrics = collect(f"{store.meta['backbone']['name']} on {store.meta['data']['path']}", store, task, cells, scores)
    write_results(out, config, config.seed, metrics)
    save_heads(out, heads)
    write_report(out)
    return metrics


def _maps(store: FeatureStore, config: AttentionConfig) -> FeatureStore:
    """Opens the store of the attention head's maps and checks, before any work is done, that it can serve."""
    maps = store if config.store is None else FeatureStore(config.store)
    if maps.ids != store.ids:
        raise StoreError(f"{maps.path} and {store.path} hold different samples; extract both from the same data")
    layer = maps.layers[0] if config.layer is None else config.layer
    maps.key(layer, next(iter(maps.levels)) if config.level is None else config.level)
    return maps


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
