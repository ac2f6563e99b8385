"""Validation score by layer and level, one map a head and network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffrep.report.colours import SCORES, paint, words
from diffrep.report.formats import HEADS, pooling, score, size


@dataclass(frozen=True)
class Grid:
    """The cells of one head, best over pools, in the order they are drawn in.

    Attributes:
        head: Kind of head.
        layers: Names in execution order, then combinations such as "all layers".
        levels: Keys from the least noise on as they stand in the results, then combinations.
        cells: (layer, level) -> the cell of the best pool.
        chosen: The (layer, level) that was scored on test, or the best one when no score names one.
    """

    head: str
    layers: list[str]
    levels: list[str]
    cells: dict[tuple[str, str], dict[str, Any]]
    chosen: tuple[str, str]

    @property
    def best(self) -> tuple[str, str]:
        """The (layer, level) with the highest validation score."""
        return max(self.cells, key=lambda key: self.cells[key]["val"])


def grids(metrics: dict[str, Any]) -> list[Grid]:
    """Returns a grid for every head that has cells; the head with the best cell, the main one, comes first."""
    cells = metrics.get("cells", [])
    found = [_grid(metrics, head) for head in dict.fromkeys(cell["head"] for cell in cells)]
    return sorted(found, key=lambda grid: -grid.cells[grid.best]["val"])


def _grid(metrics: dict[str, Any], head: str) -> Grid:
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in metrics["cells"]:
        key = cell["layer"], cell["level"]
        if cell["head"] == head and (key not in cells or cell["val"] > cells[key]["val"]):
            cells[key] = cell
    read_layers, read_levels = ({key[i] for key in cells} for i in (0, 1))
    layers = [layer["name"] for layer in metrics["layers"] if layer["name"] in read_layers]
    levels = [level["key"] for level in metrics["levels"] if level["key"] in read_levels]
    for layer, level in cells:  # combinations stand in no list of the store
        layers += [layer] * (layer not in layers)
        levels += [level] * (level not in levels)
    best = max(cells, key=lambda key: cells[key]["val"])
    network = metrics.get("network")  # without names, each score that is a cell is of the one network
    scored = [
        (one["layer"], one["level"])
        for one in metrics.get("scores", [])
        if one["head"] == head and one.get("network") == network
    ]
    return Grid(head, layers, levels, cells, next((key for key in scored if key in cells), best))


def networks(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns `network`, `layers`, `levels`, `cells` and `scores` of each network of a run, the main one first."""
    return [metrics, *(one | {"scores": metrics["scores"]} for one in metrics.get("beside") or [])]


def heat_maps(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Lays out a tab for each head, the main one first: its map of each network, all on one scale of colours."""
    found = [(network, grid) for network in networks(metrics) for grid in grids(network)]
    tabs = []
    for head in (grid.head for grid in grids(metrics)):
        same = [(network, grid) for network, grid in found if grid.head == head]
        values = [cell["val"] for _, grid in same for cell in grid.cells.values()]
        span = min(values), max(values)
        tabs.append(
            {
                "head": HEADS.get(head, head),
                "maps": [heat_map(network, grid, span) for network, grid in same],
                "low": span[0],
                "high": span[1],
                "legend": [paint(SCORES, step / 8) for step in range(9)],
            }
        )
    return tabs


def heat_map(metrics: dict[str, Any], grid: Grid, span: tuple[float, float]) -> dict[str, Any]:
    """Lays out one map: rows of coloured cells with their numbers.

    Args:
        metrics: Of the network.
        grid: Its cells.
        span: Scores at both ends of the colours.
    """
    known = {layer["name"]: layer for layer in metrics["layers"]}
    sigmas = {level["key"]: level.get("sigma") for level in metrics["levels"]}
    rows = []
    for layer in grid.layers:
        cells = [_drawn(grid, layer, level, *span) for level in grid.levels]
        rows.append({"name": layer, "about": known.get(layer), "cells": cells})
    return {
        "network": metrics.get("network"),
        "rows": rows,
        "levels": [{"key": key, "single": key in sigmas, "sigma": sigmas.get(key)} for key in grid.levels],
        "sided": any(row["about"] for row in rows),
        "chosen": grid.cells[grid.chosen],
        "best": grid.cells[grid.best],
    }


def _drawn(grid: Grid, layer: str, level: str, low: float, high: float) -> dict[str, Any] | None:
    cell = grid.cells.get((layer, level))
    if cell is None:
        return None
    share = (cell["val"] - low) / (high - low) if high > low else 0.5
    return {
        "text": score(cell["val"]),
        "title": describe(cell),
        "paint": paint(SCORES, share),
        "words": words(SCORES, share),
        "chosen": (layer, level) == grid.chosen,
    }


def describe(cell: dict[str, Any]) -> str:
    """Returns what is known of a cell in one line, for a tooltip."""
    parts = [f"{cell['layer']} @ {cell['level']}: {score(cell['val'])}"]
    if cell.get("interval"):
        parts.append(f"95 % interval {score(cell['interval'][0])} – {score(cell['interval'][1])}")
    if cell.get("pool") is not None:
        parts.append(pooling(cell["pool"]))
    parts.append(f"{cell['dim']:,} features")
    if cell.get("bytes"):
        parts.append(size(cell["bytes"]))
    return ", ".join(parts)
