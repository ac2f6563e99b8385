"""A page to click through: pick a point in one image, see where the other is like it."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from diffrep.errors import DataError
from diffrep.report.formats import count
from diffrep.report.matches import photo

LARGEST = 640  # longest side of a photo in the page
CELLS = 16384  # of one map in the page
BYTES = 2_200_000  # of both maps' values in the page
RESIDUAL = 0.002  # of a cell's energy that the page's projection may leave out, where there is room
COARSE = 0.05  # a component beyond it is stored with twice the digits, where there is room
COMPARED = 2048  # cells of each map that the page's error is measured on

Inside = tuple[float, float, float, float]


def write_match_page(
    file: str | Path,
    images: tuple[np.ndarray, np.ndarray],
    maps: tuple[np.ndarray, np.ndarray],
    inside: tuple[Inside, Inside] = ((0.0, 0.0, 1.0, 1.0),) * 2,
    names: tuple[str, str] = ("A", "B"),
    about: str = "",
) -> float:
    """Writes one self-contained page: a point of one image shows its cosine similarity over the other, both ways.

    The page enlarges both maps bilinearly, as DIFT does: similarities are dot products of interpolated features over
    their exact norms. Maps are projected on their leading common directions and rounded so that the page stays below
    5 MB; the page says what that costs. `page.html#x,y` opens it with a point of the first image chosen,
    `page.html#B,x,y` with one of the second.

    Args:
        file: The `.html` to write.
        images: (H, W, 3) uint8 each.
        maps: (C, h, w) each; maps of more than 16,384 cells are averaged in blocks.
        inside: Where each image lies on the canvas of its map: x0, y0, x1, y1 as shares of the canvas.
        names: What the images are called.
        about: What the maps are.

    Returns:
        The largest error of a cosine similarity between cells of the two maps, measured on up to 2,048 of each.

    Raises:
        DataError: A shape is wrong, or a map is not finite.
    """
    for image, one in zip(images, maps, strict=True):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise DataError(f"images must be uint8 (H, W, 3), given: {image.dtype} {image.shape}")
        if one.ndim != 3 or len(one) != len(maps[0]) or not np.isfinite(one).all():
            raise DataError(f"maps must be finite (C, h, w) with the same C, given: {[each.shape for each in maps]}")
    blocks = [_averaged(one) for one in maps]
    shown = [_shrunk(image) for image in images]
    packed = pack([block for block, _ in blocks])
    sides = [
        {
            "name": name,
            "image": photo(small),
            "shown": [small.shape[1], small.shape[0]],
            "size": [image.shape[1], image.shape[0]],
            "cells": [block.shape[2], block.shape[1]],
            "inside": list(box),
            "values": _encoded(values),
            "gram": _encoded(gram(block)),
        }
        for name, image, small, (block, _), box, values in zip(
            names, images, shown, blocks, inside, packed.values, strict=True
        )
    ]
    data = {"sides": sides, "channels": packed.channels, "scales": packed.scales}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diffrep.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = count
    page = environment.get_template("matchpage.html.jinja").render(
        names=names,
        about=about,
        sizes=[f"{one.shape[2]}×{one.shape[1]}" for one in maps],
        averaged=max(factor for _, factor in blocks),
        channels=len(maps[0]),
        kept=packed.kept,
        error=packed.error,
        # "<" might end the script's element, or begin a comment.
        data=Markup(json.dumps(data).replace("<", "\\u003c")),
    )
    Path(file).write_text(page, encoding="utf-8")
    return packed.error


@dataclass(frozen=True)
class Packed:
    """Maps as small whole numbers: the value of a component is the sum of its planes, each times its scale.

    Attributes:
        values: (P, h * w) int8 of each map.
        channels: Component that each plane belongs to; leading ones have two, the second for what the first leaves.
        scales: Of each plane.
        kept: Number of components.
        error: Largest difference of a cosine similarity between cells of the two maps.
    """

    values: list[np.ndarray]
    channels: list[int]
    scales: list[float]
    kept: int
    error: float


def pack(maps: list[np.ndarray], room: int = BYTES) -> Packed:
    """Projects the cells of two maps (C, h, w), at unit length, on their leading common directions, and rounds them.

    The directions are those of the singular value decomposition of all cells together: no others keep more of them. As
    many are kept as `room` bytes hold, or until no cell loses more than 0.2 % of its energy.
    """
    units = [_units(one) for one in maps]
    both = np.concatenate(units, 1)
    components = _principal(both)
    most, left, kept = max(1, room // both.shape[1]), (both**2).sum(0), 0
    while kept < min(most, len(components)) and not (kept and left.max() <= RESIDUAL):
        left = left - components[kept] ** 2
        kept += 1
    wide = np.flatnonzero(np.abs(components[:kept]).max(1) > COARSE)[: most - kept].tolist()
    channels = sorted([*range(kept), *wide])
    planes, scales, rest = [], [], components[:kept].copy()
    for channel in channels:
        scale = float(np.abs(rest[channel]).max()) / 127 or 1.0
        planes.append(np.round(rest[channel] / scale).astype(np.int8))
        rest[channel] -= scale * planes[-1]
        scales.append(scale)
    values = np.split(np.stack(planes), [units[0].shape[1]], 1)
    return Packed(values, channels, scales, kept, _error(units, values, channels, scales))


def _units(one: np.ndarray) -> np.ndarray:
    """Returns (C, h * w) fp32 of unit length along C; cells of zeros stay."""
    cells = one.reshape(len(one), -1).astype(np.float32)
    lengths = np.linalg.norm(cells, axis=0)
    return cells / np.where(lengths > 0, lengths, 1)


def _principal(cells: np.ndarray) -> np.ndarray:
    """Returns the coordinates of cells (C, N) along their directions of most energy, (min(C, N), N), falling."""
    few = len(cells) <= cells.shape[1]
    products = (cells @ cells.T if few else cells.T @ cells).astype(np.float64)
    energies, vectors = np.linalg.eigh(products)
    if few:
        return vectors[:, ::-1].T.astype(np.float32) @ cells
    return (np.sqrt(energies.clip(0)) * vectors)[:, ::-1].T.astype(np.float32)


def _error(units: list[np.ndarray], values: list[np.ndarray], channels: list[int], scales: list[float]) -> float:
    """Returns the largest difference of a dot product between evenly spread cells of the two maps."""
    picked = [np.linspace(0, one.shape[1] - 1, min(one.shape[1], COMPARED)).astype(int) for one in units]
    exact = units[0][:, picked[0]].T @ units[1][:, picked[1]]
    read = []
    for planes, rows in zip(values, picked, strict=True):
        components = np.zeros((channels[-1] + 1, len(rows)), np.float32)
        np.add.at(components, channels, planes[:, rows] * np.array(scales, np.float32)[:, None])
        read.append(components)
    return float(np.abs(exact - read[0].T @ read[1]).max())


def gram(one: np.ndarray) -> np.ndarray:
    """Returns dot products of the cells of a map (C, h, w) with their neighbours, of which interpolated norms follow.

    Returns:
        (5, h, w) fp32: of a cell with itself, the one to the right, the one below, the one diagonally below, and of
        the one to the right with the one below. Beyond the edge stands the edge's own cell.
    """
    cells = one.astype(np.float32)
    padded = np.pad(cells, ((0, 0), (0, 1), (0, 1)), mode="edge")
    right, below, across = padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    pairs = ((cells, cells), (cells, right), (cells, below), (cells, across), (right, below))
    return np.stack([np.einsum("chw,chw->hw", a, b) for a, b in pairs])


def _averaged(one: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns a map of at most `CELLS` cells, and the side of the blocks it was averaged in."""
    _, height, width = one.shape
    factor = math.ceil(math.sqrt(height * width / CELLS))
    if factor <= 1:
        return one, 1
    for axis, size in ((1, height), (2, width)):
        starts = np.linspace(0, size, max(1, size // factor), endpoint=False).astype(int)
        counts = np.diff([*starts, size]).reshape([-1 if a == axis else 1 for a in range(3)])
        one = np.add.reduceat(one.astype(np.float32), starts, axis) / counts
    return one, factor


def _shrunk(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _encoded(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()
