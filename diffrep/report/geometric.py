"""How far off matches of images with warps of themselves are, in pixels."""

from __future__ import annotations

from typing import Any

TITLES = {"affine": "rotation, scale, shear and shift", "tps": "thin-plate splines"}


def geometric(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Lays out a table for each kind of warp, the smallest error first; empty without any.

    Args:
        metrics: With `geometric`, rows of {"kind", "name", "images", "points", "error", "interval", "median", "near"}.
    """
    found = metrics.get("geometric") or []
    tables = []
    for kind in dict.fromkeys(row["kind"] for row in found):
        rows = sorted((row for row in found if row["kind"] == kind), key=lambda row: row["error"])
        high = max(row["error"] for row in rows) or 1.0
        tables.append(
            {
                "title": TITLES.get(kind, kind),
                "images": rows[0]["images"],
                "points": rows[0]["points"],
                "rows": [row | {"share": f"{100 * row['error'] / high:.1f}%"} for row in rows],
            }
        )
    return tables
