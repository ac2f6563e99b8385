"""Validation score over noise levels, one line a layer."""

from __future__ import annotations

import math
from typing import Any

from diffrep.report.axes import CHARACTER, Axis, score_axis, score_ticks, spread
from diffrep.report.colours import ACCENT, DEPTH, GREY, INK, paint
from diffrep.report.formats import HEADS, shortened
from diffrep.report.heat import Grid, describe

COLOURED = 10
LABEL = 30  # characters of a line's name beside the drawing
WIDE, NARROW = (1060, 398, 838), (372, 330, 362)  # width, height and right end of the axis


def level_curves(metrics: dict[str, Any], grid: Grid) -> dict[str, Any] | None:
    """Lays out the score over noise levels, one line a layer, each the best over pools.

    Returns:
        The same lines, bands and ticks in a wide and a narrow drawing, or None when there are fewer than two levels.
    """
    levels = [level for level in metrics["levels"] if level["key"] in grid.levels]
    if len(levels) < 2:
        return None
    keys = [level["key"] for level in levels]
    rows = {layer: [grid.cells[layer, key] for key in keys if (layer, key) in grid.cells] for layer in grid.layers}
    rows = {layer: cells for layer, cells in rows.items() if cells}
    ranked = sorted(rows, key=lambda layer: -max(cell["val"] for cell in rows[layer]))
    order = [layer["name"] for layer in metrics["layers"] if layer["name"] in ranked[:COLOURED]]
    lines = _named(rows, ranked, order)
    widths = [
        (cell["interval"][1] - cell["interval"][0]) / 2
        for layer in ranked[1:COLOURED]
        for cell in rows[layer]
        if cell.get("interval")
    ]
    return {
        "drawings": [_drawing(lines, levels, wide=True), _drawing(lines, levels, wide=False)],
        "coloured": min(len(rows), COLOURED),
        "grey": max(len(rows) - COLOURED, 0),
        "intervals": all(cell.get("interval") for cell in rows[ranked[0]]),
        "others": (min(widths), max(widths)) if widths else None,
        "sigma": _by_sigma(levels),
        "head": HEADS.get(grid.head, grid.head),
    }


def _named(rows: dict[str, list[dict[str, Any]]], ranked: list[str], order: list[str]) -> list[dict[str, Any]]:
    """Returns the lines with their colours, the best one last so that it is drawn over the others."""
    last = max(len(order) - 1, 1)
    depth = {layer: paint(DEPTH, i / last) for i, layer in enumerate(order)}
    lines = []
    for layer in reversed(ranked):
        coloured, best = layer in ranked[:COLOURED], layer == ranked[0]
        lines.append(
            {
                "name": layer,
                "label": shortened(layer, LABEL),
                "paint": ACCENT if best else depth.get(layer, INK) if coloured else GREY,
                "coloured": coloured,
                "best": best,
                "dashed": coloured and layer not in depth,  # a combination of layers has no depth
                "cells": rows[layer],
            }
        )
    return lines


def _drawing(lines: list[dict[str, Any]], levels: list[dict[str, Any]], wide: bool) -> dict[str, Any]:
    width, height, right = WIDE if wide else NARROW
    left, top, bottom = (48, 14, height - 58) if wide else (36, 10, height - 52)
    across = _places(levels, left + 14, right - 14)
    best = lines[-1]
    # Bands other than the best one's are seen one at a time, and may leave the drawing.
    bands = [bound for cell in best["cells"] for bound in cell.get("interval") or ()]
    up = score_axis([*(cell["val"] for line in lines for cell in line["cells"]), *bands], bottom, top)
    drawn = [
        line
        | {
            "points": [
                {"x": across[cell["level"]], "y": up.at(cell["val"]), "title": describe(cell)}
                for cell in line["cells"]
            ],
            "band": _band(line["cells"], across, up) if line["coloured"] else "",
        }
        for line in lines
    ]
    named = [line for line in drawn if line["coloured"]]
    for line, place in zip(named, spread([n["points"][-1]["y"] for n in named], 16, top, bottom), strict=True):
        line["label_at"] = place
    return {
        "wide": wide,
        "width": width,
        "height": height,
        "box": (left, right, top, bottom),
        "lines": drawn,
        "legend": sorted(named, key=lambda line: line["points"][-1]["y"]),
        "x": _level_ticks(levels, across),
        "y": score_ticks(up),
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
    axis = Axis(min(sigmas), max(sigmas), start + (end - start) / 10 * clean, end, log=True)
    return {level["key"]: axis.at(level["sigma"]) if level["sigma"] > 0 else start for level in levels}


def _level_ticks(levels: list[dict[str, Any]], across: dict[str, float]) -> list[dict[str, Any]]:
    """Returns a tick for each level: its key, and below it sigma where that says more and every key found room.

    A label that would touch another goes a row down, and where that is taken too it is left out.
    """
    ends = [-math.inf, -math.inf]
    ticks = []
    for key, at in sorted(across.items(), key=lambda pair: pair[1]):
        half = len(key) * CHARACTER / 2
        row = next((row for row in (0, 1) if at - half > ends[row] + 6), None)
        if row is not None:
            ends[row] = at + half
        ticks.append({"key": key, "at": at, "text": "" if row is None else key, "row": row or 0})
    sigmas = {level["key"]: level.get("sigma") for level in levels}
    told = _by_sigma(levels) and not any(key.startswith("sigma=") for key in sigmas)
    if told and all(tick["text"] and tick["row"] == 0 for tick in ticks):
        end = -math.inf
        for tick in ticks:
            text = f"{sigmas[tick['key']]:.2g}"
            half = len(text) * CHARACTER / 2
            if tick["at"] - half > end + 6:
                tick["under"], end = text, tick["at"] + half
    return ticks


def _band(cells: list[dict[str, Any]], across: dict[str, float], up: Axis) -> str:
    if len(cells) < 2 or not all(cell.get("interval") for cell in cells):
        return ""
    there = [f"{across[cell['level']]},{up.at(cell['interval'][1])}" for cell in cells]
    back = [f"{across[cell['level']]},{up.at(cell['interval'][0])}" for cell in reversed(cells)]
    return " ".join(there + back)
