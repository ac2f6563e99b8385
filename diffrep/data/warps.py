"""Geometric matching with exact ground truth: seeded affine and thin-plate warps of any image.

Points are (x, y) in pixel indices: the centre of the first pixel is (0, 0), as integer annotations have it. A warp
keeps the image's size; what comes from outside is black.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffrep.data.images import ImageSet
from diffrep.errors import ConfigError, DataError, UnknownNameError

KINDS = ("affine", "tps")
SMALLEST = 8
EXACT = 1e-6
# The inverse is searched on the canvas and this share of its sides around it.
MARGIN = 0.25
LEAST_STRETCH = 0.2
CHUNK = 65_536  # points at a time


@dataclass(frozen=True)
class Ranges:
    """How far random warps go.

    Attributes:
        rotation: Most degrees, either way.
        scale: Least and most magnification; drawn evenly on a logarithmic scale.
        shear: Most degrees, either way.
        shift: Most shift along each axis, as a share of the side.
        bend: Most shift of a thin plate's knots along each axis, as a share of the side.
        knots: Knots along each side of a thin plate.

    Raises:
        ConfigError: A range is empty or cannot be.
    """

    rotation: float = 30.0
    scale: tuple[float, float] = (0.8, 1.25)
    shear: float = 10.0
    shift: float = 0.1
    bend: float = 0.08
    knots: int = 4

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale is the least and the most magnification, both above 0; given: {self.scale}")
        if min(self.rotation, self.shear, self.shift, self.bend) < 0 or self.shear >= 90 or self.knots < 2:
            raise ConfigError(
                f"ranges are not negative, shear is below 90 degrees, and knots are 2 or more; given: {self}"
            )


USUAL = Ranges()


class Warp(ABC):
    """A one-to-one map of the plane that takes a source image to a target image of the same size.

    Attributes:
        size: (H, W) of both.
    """

    size: tuple[int, int]

    @abstractmethod
    def points(self, xy: np.ndarray) -> np.ndarray:
        """Takes points (..., 2) of the source to the target, exact to 1e-6 pixels."""

    @abstractmethod
    def sources(self, xy: np.ndarray) -> np.ndarray:
        """Takes points (..., 2) of the target to the source."""

    def image(self, image: torch.Tensor) -> torch.Tensor:
        """Warps an image.

        Args:
            image: Source (C, H, W).

        Returns:
            Target (C, H, W), sampled bilinearly where `sources` says; 0 outside.

        Raises:
            ConfigError: The image has another size than the warp.
        """
        if tuple(image.shape[-2:]) != self.size:
            raise ConfigError(f"the warp is of {self.size} pixels, and the image has {tuple(image.shape[-2:])}")
        height, width = self.size
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        pixels = np.stack([x, y], axis=-1).astype(np.float64)
        # A plate holds a distance to each knot for every point at once.
        places = np.concatenate([self.sources(band) for band in np.array_split(pixels, 1 + x.size // CHUNK)])
        grid = torch.from_numpy((places + 0.5) * 2 / (width, height) - 1).to(image)
        return torch.nn.functional.grid_sample(image[None], grid[None], align_corners=False)[0]


@dataclass(frozen=True, eq=False)
class AffineWarp(Warp):
    """target = matrix @ source + offset.

    Attributes:
        size: (H, W).
        matrix: (2, 2).
        offset: (2,).
    """

    size: tuple[int, int]
    matrix: np.ndarray
    offset: np.ndarray

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Takes points of the source to the target."""
        return np.asarray(xy, dtype=np.float64) @ self.matrix.T + self.offset

    def sources(self, xy: np.ndarray) -> np.ndarray:
        """Takes points of the target to the source."""
        return (np.asarray(xy, dtype=np.float64) - self.offset) @ np.linalg.inv(self.matrix).T


