"""Lines: validation score over noise levels, and test score over training samples."""

from __future__ import annotations

import math
from typing import Any

from diffrep.report.axes import CHARACTER, Axis, log_axis, log_ticks, score_axis, score_ticks, spread
from diffrep.report.colours import ACCENT, DEPTH, GREY, INK, KINDS, ramp
from diffrep.report.formats import HEADS, count, score, shortened
from diffrep.report.heat import Grid, describe

COLOURED = 10
LABEL = 26  # characters of a line's name beside the drawing


def level_curves(metrics: dict[str, Any], grid: Grid) -> dict[str, Any] | None:
    """Lays out the score over noise levels, one line a layer, each the best over pools.

    Returns:
        Lines, bands and ticks in a drawing of 1060 x 398, or None when there are fewer than two levels.
    """
    levels = [level for level in metrics["levels"] if level["key"] in grid.levels]
    if len(levels) < 2:
        return None
    left, right, top, bottom = 48, 850, 14, 344
    across = _places(levels, left + 14, right - 14)
    rows = {
        layer: [grid.cells[layer, key] for key in across if (layer, key) in grid.cells] for layer in grid.layers
    }
    rows = {layer: cells for layer, cells in rows.items() if cells}
    ranked = sorted(rows, key=lambda layer: -max(cell["val"] for cell in rows[layer]))
    coloured = set(ranked[:COLOURED])
    shown = [cell for layer in rows for cell in rows[layer]]
    bands = [bound for layer in coloured for cell in rows[layer] for bound in cell.get("interval") or ()]
    up = score_axis([*(cell["val"] for cell in shown), *bands], bottom, top)
    colours = _by_depth([layer["name"] for layer in metrics["layers"] if layer["name"] in coloured], ranked[0])
    lines = []
    for layer in sorted(rows, key=lambda layer: (layer in coloured, -ranked.index(layer))):  # the best is drawn last
        lines.append(
            {
                "name": layer,
                "label": shortened(layer, LABEL),
                "colour": colours.get(layer, INK) if layer in coloured else GREY,
                "coloured": layer in coloured,
                "best": layer == ranked[0],
                "dashed": layer in coloured and layer not in colours,
                "points": [
                    {"x": across[cell["level"]], "y": up.at(cell["val"]), "title": describe(cell)}
                    for cell in rows[layer]
                ],
                "band": _band(rows[layer], across, up) if layer in coloured else "",
            }
        )
    named = [line for line in lines if line["coloured"]]
    for line, place in zip(named, spread([n["points"][-1]["y"] for n in named], 16, top, bottom), strict=True):
        line["label_at"] = place
    return {
        "width": 1060,
        "height": 398,
        "box": (left, right, top, bottom),
        "lines": lines,
        "grey": len(rows) - len(named),
        "x": _level_ticks(across),
        "y": score_ticks(up),
        "sigma": _by_sigma(levels),
        "head": HEADS.get(grid.head, grid.head),
    }


def _by_sigma(levels: list[dict[str, Any]]) -> bool:
    sigmas = [level.get("sigma") for level in levels]
    return None not in sigmas and len({sigma for sigma in sigmas if sigma > 0}) > 1


def _places(levels: list[dict[str, Any]], start: float, end: float) -> dict[str, float]:
    """Returns level -> position, in log sigma where sigmas are known; noiseless levels stand left of the others."""
    if not _by_sigma(levels):
        step = (end - start) / (len(levels) - 1)
        return {level["key"]: round(start + i * step, 1) for i, level in enumerate(levels)}
    levels = sorted(levels, key=lambda level: level["sigma"])
    clean = any(level["sigma"] <= 0 for level in levels)
    sigmas = [level["sigma"] for level in levels if level["sigma"] > 0]
    axis = Axis(min(sigmas), max(sigmas), start + 70 * clean, end, log=True)
    return {level["key"]: axis.at(level["sigma"]) if level["sigma"] > 0 else start for level in levels}


