"""Test score over the number of training samples, one line a head."""

from __future__ import annotations

from typing import Any

from diffrep.report.axes import Axis, log_axis, log_ticks, score_axis, score_ticks, spread
from diffrep.report.colours import KINDS
from diffrep.report.formats import HEADS, count, score, shortened

LABEL = 24  # characters of a line's name beside the drawing
WIDE, NARROW = (580, 340, 420), (372, 300, 356)  # width, height and right end of the axis


def low_data(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Lays out the test score over the number of training samples, one line a head, and the same as a table.

    Each line ends in the head's score with all training and validation samples, when the results have it.

    Returns:
        The lines and ticks in a wide and a narrow drawing, and the table; None when nothing was measured.
    """
    points = metrics.get("low_data") or []
    if not points:
        return None
    samples = metrics.get("samples") or {}
    layers = {layer["name"] for layer in metrics["layers"]}
    everything = samples.get("train", 0) + samples.get("val", 0)
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        lines.setdefault(point["head"], []).append(point)
    for head, line in lines.items():
        full = next((s for s in metrics["scores"] if s["head"] == head and s["layer"] in layers), None)
        if full is not None and everything:
            line.append({"train": "all", "samples": everything, "mean": full["test"], "error": full.get("error")})
        line.sort(key=lambda point: point["samples"])
    every = sorted((point for line in lines.values() for point in line), key=lambda point: point["samples"])
    return {
        "drawings": [_drawing(lines, every, *shape) for shape in (WIDE, NARROW)],
        "columns": list({point["train"]: point["samples"] for point in every}.items()),
        "rows": [
            {"name": HEADS.get(head, head), "cells": {point["train"]: point for point in line}}
            for head, line in lines.items()
        ],
    }


def _drawing(
    lines: dict[str, list[dict[str, Any]]], every: list[dict[str, Any]], width: int, height: int, right: int
) -> dict[str, Any]:
    left, top, bottom = 40, 14, height - 50
    across = log_axis([point["samples"] for point in every], left, right)
    edges = [point["mean"] + side * (point["error"] or 0) for point in every for side in (-1, 1)]
    up = score_axis(edges, bottom, top)
    drawn = [_line(head, line, across, up, number) for number, (head, line) in enumerate(lines.items())]
    for line, place in zip(drawn, spread([d["points"][-1]["y"] for d in drawn], 16, top, bottom), strict=True):
        line["label_at"] = place
    return {
        "wide": width == WIDE[0],
        "width": width,
        "height": height,
        "box": (left, right, top, bottom),
        "lines": drawn,
        "legend": sorted(drawn, key=lambda line: line["points"][-1]["y"]),
        "x": log_ticks(across, count),
        "y": score_ticks(up),
    }


def _line(head: str, line: list[dict[str, Any]], across: Axis, up: Axis, number: int) -> dict[str, Any]:
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
    name = HEADS.get(head, head)
    return {
        "name": name,
        "label": shortened(name, LABEL),
        "paint": KINDS[number % len(KINDS)],
        "points": points,
    }