class ThinPlateWarp(Warp):
    """A thin-plate spline from the target to the source (Bookstein, 1989), which passes through its knots exactly.

    The spline runs in the direction that rendering needs; Newton steps take points of the source to the target.

    Args:
        size: (H, W).
        knots: (N, 2) positions in the target.
        shifts: (N, 2) from each knot to the place in the source that it shows.

    Raises:
        DataError: The knots lie on a line or coincide, or the map folds over on the canvas or a quarter of a side
            around it.
    """

    def __init__(self, size: tuple[int, int], knots: np.ndarray, shifts: np.ndarray):
        self.size, self.unit = size, float(max(size))
        self.knots = knots / self.unit
        count = len(knots)
        system = np.zeros((count + 3, count + 3))
        system[:count, :count] = _kernel(((self.knots[:, None] - self.knots) ** 2).sum(-1))
        system[:count, count] = 1
        system[:count, count + 1 :] = self.knots
        system[count:, :count] = system[:count, count:].T
        values = np.concatenate([(knots + shifts) / self.unit, np.zeros((3, 2))])
        if np.linalg.matrix_rank(system) < count + 3:
            raise DataError("the knots of a thin-plate warp lie on a line, or two are in one place")
        solved = np.linalg.solve(system, values)
        self.weights, self.constant, self.linear = solved[:count], solved[count], solved[count + 1 :]
        if self.least_stretch() <= 0:
            raise DataError("the thin-plate warp folds over; use smaller shifts")

    def sources(self, xy: np.ndarray) -> np.ndarray:
        """Takes points of the target to the source."""
        places = np.asarray(xy, dtype=np.float64) / self.unit
        squares = ((places[..., None, :] - self.knots) ** 2).sum(-1)
        return (_kernel(squares) @ self.weights + self.constant + places @ self.linear) * self.unit

    def slopes(self, xy: np.ndarray) -> np.ndarray:
        """Returns the derivative of `sources` at points (..., 2): (..., 2, 2), source axis first."""
        differences = np.asarray(xy, dtype=np.float64)[..., None, :] / self.unit - self.knots
        squares = (differences**2).sum(-1)
        # Of r^2 log r^2: 2 d (log r^2 + 1), which goes to 0 at the knot itself.
        factor = 2 * (np.log(np.where(squares > 0, squares, 1)) + 1) * (squares > 0)
        return np.einsum("...n,...nj,ni->...ij", factor, differences, self.weights) + self.linear.T

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Takes points of the source to the target.

        Raises:
            DataError: A point has no place near the canvas.
        """
        wanted = np.asarray(xy, dtype=np.float64)
        flat = wanted.reshape(-1, 2)
        nodes = self._lattice()
        images = self.sources(nodes)
        squares = (images**2).sum(1)
        bands = np.array_split(flat, 1 + 16 * len(flat) // CHUNK)
        found = nodes[np.concatenate([(squares - 2 * band @ images.T).argmin(1) for band in bands])]
        for _ in range(30):
            errors = self.sources(found) - flat
            # In the source; in the target it is this, divided by the least stretch.
            if np.abs(errors).max(initial=0) < EXACT / 1000:
                return found.reshape(wanted.shape)
            found = found - np.linalg.solve(self.slopes(found), errors[..., None])[..., 0]
        raise DataError("the thin-plate warp has no place near its canvas for some of the points")

    def least_stretch(self) -> float:
        """Returns the least change of area, on the canvas and a quarter of a side around it; it folds over below 0."""
        return float(np.linalg.det(self.slopes(self._lattice())).min())

    def _lattice(self) -> np.ndarray:
        steps = np.linspace(-MARGIN, 1 + MARGIN, 41)
        x, y = np.meshgrid(steps * (self.size[1] - 1), steps * (self.size[0] - 1))
        return np.stack([x.ravel(), y.ravel()], axis=1)


def random_warp(size: tuple[int, int], kind: str, rng: np.random.Generator, ranges: Ranges = USUAL) -> Warp:
    """Draws a warp.

    A thin plate that folds, or squeezes an area below a fifth, is flattened step by step until it does not.

    Args:
        size: (H, W) of the image.
        kind: "affine" or "tps".
        rng: Where it is drawn from.
        ranges: How far it goes.

    Raises:
        UnknownNameError: There is no such kind.
        ConfigError: The image has fewer than 8 pixels along a side.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of warp", kind, KINDS)
    if min(size) < SMALLEST:
        raise ConfigError(f"an image of {size} pixels is too small to warp; each side needs {SMALLEST}")
    return _random_affine(size, rng, ranges) if kind == "affine" else _random_plate(size, rng, ranges)


