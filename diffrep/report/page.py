"""results.json and its arrays -> one report.html that needs no other file."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from diffrep.config import read_results
from diffrep.report import formats
from diffrep.report.axes import score_axis
from diffrep.report.confusion import bars, confusion
from diffrep.report.curves import level_curves
from diffrep.report.gallery import gallery, pictures
from diffrep.report.geometric import geometric
from diffrep.report.headline import headline
from diffrep.report.heat import grids, heat_maps, networks
from diffrep.report.lowdata import low_data
from diffrep.report.matches import MATCHES, matches
from diffrep.report.mixing import mixing
from diffrep.report.pareto import pareto
from diffrep.report.search import race

PICTURES = "pictures.npz"
ARRAYS = "arrays.npz"
FILTERS = (
    *("score", "count", "percent", "short", "size", "forwards", "pooling"),
    *("setting", "choices", "clipped", "breakable", "capital", "shortened"),
)


def write_report(folder: str | Path) -> Path:
    """Writes report.html into a run folder.

    Sections whose results are missing are left out.

    Args:
        folder: Folder with results.json and, optionally, arrays.npz (predictions and thumbnails) and pictures.npz
            (feature maps as colours), pictures-NETWORK.npz of a second network, and matches.npz (drawn matches).

    Returns:
        The path of report.html.

    Raises:
        ConfigError: There is no results.json, or it cannot be read.
    """
    folder = Path(folder)
    results = read_results(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffrep.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["place"] = formats.place
    environment.filters.update({name: getattr(formats, name) for name in FILTERS})
    page = environment.get_template("page.html.jinja").render(
        results=results, metrics=results["metrics"], **figures(results["metrics"], folder)
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def figures(metrics: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns every figure of the page, laid out; None or empty where its results are missing."""
    maps = grids(metrics)
    arrays = _load(folder / ARRAYS)
    names = _class_names(metrics)
    return {
        "metric": formats.METRICS.get(metrics.get("metric", "accuracy"), metrics.get("metric")),
        "cards": headline(metrics, maps[0] if maps else None),
        "heads": _heads(metrics),
        "maps": heat_maps(metrics),
        "curves": level_curves(metrics, maps[0]) if maps else None,
        "pareto": pareto(metrics, maps[0].head) if maps else [],
        "main": formats.HEADS.get(maps[0].head, maps[0].head) if maps else "",
        "low_data": low_data(metrics),
        "classes": _classes(metrics, arrays, names),
        "gallery": gallery(metrics, arrays, names) if "labels" in arrays else [],
        "race": race(metrics),
        "matches": matches(metrics, folder / MATCHES),
        "geometric": geometric(metrics),
        "mixing": mixing(metrics),
        "pictures": _pictures(metrics, folder),
    }


def _load(file: Path) -> dict[str, np.ndarray]:
    if not file.exists():
        return {}
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def picture_file(network: str | None = None) -> str:
    """Returns the name of the file of colour maps in a run folder; of the main network without a name."""
    return f"pictures-{network}.npz" if network else PICTURES


def _pictures(metrics: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Lays out the colour maps of each image, those of several networks next to each other."""
    main, *others = (network.get("network") for network in networks(metrics))
    found = [(main, picture_file()), *((name, picture_file(name)) for name in others)]
    each = [[one | {"network": name} for one in pictures(folder / file)] for name, file in found]
    return [one for same in zip_longest(*each) for one in same if one]


def _class_names(metrics: dict[str, Any]) -> list[str]:
    classes = (metrics.get("samples") or {}).get("classes", 0)
    return [str(name) for name in metrics.get("names") or range(classes)]


def _heads(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Lays out the table of heads, with the intervals on one common axis, best on validation first."""
    scores = sorted(metrics.get("scores", []), key=lambda score: -score["val"])
    if not scores:
        return None
    axis = score_axis([value for score in scores for value in (score["test"], *score["interval"])], 2, 118)
    columns = {
        key: any(score.get(key) is not None for score in scores)
        for key in ("top5", "mean_per_class", "flops", "forwards", "bytes")
    }
    columns["forwards"] &= not columns["flops"]  # both say what the network's share is
    if metrics.get("metric") == "mean_per_class":  # it would be the same column twice
        columns["mean_per_class"] = False
    rows = [
        {
            **dict.fromkeys((*columns, "error", "pool")),
            **score,
            "seeds": len(score.get("tests") or [0]),
            "marks": [axis.at(value) for value in (score["interval"][0], score["test"], score["interval"][1])],
        }
        for score in scores
    ]
    return {"rows": rows, "columns": columns, "seeds": max(row["seeds"] for row in rows)}


def _classes(metrics: dict[str, Any], arrays: dict[str, np.ndarray], names: list[str]) -> dict[str, Any] | None:
    """Lays out the classes of the best score whose predictions are at hand, or its score of each label."""
    ranked = sorted(enumerate(metrics.get("scores", [])), key=lambda pair: -pair[1]["val"])
    labels = arrays.get("labels")
    for number, score in ranked:
        if labels is not None and labels.ndim == 1 and f"predicted.{number}" in arrays:
            return {"of": score["name"], **confusion(labels, arrays[f"predicted.{number}"], names)}
        if score.get("per_class"):
            found = [
                {"name": name, "value": value, "interval": None}
                for name, value in zip(names, score["per_class"], strict=True)
                if value is not None
            ]
            return {"of": score["name"], "pairs": [], "matrix": None, **bars(found, "average precision")}
    return None
