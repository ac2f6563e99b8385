"""results.json and its arrays -> one report.html that needs no other file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from diffrep.config import read_results

PICTURES = "pictures.npz"
# Ends and middle of the heat map's colour scale, light to dark, chosen to stay readable in grey.
SCALE = ((247, 251, 255), (107, 174, 214), (8, 48, 107))
LINES = ("#1b6ca8", "#d1495b", "#2e933c", "#edae49", "#7b4b94", "#3d405b", "#00a6a6", "#a05a2c", "#8d99ae", "#222222")


def write_report(folder: str | Path) -> Path:
    """Writes report.html into a run folder.

    Args:
        folder: Folder with results.json and, optionally, pictures.npz.

    Returns:
        The path of report.html.

    Raises:
        ConfigError: There is no results.json.
    """
    folder = Path(folder)
    results = read_results(folder)
    metrics = results["metrics"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffrep.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(
        results=results,
        metrics=metrics,
        scores=sorted(metrics["scores"], key=lambda score: -score["test"]),
        maps=[_heat_map(metrics, head) for head in ("linear", "knn")],
        curves=_curves(metrics, "linear"),
        pictures=_pictures(folder / PICTURES),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _heat_map(metrics: dict[str, Any], head: str) -> dict[str, Any]:
    values = {(cell["layer"], cell["level"]): cell[head] for cell in metrics["cells"]}
    low, high = min(values.values()), max(values.values())
    winner = next(
        ((s["layer"], s["level"]) for s in metrics["scores"] if s["head"] == head), max(values, key=values.get)
    )
    rows = []
    for layer in metrics["layers"]:
        cells = []
        for level in metrics["levels"]:
            value = values.get((layer["name"], level["key"]))
            share = 0.0 if value is None or high == low else (value - low) / (high - low)
            cells.append(
                {
                    "value": value,
                    "colour": _colour(share),
                    "dark": share > 0.55,
                    "best": (layer["name"], level["key"]) == winner,
                }
            )
        rows.append({"layer": layer, "cells": cells})
    return {"head": head, "rows": rows}


def _colour(share: float) -> str:
    half = share * 2
    start, end = (SCALE[0], SCALE[1]) if half <= 1 else (SCALE[1], SCALE[2])
    part = half if half <= 1 else half - 1
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(start, end, strict=True))


def _curves(metrics: dict[str, Any], head: str) -> dict[str, Any]:
    """Lays out validation accuracy over levels, one line a layer, as points of an SVG of 640 x 300."""
    values = {(cell["layer"], cell["level"]): cell[head] for cell in metrics["cells"]}
    low, high = min(values.values()), max(values.values())
    ticks = [
        tick for tick in np.arange(np.floor(low * 50) / 50, high + 0.02, 0.02) if low - 0.02 <= tick <= high + 0.02
    ]
    bottom, top = ticks[0], ticks[-1]
    levels = metrics["levels"]
    across = [60 + i * (560 / max(1, len(levels) - 1)) for i in range(len(levels))]

    def height(value: float) -> float:
        return 260 - 240 * (value - bottom) / max(1e-9, top - bottom)

    lines = []
    for number, layer in enumerate(metrics["layers"]):
        points = [
            (x, height(values[layer["name"], level["key"]]))
            for x, level in zip(across, levels, strict=True)
            if (layer["name"], level["key"]) in values
        ]
        lines.append(
            {
                "name": layer["name"],
                "colour": LINES[number % len(LINES)],
                "dashed": number >= len(LINES),
                "points": [(f"{x:.1f}", f"{y:.1f}") for x, y in points],
            }
        )
    every = max(1, len(ticks) // 8)
    return {
        "lines": lines,
        "x": [{"at": f"{x:.1f}", "text": level["key"]} for x, level in zip(across, levels, strict=True)],
        "y": [{"at": f"{height(tick):.1f}", "text": f"{tick:.2f}"} for tick in ticks[::every]],
    }


def _pictures(file: Path) -> list[dict[str, Any]]:
    """Reads colour maps: arrays "layer@level" (N, h, w, 3) for the N images of array "images" (N, H, W)."""
    if not file.exists():
        return []
    arrays = np.load(file, allow_pickle=False)
    images = [_png(image) for image in arrays["images"]]
    layers, levels = arrays["layers"].tolist(), arrays["levels"].tolist()
    grids = []
    for number, image in enumerate(images):
        rows = [
            {"layer": layer, "cells": [_png(arrays[f"{layer}@{level}"][number]) for level in levels]}
            for layer in layers
        ]
        grids.append({"image": image, "rows": rows, "levels": levels})
    return grids


def _png(pixels: np.ndarray) -> str:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    return base64.b64encode(packed.getvalue()).decode()
