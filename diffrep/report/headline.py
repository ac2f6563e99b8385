"""The cards at the top of the page: what a reader who reads nothing else should know."""

from __future__ import annotations

from typing import Any

from diffrep.report.formats import HEADS, METRICS, count, pooling, score
from diffrep.report.heat import Grid, grids, networks
from diffrep.report.pareto import best_and_cheapest, savings


def headline(metrics: dict[str, Any], grid: Grid | None) -> list[dict[str, Any]]:
    """Lays out the cards: the best head, each network's best layer and cheapest one, few labels, the best baseline.

    Args:
        metrics: Of results.json.
        grid: The cells of the main head; None when there are none.

    Returns:
        Cards of `title`, `value`, `error` (or None), `where` (names to set in a fixed width) and `note`; the first
        one is the best head's. Cards with nothing to say are left out.
    """
    scores = metrics.get("scores", [])
    if not scores:
        return []
    best = max(scores, key=lambda one: one["val"])
    metric = METRICS.get(metrics.get("metric", "accuracy"), metrics.get("metric"))
    cards = [_card("Best head", best["test"], [best["layer"], best["level"]], best["name"], best.get("error"))]
    cards[0]["note"] += f", {metric} on test"
    for network in networks(metrics) if grid is not None else []:
        cards += [card for own in grids(network) if own.head == grid.head for card in _layers(network, own)]
    cards += _few(metrics, grid.head if grid else best["head"])
    return cards + _baseline(scores, best)


def _card(title: str, value: float, where: list[str], note: str, error: float | None = None) -> dict[str, Any]:
    return {
        "title": title,
        "value": score(value),
        "error": None if error is None else score(error),
        "where": [name for name in where if name],
        "note": note,
    }


def _layers(metrics: dict[str, Any], grid: Grid) -> list[dict[str, Any]]:
    """Returns cards of the best cell of a network and of the cheapest one; none for a single cell."""
    if len(grid.cells) < 2:
        return []
    network = metrics.get("network")
    cells = [cell for cell in metrics["cells"] if cell["head"] == grid.head]
    best = grid.cells[grid.best]
    head = HEADS.get(grid.head, grid.head)
    note = f"of {len(cells)} with {head}, on validation"
    cards = [_card("Best layer and level", best["val"], _where(best, network), note)]
    key = "flops" if all(cell.get("flops") for cell in cells) else "forwards"
    if all(cell.get(key) for cell in cells):
        top, cheap = best_and_cheapest(cells, key)
        if cheap is not top:
            words = f"{savings(top, cheap) or 'costs the same'}, on validation"
            cards.append(_card("Cheapest within one point", cheap["val"], _where(cheap, network), words))
    return cards


def _where(cell: dict[str, Any], network: str | None) -> list[str]:
    pool = [] if cell.get("pool") is None else [pooling(cell["pool"])]
    return [*([network] if network else []), cell["layer"], cell["level"], *pool]


def _few(metrics: dict[str, Any], head: str) -> list[dict[str, Any]]:
    """Returns a card of the least samples that the head was fitted on."""
    points = [point for point in metrics.get("low_data") or [] if point["head"] == head]
    if not points:
        return []
    least = min(points, key=lambda point: point["samples"])
    note = f"{HEADS.get(head, head)} fitted on {count(least['samples'])} samples, on test"
    return [_card(f"With {least['train']}", least["mean"], [], note, least["error"])]


def _baseline(scores: list[dict[str, Any]], best: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a card of the best score on features that no network made, such as pixels: they have no cost."""
    free = [one for one in scores if not one["level"] and not one.get("forwards")]
    if not free or best in free:
        return []
    top = max(free, key=lambda one: one["val"])
    note = f"on test, {score(best['test'] - top['test'])} below the best head"
    return [_card(f"{top['name'][:1].upper()}{top['name'][1:]}", top["test"], [], note, top.get("error"))]