def _random_affine(size: tuple[int, int], rng: np.random.Generator, ranges: Ranges) -> AffineWarp:
    sides = np.array(size[::-1], dtype=np.float64)
    turn = math.radians(rng.uniform(-ranges.rotation, ranges.rotation))
    slant = math.tan(math.radians(rng.uniform(-ranges.shear, ranges.shear)))
    scale = math.exp(rng.uniform(*np.log(ranges.scale)))
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = scale * rotation @ np.array([[1, slant], [0, 1]])
    centre = (sides - 1) / 2
    return AffineWarp(size, matrix, centre + rng.uniform(-ranges.shift, ranges.shift, 2) * sides - matrix @ centre)


def _random_plate(size: tuple[int, int], rng: np.random.Generator, ranges: Ranges) -> ThinPlateWarp:
    sides = np.array(size[::-1], dtype=np.float64)
    steps = np.linspace(0, 1, ranges.knots)
    x, y = np.meshgrid(steps * (sides[0] - 1), steps * (sides[1] - 1))
    knots = np.stack([x.ravel(), y.ravel()], axis=1)
    shifts = rng.uniform(-ranges.bend, ranges.bend, knots.shape) * sides
    while True:
        try:
            warp = ThinPlateWarp(size, knots, shifts)
        except DataError:
            pass
        else:
            if warp.least_stretch() >= LEAST_STRETCH:
                return warp
        shifts = shifts * 0.8


@dataclass(frozen=True, eq=False)
class WarpedPair:
    """An image, a warp of it, and points of both that correspond exactly.

    Attributes:
        id: Of the image.
        source: (C, H, W).
        target: (C, H, W).
        source_points: (K, 2) float64 (x, y) in pixel indices, whole numbers.
        target_points: (K, 2) float64.
        warp: From source to target.
    """

    id: str
    source: torch.Tensor
    target: torch.Tensor
    source_points: np.ndarray
    target_points: np.ndarray
    warp: Warp


def warped_pairs(
    images: ImageSet | Sequence[torch.Tensor],
    seed: int = 0,
    kind: str = "affine",
    points: int = 8,
    ranges: Ranges = USUAL,
) -> Iterator[WarpedPair]:
    """Pairs each image with a warp of itself.

    The warp is a function of seed, kind and the image's id (its position, in a list of tensors), so it does not depend
    on which other images there are.

    Args:
        images: Images (C, H, W) of any sizes.
        seed: Seeds the warps.
        kind: "affine" or "tps".
        points: Points along each side of a regular grid of pixels; those that leave the target are left out.
        ranges: How far the warps go.

    Yields:
        A pair for each image.

    Raises:
        UnknownNameError: There is no such kind.
        ConfigError: An image is too small, or `points` is not positive.
        DataError: No point of an image stays inside.
    """
    if points < 1:
        raise ConfigError(f"points={points}; at least one along each side is needed")
    for number in range(len(images)):
        image = images[number]
        name = images.id(number) if isinstance(images, ImageSet) else str(number)
        height, width = image.shape[-2:]
        digest = hashlib.blake2b(f"warp\x1f{seed}\x1f{kind}\x1f{name}".encode(), digest_size=8).digest()
        warp = random_warp((height, width), kind, np.random.default_rng(int.from_bytes(digest, "little")), ranges)
        x, y = np.meshgrid(_pixels(width, points), _pixels(height, points))
        grid = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float64)
        there = warp.points(grid)
        inside = ((there >= 0) & (there <= (width - 1, height - 1))).all(axis=1)
        if not inside.any():
            raise DataError(f"{name}: the warp takes all points out of the image; use smaller ranges or more points")
        yield WarpedPair(name, image, warp.image(image), grid[inside], there[inside], warp)


def _pixels(side: int, count: int) -> np.ndarray:
    """Returns about evenly spaced pixels of a side, each once."""
    return np.unique(np.floor((np.arange(count) + 0.5) * side / count).astype(np.int64))


def _kernel(squares: np.ndarray) -> np.ndarray:
    """Returns r^2 log r^2 of squared distances."""
    return squares * np.log(np.where(squares > 0, squares, 1))
