"""Pictures of image pairs: matches as lines, maps as colours in one basis, and the page to click through."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from diffrep.data import Transform
from diffrep.data.frame import Frame
from diffrep.errors import DataError
from diffrep.report.matchpage import write_match_page
from diffrep.report.pca import pca_rgb

RIGHT, WRONG, RING = (60, 214, 108), (255, 76, 60), (255, 255, 255)
SHADE = (0, 0, 0, 150)
GAP = 0.02  # between two images, as a share of their height
FINE = 4  # lines are drawn so many times larger and brought down, which smooths them

Colour = tuple[int, ...]
Spot = tuple[float, float]


def draw_matches(
    source: Image.Image,
    target: Image.Image,
    source_points: np.ndarray,
    target_points: np.ndarray,
    correct: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    height: int = 256,
) -> np.ndarray:
    """Draws two images side by side, with a line from each point of the source to its match in the target.

    Points are (x, y) in pixels of their image; those outside it are drawn at its edge.

    Args:
        source: Image of any mode, grey, RGB or RGBA; alpha is dropped.
        target: Likewise.
        source_points: (K, 2).
        target_points: (K, 2), where each was found.
        correct: (K,) of bool: matches that are right are green and end in a disc, wrong ones are red and end in a
            cross. None gives each match a hue of its own.
        truth: (K, 2), where each should have been found: a ring where the match is not right.
        height: Of the picture; each image is scaled to it.

    Returns:
        (height, W, 3) uint8.

    Raises:
        DataError: The numbers of points differ, or an image has no known range.
    """
    count = len(source_points)
    for name, points in (("source", source_points), ("target", target_points), ("true", truth)):
        if points is not None and (np.shape(points) != (count, 2) or not np.isfinite(points).all()):
            raise DataError(f"the {name} points are {np.shape(points)}; finite ({count}, 2) were expected")
    if correct is not None and np.shape(correct) != (count,):
        raise DataError(f"{np.shape(correct)} says which matches are right; ({count},) was expected")
    left, right = _scaled(source, height), _scaled(target, height)
    start = left.width + _gap(height)
    starts = _placed(source_points, source, left, 0)
    ends = _placed(target_points, target, right, start)
    missed = {} if truth is None else dict(enumerate(_placed(truth, target, right, start)))
    layer = Image.new("RGBA", (FINE * (start + right.width), FINE * height))
    pen = _Pen(ImageDraw.Draw(layer), height)
    fine = np.ones(count, dtype=bool) if correct is None else np.asarray(correct, dtype=bool)
    # Wrong matches last, so that they lie above the others.
    for k in sorted(range(count), key=lambda k: not fine[k]):
        hue = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(k / max(count, 1), 0.7, 1.0))
        colour = hue if correct is None else RIGHT if fine[k] else WRONG
        pen.line(starts[k], ends[k], colour)
        if not fine[k] and k in missed:
            pen.line(ends[k], missed[k], RING, 0.5)
            pen.disc(missed[k], RING, hollow=True)
        pen.disc(starts[k], colour)
        (pen.disc if fine[k] else pen.cross)(ends[k], colour)
    picture = _side_by_side(left, right, height).convert("RGBA")
    return np.asarray(Image.alpha_composite(picture, layer.reduce(FINE)).convert("RGB"))


def draw_co_pca(maps: tuple[torch.Tensor, torch.Tensor], frames: tuple[Frame, Frame], height: int = 256) -> np.ndarray:
    """Draws the maps of two images as colours in one basis, so that equal colours mean alike features.

    Cells are brought to unit length first: matching compares directions. The picture has the size of `draw_matches`
    and lies below it.

    Args:
        maps: (C, h, w) of each image.
        frames: Where each image lies on the canvas of its map.
        height: Of the picture.

    Returns:
        (height, W, 3) uint8.

    Raises:
        DataError: The maps differ in their number of channels.
    """
    colours = pca_rgb([F.normalize(one.float(), dim=0).cpu().numpy() for one in maps])
    panels = []
    for cells, frame in zip(colours, frames, strict=True):
        high, wide = cells.shape[:2]
        x0, y0, x1, y1 = inside(frame)
        size = (max(1, round(height * frame.original[1] / frame.original[0])), height)
        box = (x0 * wide, y0 * high, x1 * wide, y1 * high)
        panels.append(Image.fromarray(cells).resize(size, Image.Resampling.NEAREST, box=box))
    return np.asarray(_side_by_side(*panels, height))


def draw_grid(pictures: Sequence[np.ndarray], columns: int = 2, gap: int = 12, background: int = 255) -> np.ndarray:
    """Puts pictures (H, W, 3) of any sizes into rows, each in the middle of its cell; returns (H, W, 3) uint8.

    Raises:
        DataError: There are none.
    """
    if not pictures:
        raise DataError("a grid needs at least one picture")
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    widths = [max(picture.shape[1] for picture in pictures[column::columns]) for column in range(len(rows[0]))]
    size = (sum(heights) + gap * (len(heights) - 1), sum(widths) + gap * (len(widths) - 1), 3)
    grid = np.full(size, background, dtype=np.uint8)
    for row, pictured in enumerate(rows):
        for column, picture in enumerate(pictured):
            high, wide = picture.shape[:2]
            top = sum(heights[:row]) + gap * row + (heights[row] - high) // 2
            left = sum(widths[:column]) + gap * column + (widths[column] - wide) // 2
            grid[top : top + high, left : left + wide] = picture
    return grid


def draw_match_page(
    file: str | Path,
    images: tuple[Image.Image, Image.Image],
    maps: tuple[torch.Tensor, torch.Tensor],
    frames: tuple[Frame, Frame],
    names: tuple[str, str] = ("A", "B"),
    about: str = "",
) -> float:
    """Writes a page on which a point of one image shows the similarity over the other; see `write_match_page`.

    Args:
        file: The `.html` to write.
        images: Of any mode and size.
        maps: (C, h, w) of each image.
        frames: Where each image lies on the canvas of its map.
        names: What the images are called.
        about: What the maps are, such as the layer and the level.

    Returns:
        The largest error of a cosine similarity in the page.
    """
    pixels = tuple(np.asarray(_rgb(image)) for image in images)
    numbers = tuple(one.float().cpu().numpy() for one in maps)
    return write_match_page(file, pixels, numbers, tuple(inside(frame) for frame in frames), names, about)


def inside(frame: Frame) -> tuple[float, float, float, float]:
    """Returns where an image lies on its canvas: x0, y0, x1, y1 as shares of the canvas."""
    tall, wide = frame.canvas
    corners = (frame.to_canvas(np.array([(0, 0), frame.original[::-1]])) / (wide, tall)).clip(0, 1)
    return tuple(corners.ravel().tolist())


class _Pen:
    """Draws in pixels of the picture on a layer that is `FINE` times larger, each mark above a dark rim."""

    def __init__(self, draw: ImageDraw.ImageDraw, height: int):
        self.draw, self.width, self.radius = draw, max(1.2, height / 170), max(2.5, height / 64)

    def line(self, start: Spot, end: Spot, colour: Colour, share: float = 1.0) -> None:
        ends = [FINE * value for value in (*start, *end)]
        for width, paint in ((share * self.width + 1.2, SHADE), (share * self.width, colour)):
            self.draw.line(ends, fill=paint, width=round(FINE * width))

    def disc(self, spot: Spot, colour: Colour, hollow: bool = False) -> None:
        thick = 0.4 * self.radius
        self._circle(spot, self.radius + 1, SHADE, thick + 1 if hollow else None)
        self._circle(spot, self.radius, colour, thick if hollow else None)

    def cross(self, spot: Spot, colour: Colour) -> None:
        (x, y), arm = spot, 1.1 * self.radius
        for width, paint in ((2 * self.width + 1.5, SHADE), (2 * self.width, colour)):
            for side in (-1, 1):
                ends = (x - arm, y - side * arm, x + arm, y + side * arm)
                self.draw.line([FINE * value for value in ends], fill=paint, width=round(FINE * width))

    def _circle(self, spot: Spot, radius: float, colour: Colour, width: float | None) -> None:
        box = [FINE * (value + side * radius) for side in (-1, 1) for value in spot]
        if width is None:
            self.draw.ellipse(box, fill=colour)
        else:
            self.draw.ellipse(box, outline=colour, width=round(FINE * width))


def _rgb(image: Image.Image) -> Image.Image:
    pixels = (Transform(3)(image) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _scaled(image: Image.Image, height: int) -> Image.Image:
    width = max(1, round(height * image.width / image.height))
    return _rgb(image).resize((width, height), Image.Resampling.LANCZOS)


def _gap(height: int) -> int:
    return max(2, round(GAP * height))


def _side_by_side(left: Image.Image, right: Image.Image, height: int) -> Image.Image:
    start = left.width + _gap(height)
    picture = Image.new("RGB", (start + right.width, height), (128, 128, 128))
    picture.paste(left, (0, 0))
    picture.paste(right, (start, 0))
    return picture


def _placed(points: np.ndarray, image: Image.Image, scaled: Image.Image, start: int) -> list[Spot]:
    """Returns where the centres of pixels lie in the picture."""
    share = (np.asarray(points, dtype=np.float64) + 0.5) / image.size
    spots = share.clip(0, 1) * scaled.size + (start, 0)
    return [(float(x), float(y)) for x, y in spots]
