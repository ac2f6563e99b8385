"""The numbers of a run folder as Markdown tables, for documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffrep.config import read_results


def markdown(folder: str | Path) -> str:
    """Returns the scores, the layer x level map of the first head and the low-data rows of a run as Markdown tables.

    Args:
        folder: Run folder with a results.json of a probe.

    Raises:
        ConfigError: There is none.
    """
    metrics = read_results(Path(folder))["metrics"]
    parts = [_scores(metrics), _map(metrics), _low_data(metrics)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _scores(metrics: dict[str, Any]) -> str:
    rows = []
    for one in sorted(metrics["scores"], key=lambda one: -one["test"]):
        low, high = one["interval"]
        pool = "" if one["pool"] is None else f", {one['pool']} x {one['pool']}"
        test = f"{one['test']:.3f}" + (f" ± {one['error']:.3f}" if one["error"] is not None else "")
        features = f"`{one['layer']}`{pool}"
        rows.append([one["name"], test, f"{low:.3f} - {high:.3f}", f"{one['val']:.3f}", features, one["level"] or "-"])
    return _table(["head", "test", "95 % interval", "validation", "features", "level"], rows)


def _map(metrics: dict[str, Any]) -> str:
    """The best validation score of each layer and level over poolings, for the head of the first cell."""
    layers, levels = [one["name"] for one in metrics["layers"]], [one["key"] for one in metrics["levels"]]
    best: dict[tuple[str, str], float] = {}
    for cell in metrics["cells"]:
        if cell["head"] == metrics["cells"][0]["head"]:
            where = cell["layer"], cell["level"]
            best[where] = max(best.get(where, 0.0), cell["val"])
    rows = [
        [f"`{layer}`", *(f"{best[layer, level]:.3f}" if (layer, level) in best else "-" for level in levels)]
        for layer in layers
    ]
    return _table(["layer", *levels], rows) if best else ""


def _low_data(metrics: dict[str, Any]) -> str:
    rows = []
    for one in metrics["low_data"]:
        error = "" if one["error"] is None else f" ± {one['error']:.3f}"
        rows.append([one["train"], f"{one['samples']:,}", one["head"], f"{one['mean']:.3f}{error}"])
    return _table(["training samples", "number", "head", "test"], rows) if rows else ""