def _level_ticks(across: dict[str, float]) -> list[dict[str, Any]]:
    """Returns a tick for each level; a label that would touch another goes a row down, and then is left out."""
    ends = [-math.inf, -math.inf]
    ticks = []
    for key, at in across.items():
        half = len(key) * CHARACTER / 2
        row = next((row for row in (0, 1) if at - half > ends[row] + 6), None)
        if row is not None:
            ends[row] = at + half
        ticks.append({"at": at, "text": "" if row is None else key, "row": row or 0})
    return ticks


def _by_depth(layers: list[str], best: str) -> dict[str, str]:
    last = max(len(layers) - 1, 1)
    return {layer: ACCENT if layer == best else ramp(DEPTH, i / last) for i, layer in enumerate(layers)}


def _band(cells: list[dict[str, Any]], across: dict[str, float], up: Axis) -> str:
    if len(cells) < 2 or not all(cell.get("interval") for cell in cells):
        return ""
    there = [f"{across[cell['level']]},{up.at(cell['interval'][1])}" for cell in cells]
    back = [f"{across[cell['level']]},{up.at(cell['interval'][0])}" for cell in reversed(cells)]
    return " ".join(there + back)


def low_data(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Lays out the test score over the number of training samples, one line a head, and the same as a table.

    Each line ends in the head's score with all training and validation samples, when the results have it.

    Returns:
        Lines, ticks and table in a drawing of 580 x 340, or None when nothing was measured.
    """
    points = metrics.get("low_data") or []
    if not points:
        return None
    left, right, top, bottom = 48, 420, 14, 290
    samples = metrics.get("samples") or {}
    everything = samples.get("train", 0) + samples.get("val", 0)
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        lines.setdefault(point["head"], []).append(point)
    for head, line in lines.items():
        full = next((s for s in metrics.get("scores", []) if s["head"] == head), None)
        if full is not None and everything:
            line.append({"train": "all", "samples": everything, "mean": full["test"], "error": full.get("error")})
        line.sort(key=lambda point: point["samples"])
    every = [point for line in lines.values() for point in line]
    across = log_axis([point["samples"] for point in every], left, right)
    edges = [point["mean"] + side * (point["error"] or 0) for point in every for side in (-1, 1)]
    up = score_axis(edges, bottom, top)
    drawn = [_learning_line(head, line, across, up, number) for number, (head, line) in enumerate(lines.items())]
    for line, place in zip(drawn, spread([d["points"][-1]["y"] for d in drawn], 16, top, bottom), strict=True):
        line["label_at"] = place
    columns = list(dict.fromkeys(point["train"] for point in sorted(every, key=lambda point: point["samples"])))
    return {
        "width": 580,
        "height": 340,
        "box": (left, right, top, bottom),
        "lines": drawn,
        "x": log_ticks(across, count),
        "y": score_ticks(up),
        "columns": columns,
        "rows": [
            {"name": HEADS.get(head, head), "cells": [_cell(line, column) for column in columns]}
            for head, line in lines.items()
        ],
    }


def _learning_line(head: str, line: list[dict[str, Any]], across: Axis, up: Axis, number: int) -> dict[str, Any]:
    points = []
    for point in line:
        error = point["error"] or 0
        points.append(
            {
                "x": across.at(point["samples"]),
                "y": up.at(point["mean"]),
                "low": up.at(point["mean"] - error),
                "high": up.at(point["mean"] + error),
                "title": f"{point['train']}, {count(point['samples'])} samples: {score(point['mean'])}",
            }
        )
    return {
        "name": HEADS.get(head, head),
        "label": shortened(HEADS.get(head, head), LABEL),
        "colour": ACCENT if number == 0 else KINDS[(number - 1) % len(KINDS)],
        "points": points,
    }


def _cell(line: list[dict[str, Any]], column: str) -> dict[str, Any] | None:
    return next((point for point in line if point["train"] == column), None)
