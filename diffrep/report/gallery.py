"""Pictures: test images a head was most and least certain of, and feature maps as colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffrep.report.formats import shortened


def gallery(metrics: dict[str, Any], arrays: Mapping[str, np.ndarray], names: list[str]) -> list[dict[str, Any]]:
    """Lays out the rows of images named in the results, each image with its true and predicted class.

    Images without a thumbnail are named by their id.
    """
    scores = [score["name"] for score in metrics.get("scores", [])]
    where = {int(row): i for i, row in enumerate(arrays["thumbnail_rows"])} if "thumbnail_rows" in arrays else {}
    thumbnails = arrays["thumbnails"] if where else ()  # an .npz unpacks an array anew at each access
    shelves = []
    for shelf in metrics.get("gallery") or []:
        number = scores.index(shelf["of"])
        if f"confidence.{number}" not in arrays:
            continue
        predicted, confidence = arrays[f"predicted.{number}"], arrays[f"confidence.{number}"]
        labels, ids = arrays["labels"], arrays.get("ids")
        images = []
        for row in shelf["rows"]:
            right = bool(labels[row, predicted[row]]) if labels.ndim == 2 else labels[row] == predicted[row]
            images.append(
                {
                    "true": _true_names(labels[row], names),
                    "predicted": names[int(predicted[row])],
                    "right": right,
                    "confidence": f"{confidence[row]:.2f}",
                    "id": "" if ids is None else str(ids[row]),
                    "short_id": "" if ids is None else shortened(str(ids[row]), 20),
                    "image": png(thumbnails[where[row]]) if row in where else None,
                }
            )
        if images:
            shelves.append({"title": shelf["title"], "of": shelf["of"], "images": images})
    return shelves


def _true_names(label: np.ndarray, names: list[str]) -> str:
    if label.ndim == 0:
        return names[int(label)]
    return ", ".join(names[i] for i in np.flatnonzero(label)) or "none"


def pictures(file: Path) -> list[dict[str, Any]]:
    """Reads colour maps: arrays "layer@level" (N, h, w, 3) for the N images of array "images" (N, H, W[, 3])."""
    if not file.exists():
        return []
    with np.load(file, allow_pickle=False) as arrays:
        layers, levels = arrays["layers"].tolist(), arrays["levels"].tolist()
        maps = {(layer, level): arrays[f"{layer}@{level}"] for layer in layers for level in levels}
        images = arrays["images"]
    return [
        {
            "image": png(image),
            "levels": levels,
            "rows": [
                {"layer": layer, "cells": [png(maps[layer, level][number]) for level in levels]} for layer in layers
            ],
        }
        for number, image in enumerate(images)
    ]


def png(pixels: np.ndarray) -> str:
    """Returns an image (H, W) or (H, W, 3) of uint8 as a data URI."""
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()
