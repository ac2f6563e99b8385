"""What a score costs: every cell by its cost and its validation score, and the cheapest one that is nearly as good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffrep.report.axes import Axis, log_axis, log_ticks, score_axis, score_ticks
from diffrep.report.formats import flops, forwards, percent, short, size
from diffrep.report.heat import describe

# Widths that the labels take, in pixels.
LABEL = {"best": 40, "within one point": 115}
POINT = 0.01
WIDE, NARROW = (520, 334), (372, 290)  # width and height
BELOW = 0.35  # of the frontier's span: how far below it cells are drawn


def pareto(metrics: dict[str, Any], head: str) -> list[dict[str, Any]]:
    """Lays out the cells of one head over compute, and over bytes.

    Compute is FLOPs per image with encoding, or forward passes for results that do not know FLOPs.

    Returns:
        The two plots, each with a wide and a narrow drawing, the frontier as a table and what to say of it; one whose
        costs are missing, or all the same, is left out.
    """
    cells = [cell for cell in metrics.get("cells", []) if cell["head"] == head]
    if len(cells) < 2:
        return []
    if all(cell.get("flops") for cell in cells):
        found = [_plot(cells, "flops", "FLOPs", "FLOPs per image", flops)]
    else:
        found = [_plot(cells, "forwards", "forward passes", "forward passes per image", forwards)]
    found.append(_plot(cells, "bytes", "bytes", "bytes per sample", size))
    return [plot for plot in found if plot]


def _plot(
    cells: list[dict[str, Any]], key: str, unit: str, name: str, text: Callable[[float], str]
) -> dict[str, Any] | None:
    costs = {cell.get(key) for cell in cells}
    if not all(costs) or len(costs) < 2:
        return None
    best, cheap = best_and_cheapest(cells, key)
    edge = frontier(cells, key)
    return {
        "key": key,
        "unit": unit,
        "name": name,
        "best": best,
        "cheap": None if cheap is best else cheap,
        "saves": savings(best, cheap),
        "frontier": [{**cell, "cost": text(cell[key]), "cheap": cell is cheap and cheap is not best} for cell in edge],
        "drawings": [_drawing(cells, edge, (best, cheap), key, text, *shape) for shape in (WIDE, NARROW)],
    }


def _drawing(
    cells: list[dict[str, Any]],
    edge: list[dict[str, Any]],
    marked: tuple[dict[str, Any], dict[str, Any]],
    key: str,
    text: Callable[[float], str],
    width: int,
    height: int,
) -> dict[str, Any]:
    left, right, top, bottom = 44, width - 14, 22, height - 48
    across = log_axis([cell[key] for cell in cells], left, right)
    up = _score_axis(cells, edge, bottom, top)
    shown = [cell for cell in cells if cell["val"] >= up.low]

    def drawn(cell: dict[str, Any]) -> dict[str, Any]:
        return {"x": across.at(cell[key]), "y": up.at(cell["val"]), "title": f"{describe(cell)}, {text(cell[key])}"}

    # The frontier is a staircase: between two cells nothing better is to be had than the cheaper one.
    steps = [drawn(cell) for cell in edge]
    ends = [step["x"] for step in steps[1:]] + [right]
    stairs = [f"{x},{step['y']}" for step, end in zip(steps, ends, strict=True) for x in (step["x"], end)]
    best, cheap = marked
    return {
        "wide": width == WIDE[0],
        "width": width,
        "height": height,
        "box": (left, right, top, bottom),
        "points": [drawn(cell) for cell in shown if not any(cell is other for other in edge)],
        "below": len(cells) - len(shown),
        "edge": steps,
        "stairs": " ".join(stairs),
        "best": _mark(drawn(best), "best", right - drawn(best)["x"] < LABEL["best"]),
        "cheap": None
        if cheap is best
        else _mark(drawn(cheap), "within one point", drawn(cheap)["x"] - left > LABEL["within one point"]),
        "within": up.at(max(best["val"] - POINT, up.low)),
        "x": log_ticks(across, short if key == "flops" else text),
        "y": score_ticks(up),
    }


def _score_axis(cells: list[dict[str, Any]], edge: list[dict[str, Any]], bottom: float, top: float) -> Axis:
    """Returns an axis on which the frontier fills most of the height; cells far below it would press it flat."""
    low, high = edge[0]["val"], edge[-1]["val"]
    floor = low - BELOW * max(high - low, 5 * POINT)
    return score_axis([max(min(cell["val"] for cell in cells), floor), high], bottom, top)


def best_and_cheapest(cells: list[dict[str, Any]], key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the best cell on validation, and the cheapest whose score is at most one point below it.

    Among equals the first is the one with the higher score, or the lower cost.
    """
    best = max(cells, key=lambda cell: (cell["val"], -cell[key]))
    near = [cell for cell in cells if cell["val"] >= best["val"] - POINT - 1e-9]
    return best, min(near, key=lambda cell: (cell[key], -cell["val"]))


def frontier(cells: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Returns the cells that no cheaper or equally cheap cell beats, from cheap to costly."""
    edge: list[dict[str, Any]] = []
    for cell in sorted(cells, key=lambda cell: (cell[key], -cell["val"])):
        if not edge or cell["val"] > edge[-1]["val"]:
            edge.append(cell)
    return edge


def savings(best: dict[str, Any], cheap: dict[str, Any]) -> str:
    """Returns what the cheap cell saves, and what it costs more, in words; empty where they cost the same."""
    compute = ("FLOPs", "flops") if best.get("flops") and cheap.get("flops") else ("forward passes", "forwards")
    saved, more = [], []
    for name, cost in (compute, ("bytes", "bytes")):
        if not (best.get(cost) and cheap.get(cost)):
            continue
        share = 1 - cheap[cost] / best[cost]
        if share >= 0.0005:
            saved.append(f"{percent(share)} of the {name}")
        elif share <= -0.0005:
            more.append(f"takes {percent(-share)} more {name}")
    words = ["saves " + " and ".join(saved)] if saved else []
    return " but ".join(words + more)


def _mark(point: dict[str, Any], text: str, before: bool) -> dict[str, Any]:
    """Adds a label before or behind the point: the cheap one before, the best one behind, where there is room."""
    return {**point, "text": text, "anchor": "end" if before else "start", "shift": -10 if before else 10}
