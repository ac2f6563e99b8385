"""What a score costs: every cell by its cost and its validation score, and the cheapest one that is nearly as good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffrep.report.axes import log_axis, log_ticks, score_axis, score_ticks
from diffrep.report.formats import flops, forwards, percent, short, size
from diffrep.report.heat import describe

POINT = 0.01


def pareto(metrics: dict[str, Any], head: str) -> list[dict[str, Any]]:
    """Lays out the cells of one head over compute, and over bytes.

    Compute is FLOPs per image with encoding, or forward passes for results that do not know FLOPs.

    Returns:
        The two drawings; one whose costs are missing is left out.
    """
    cells = [cell for cell in metrics.get("cells", []) if cell["head"] == head]
    if len(cells) < 2:
        return []
    counted = all(cell.get("flops") for cell in cells)
    compute = ("flops", "FLOPs per image", flops) if counted else ("forwards", "forward passes per image", forwards)
    found = [_plot(cells, *compute, 620), _plot(cells, "bytes", "bytes per sample", size, 420)]
    return [plot for plot in found if plot]


def _plot(
    cells: list[dict[str, Any]], key: str, name: str, text: Callable[[float], str], width: int
) -> dict[str, Any] | None:
    if not all(cell.get(key) for cell in cells):
        return None
    left, right, top, bottom = 48, width - 12, 16, 286
    across = log_axis([cell[key] for cell in cells], left, right)
    up = score_axis([cell["val"] for cell in cells], bottom, top)
    best, cheap = best_and_cheapest(cells, key)
    edge = frontier(cells, key)

    def drawn(cell: dict[str, Any]) -> dict[str, Any]:
        return {"x": across.at(cell[key]), "y": up.at(cell["val"]), "title": f"{describe(cell)}, {text(cell[key])}"}

    # The frontier is a staircase: between two cells nothing better is to be had than the cheaper one.
    steps = [drawn(cell) for cell in edge]
    ends = [step["x"] for step in steps[1:]] + [right]
    stairs = [f"{x},{step['y']}" for step, end in zip(steps, ends, strict=True) for x in (step["x"], end)]
    return {
        "key": key,
        "name": name,
        "width": width,
        "height": 334,
        "box": (left, right, top, bottom),
        "points": [drawn(cell) for cell in cells if not any(cell is other for other in edge)],
        "edge": steps,
        "stairs": " ".join(stairs),
        "best": _mark(drawn(best), "best", left, right, top),
        "cheap": None if cheap is best else _mark(drawn(cheap), "within one point", left, right, top),
        "within": up.at(max(best["val"] - POINT, up.low)),
        "sentence": _sentence(best, cheap, key),
        "x": log_ticks(across, short if key == "flops" else text),
        "y": score_ticks(up),
    }


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


def _mark(point: dict[str, Any], text: str, left: float, right: float, top: float) -> dict[str, Any]:
    """Adds a label, on the side of the point where there is room."""
    flip = point["x"] > (left + right) / 2
    return {**point, "text": text, "anchor": "end" if flip else "start", "shift": -10 if flip else 10}


def _sentence(best: dict[str, Any], cheap: dict[str, Any], key: str) -> dict[str, Any]:
    spent = [("FLOPs", "flops")] if best.get("flops") and cheap.get("flops") else [("forward passes", "forwards")]
    parts = []
    for name, cost in [*spent, ("bytes", "bytes")]:
        if best.get(cost) and cheap.get(cost):
            share = 1 - cheap[cost] / best[cost]
            if abs(share) >= 0.0005:
                parts.append(f"{percent(share)} of the {name}" if share > 0 else f"costs {percent(-share)} more {name}")
    saved = [part for part in parts if not part.startswith("costs")]
    more = [part for part in parts if part.startswith("costs")]
    words = ["saves " + " and ".join(saved)] if saved else []
    return {"best": best, "cheap": cheap, "same": cheap is best, "saves": " but ".join(words + more), "key": key}
