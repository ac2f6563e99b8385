"""A search by successive halving: which cells stayed in the race, and what the label-free ranking says of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffrep.report.colours import SCORES, paint
from diffrep.report.formats import count, flops, score, shortened

EMPTY = "--day:#f3f5f7;--night:#1a2129"
LABELLED = 40  # most layers with a name beside the picture
LISTED = 8


def race(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Lays out one small map for each rung, one for the ranking, and the ranking's first places beside the race's.

    `metrics["search"]` has these keys; either list may be empty or missing:

    - `rungs`: from the first rung to the last, each with `samples` (images that features were extracted of), `cells`,
      and `flops` (what this rung took; optional). A cell has `layer`, `level`, `val` (validation score on those
      samples) and `kept` (whether it goes on to the next rung; what it says in the last rung is not looked at). Cells
      that left the race before are not listed again.
    - `ranking`: the label-free ranking, each cell with `layer`, `level`, `alignment`, `uniformity` and `score` (higher
      is better), in any order.

    Args:
        metrics: With `search`, and `layers` and `levels` for the order of rows and columns.

    Returns:
        `rungs` and `ranking` as maps, the `winner`, the `list` of the ranking's first places, and the `agreement` of
        ranking and race; None when nothing was searched.
    """
    search = metrics.get("search") or {}
    rungs, ranking = search.get("rungs") or [], search.get("ranking") or []
    if not rungs and not ranking:
        return None
    everything = [cell for rung in rungs for cell in rung["cells"]] + ranking
    layers = _in_order([layer["name"] for layer in metrics.get("layers", [])], [cell["layer"] for cell in everything])
    levels = _in_order([level["key"] for level in metrics.get("levels", [])], [cell["level"] for cell in everything])
    winner = search.get("winner") or (max(rungs[-1]["cells"], key=lambda cell: cell["val"]) if rungs else None)
    spent = [rung.get("flops") for rung in rungs]
    maps = [_map(rung["cells"], layers, levels, "val", None if rung is rungs[-1] else "kept") for rung in rungs]
    for rung, drawn in zip(rungs, maps, strict=True):
        stay = "the best framed" if rung is rungs[-1] else f"{sum(cell['kept'] for cell in rung['cells'])} stay"
        drawn["title"] = f"{count(rung['samples'])} samples"
        drawn["text"] = f"{len(rung['cells'])} cells, {stay}"
        drawn["flops"] = flops(rung["flops"]) if rung.get("flops") else ""
    if winner:
        maps[-1]["mark"] = next(cell for cell in maps[-1]["cells"] if cell["key"] == _key(winner))
    return {
        "rungs": maps,
        "winner": winner,
        "flops": flops(sum(spent)) if spent and all(spent) else "",
        "ranking": _map(ranking, layers, levels, "score") if ranking else None,
        "list": _first_places(ranking, rungs),
        "agreement": agreement(ranking, rungs[0]["cells"]) if rungs and ranking else None,
    }


def _in_order(known: list[str], found: list[str]) -> list[str]:
    """Returns the names that were found: those of the store in its order, then others as they come."""
    return [name for name in dict.fromkeys([*known, *found]) if name in set(found)]


def _key(cell: dict[str, Any]) -> tuple[str, str]:
    return cell["layer"], cell["level"]


def _map(
    cells: list[dict[str, Any]], layers: list[str], levels: list[str], by: str, kept: str | None = None
) -> dict[str, Any]:
    """Lays out squares coloured by `by`; those whose `kept` is false are small, places without a cell grey."""
    wide, high = min(max(160 // len(levels), 7), 20), min(max(300 // len(layers), 5), 16)
    names = [shortened(layer, 20) for layer in layers] if len(layers) <= LABELLED else []
    left = max((len(name) for name in names), default=0) * 6.1 + 6
    values = [cell[by] for cell in cells]
    low, span = min(values), max(values) - min(values)
    found = {_key(cell): cell for cell in cells}
    drawn = []
    for row, layer in enumerate(layers):
        for column, level in enumerate(levels):
            cell = found.get((layer, level))
            share = (cell[by] - low) / span if cell and span else 0.5
            inset = 0.3 if cell and kept and not cell[kept] else 0.0
            drawn.append(
                {
                    "key": (layer, level),
                    "x": round(left + (column + inset) * wide, 1),
                    "y": round((row + inset) * high, 1),
                    "wide": round((1 - 2 * inset) * wide - 1, 1),
                    "high": round((1 - 2 * inset) * high - 1, 1),
                    "paint": paint(SCORES, 0.1 + 0.9 * share) if cell else EMPTY,
                    "title": f"{layer} @ {level}: {score(cell[by])}" if cell else "",
                }
            )
    return {
        "cells": drawn,
        "names": [{"text": name, "y": (row + 0.5) * high} for row, name in enumerate(names)],
        "ends": (levels[0], levels[-1] if len(levels) > 1 else ""),
        "left": left,
        "width": round(left + wide * len(levels) + 1, 1),
        "height": high * len(layers) + 16,
    }


def _first_places(ranking: list[dict[str, Any]], rungs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the ranking's best cells with how far each came in the race."""
    places = []
    for cell in sorted(ranking, key=lambda cell: -cell["score"])[:LISTED]:
        seen = [(number, other) for number, rung in enumerate(rungs, 1) for other in rung["cells"]]
        reached = [(number, other["val"]) for number, other in seen if _key(other) == _key(cell)]
        places.append(cell | {"rung": reached[-1][0] if reached else None, "val": reached[-1][1] if reached else None})
    return places


def agreement(ranking: list[dict[str, Any]], cells: list[dict[str, Any]]) -> float | None:
    """Returns Spearman's rank correlation of the ranking and the first rung's scores; None when one is constant."""
    found = {_key(cell): cell["val"] for cell in cells}
    both = [(cell["score"], found[_key(cell)]) for cell in ranking if _key(cell) in found]
    if len(both) < 3:
        return None
    ranks = [_ranks(np.array(column)) for column in zip(*both, strict=True)]
    if any(np.ptp(column) == 0 for column in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 0, ties sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
