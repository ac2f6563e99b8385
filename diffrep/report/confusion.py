"""Which classes are taken for which, and how well each is found."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffrep.report.colours import ERRORS, SCORES, paint, words
from diffrep.report.formats import percent, score

COUNTED = 20  # most classes with a number in each cell
DRAWN = 40  # most classes with a matrix at all
PAIRS = 8
WORST = 12


def confusion(labels: np.ndarray, predicted: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Lays out the confusion matrix, its most frequent errors and the recall of each class.

    Args:
        labels: (M,) true class numbers.
        predicted: (M,) predicted class numbers.
        names: Name of each class.

    Returns:
        `matrix` (rows of cells, None above 40 classes), `pairs` in words, and `bars` of the classes with test samples.
    """
    classes = len(names)
    counts = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    totals = counts.sum(1)
    errors = counts - np.diag(np.diag(counts))
    order = np.argsort(-errors, axis=None, kind="stable")[:PAIRS]
    places = [divmod(int(place), classes) for place in order]
    pairs = [
        {
            "true": names[true],
            "predicted": names[guess],
            "count": int(errors[true, guess]),
            "total": int(totals[true]),
            "share": percent(errors[true, guess] / totals[true]),
        }
        for true, guess in places
        if errors[true, guess]
    ]
    found = [
        {"name": names[i], "value": counts[i, i] / totals[i], "interval": wilson(int(counts[i, i]), int(totals[i]))}
        for i in range(classes)
        if totals[i]
    ]
    return {
        "matrix": _matrix(counts, names) if classes <= DRAWN else None,
        "numbers": classes <= COUNTED,
        "names": names,
        "pairs": pairs,
        **bars(found, "recall"),
    }


def bars(found: list[dict[str, Any]], measure: str) -> dict[str, Any]:
    """Lays out one bar a class, from the best to the worst; of more than 40 classes only the worst ones.

    Args:
        found: `name`, `value` and `interval` (or None) of each class.
        measure: What the values are.
    """
    ranked = sorted(found, key=lambda bar: -bar["value"])
    shown = ranked if len(ranked) <= DRAWN else ranked[-WORST:]
    return {
        "bars": [
            {
                "name": bar["name"],
                "text": score(bar["value"]),
                "width": _width(bar["value"]),
                "low": _width(bar["interval"][0]) if bar["interval"] else None,
                "span": _width(bar["interval"][1] - bar["interval"][0]) if bar["interval"] else None,
            }
            for bar in shown
        ],
        "all_bars": len(ranked),
        "measure": measure,
    }


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a share (Wilson, 1927)."""
    z = 1.96
    share = hits / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(center - half, 0.0), min(center + half, 1.0)


def _matrix(counts: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    worst = max(float((shares - np.diag(np.diag(shares))).max()), 1e-9)
    rows = []
    for true, name in enumerate(names):
        cells = []
        for guess in range(len(names)):
            share = float(shares[true, guess])
            stops, part = (SCORES, share) if true == guess else (ERRORS, share / worst)
            cells.append(
                {
                    "count": int(counts[true, guess]),
                    "title": f"{name} taken for {names[guess]}: {counts[true, guess]} ({percent(share)})",
                    "paint": paint(stops, part),
                    "words": words(stops, part),
                }
            )
        rows.append({"name": name, "cells": cells})
    return rows


def _width(share: float) -> str:
    return f"{100 * share:.1f}%"
