"""How well image pairs were matched, and pictures of the matches."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffrep.report.axes import score_axis
from diffrep.report.confusion import bars
from diffrep.report.formats import score

MATCHES = "matches.npz"
AVERAGES = {"per_image": "per image", "per_point": "per point", "per_class": "per class"}


def matches(metrics: dict[str, Any], file: Path) -> dict[str, Any] | None:
    """Lays out the scores and pictures of matching.

    `metrics["correspondence"]` has `protocol`, `alphas`, `scores` and `pictures`. A score has `name`, `pairs`,
    `points`, `categories` ({name: value at the first alpha}), and for each of `per_image`, `per_point` and `per_class`
    {alpha: [value, low, high]}; its own `protocol` where it differs. A picture has `title`, `of` (the score's name)
    and `pck`.

    Args:
        metrics: Of results.json.
        file: Arrays "match.N" (H, W, 3) uint8 of picture N, and "pca.N" of its maps as colours where there are any.

    Returns:
        `tables` (one for each average), `bars` of the best score's categories, `pictures`; None without any of them.
    """
    found = metrics.get("correspondence") or {}
    scores, drawn = found.get("scores") or [], _pictures(found.get("pictures") or [], file)
    if not scores and not drawn:
        return None
    alphas = [float(alpha) for alpha in found.get("alphas") or []]
    tables = [table for average in AVERAGES if (table := _table(scores, average, alphas, found.get("protocol")))]
    rows = [row for table in tables for row in table["rows"]]
    protocols = list(dict.fromkeys(row["protocol"] for row in rows if row["protocol"]))
    best = tables[0]["rows"][0]["score"] if tables else {}
    categories = best.get("categories") or {}
    listed = [{"name": name, "value": value, "interval": None} for name, value in categories.items()]
    return {
        "protocols": protocols,
        "alphas": [f"{alpha:g}" for alpha in alphas],
        "tables": tables,
        "of": best.get("name"),
        "bars": bars(listed, f"PCK@{alphas[0]:g}") if len(listed) > 1 else None,
        "pictures": drawn,
        "coloured": any(one["colours"] for one in drawn),
    }


def _table(scores: list[dict[str, Any]], average: str, alphas: list[float], protocol: str | None) -> dict | None:
    """Lays out the scores under one average, with intervals on one axis.

    Scores of one protocol stand together, the run's own protocol first, and the best at the first alpha first: scores
    of two protocols do not compare.
    """
    rows = []
    for one in scores:
        cells = {float(alpha): cell for alpha, cell in (one.get(average) or {}).items()}
        if alphas and all(alpha in cells for alpha in alphas):
            counts = [f"{one[key]:,} {key}" for key in ("pairs", "points") if one.get(key) is not None]
            rows.append(
                {
                    "score": one,
                    "name": one["name"],
                    "protocol": one.get("protocol") or protocol,
                    "counts": ", ".join(counts),
                    "cells": [dict(zip(("value", "low", "high"), cells[alpha], strict=True)) for alpha in alphas],
                }
            )
    if not rows:
        return None
    axis = score_axis([value for row in rows for value in row["cells"][0].values()], 2, 118)
    for row in rows:
        row["marks"] = {name: axis.at(value) for name, value in row["cells"][0].items()}
    order = list(dict.fromkeys([protocol, *(row["protocol"] for row in rows)]))
    rows.sort(key=lambda row: (order.index(row["protocol"]), -row["cells"][0]["value"]))
    return {"title": AVERAGES[average], "rows": rows}


def _pictures(listed: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    if not listed or not file.exists():
        return []
    with np.load(file, allow_pickle=False) as arrays:
        return [
            {
                "title": one["title"],
                "of": one.get("of", ""),
                "pck": None if one.get("pck") is None else score(one["pck"]),
                "image": photo(arrays[f"match.{number}"]),
                "colours": photo(arrays[f"pca.{number}"]) if f"pca.{number}" in arrays else None,
            }
            for number, one in enumerate(listed)
            if f"match.{number}" in arrays
        ]


def photo(pixels: np.ndarray) -> str:
    """Returns an image (H, W, 3) of uint8 as a JPEG data URI, without loss of colour detail."""
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG", quality=90, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode()
