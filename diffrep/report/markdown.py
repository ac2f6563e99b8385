"""The numbers of a run folder as Markdown tables, for documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffrep.config import read_results
from diffrep.report.heat import networks


def markdown(folder: str | Path) -> str:
    """Returns a run's scores as Markdown tables.

    Of a probe these are heads, the layer x level map of the first one, for each network, and the low-data rows; of an
    evaluation of matches the PCK of each descriptor under each protocol, and the errors of geometric matching.

    Args:
        folder: Run folder with a results.json.

    Raises:
        ConfigError: There is none.
    """
    metrics = read_results(Path(folder))["metrics"]
    maps = map(_map, networks(metrics))
    parts = [_scores(metrics), *maps, _low_data(metrics), _matches(metrics), _geometric(metrics)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _scores(metrics: dict[str, Any]) -> str:
    rows = []
    for one in sorted(metrics.get("scores", []), key=lambda one: -one["test"]):
        low, high = one["interval"]
        pool = "" if one["pool"] is None else f", {one['pool']} x {one['pool']}"
        test = f"{one['test']:.3f}" + (f" ± {one['error']:.3f}" if one["error"] is not None else "")
        features = f"`{one['layer']}`{pool}"
        rows.append([one["name"], test, f"{low:.3f} - {high:.3f}", f"{one['val']:.3f}", features, one["level"] or "-"])
    return _table(["head", "test", "95 % interval", "validation", "features", "level"], rows) if rows else ""


def _map(metrics: dict[str, Any]) -> str:
    """The best validation score of a network's layers and levels over poolings, for the head of the first cell."""
    layers, levels = (
        [one[key] for one in metrics.get(name, [])] for name, key in (("layers", "name"), ("levels", "key"))
    )
    best: dict[tuple[str, str], float] = {}
    for cell in metrics.get("cells", []):
        if cell["head"] == metrics["cells"][0]["head"]:
            where = cell["layer"], cell["level"]
            best[where] = max(best.get(where, 0.0), cell["val"])
    rows = [
        [f"`{layer}`", *(f"{best[layer, level]:.3f}" if (layer, level) in best else "-" for level in levels)]
        for layer in layers
    ]
    layer = f"layer of `{metrics['network']}`" if metrics.get("network") else "layer"
    return _table([layer, *levels], rows) if best else ""


def _low_data(metrics: dict[str, Any]) -> str:
    rows = []
    for one in metrics.get("low_data", []):
        error = "" if one["error"] is None else f" ± {one['error']:.3f}"
        rows.append([one["train"], f"{one['samples']:,}", one["head"], f"{one['mean']:.3f}{error}"])
    return _table(["training samples", "number", "head", "test"], rows) if rows else ""


def _matches(metrics: dict[str, Any]) -> str:
    """The averages of each descriptor and protocol at every alpha; the interval is that of the first column."""
    found = metrics.get("correspondence") or {}
    scores = sorted(found.get("scores", []), key=lambda one: -next(iter(one["per_image"].values()))[0])
    if not scores:
        return ""
    alphas = list(scores[0]["per_image"])
    rows = []
    for one in scores:
        low, high = one["per_image"][alphas[0]][1:]
        means = [
            f"{one[average][alpha][0]:.3f}" for alpha in alphas for average in ("per_image", "per_point", "per_class")
        ]
        rows.append([one["name"], means[0], f"{low:.3f} - {high:.3f}", *means[1:], one["protocol"]])
    head = [f"per {average} @{alpha}" for alpha in alphas for average in ("image", "point", "class")]
    return _table(["descriptor", head[0], "95 % interval", *head[1:], "protocol"], rows)


def _geometric(metrics: dict[str, Any]) -> str:
    rows = []
    for one in sorted(metrics.get("geometric") or [], key=lambda one: (one["kind"], one["error"])):
        low, high = one["interval"]
        errors = [f"{one['error']:.2f}", f"{low:.2f} - {high:.2f}", f"{one['median']:.2f}", f"{one['near']:.3f}"]
        rows.append([one["name"], one["kind"], *errors])
    head = ["descriptor", "warp", "error, px", "95 % interval", "median, px", "within a tenth of the side"]
    return _table(head, rows) if rows else ""
