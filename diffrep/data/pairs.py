"""Pairs of images with key points that correspond."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffrep.data.frame import Canvas, Frame, frame_of
from diffrep.data.images import ImageSet, decode, size_of
from diffrep.errors import DataError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PairImage:
    """An image of a set of pairs.

    Attributes:
        id: Stable name, such as its relative POSIX path; with a crop the crop is part of it.
        file: Where it is.
        crop: (x0, y0, x1, y1) in whole pixels of the file that are used, x1 and y1 not included; None for all.
            Points and boxes are those of the crop.
    """

    id: str
    file: Path
    crop: tuple[int, int, int, int] | None = None

    def read(self) -> Image.Image:
        """Reads the image.

        Raises:
            DataError: It is missing or cannot be decoded.
        """
        try:
            return self.decode()
        except DataError as error:
            raise DataError(f"{self.id}: {error}") from error

    def decode(self) -> Image.Image:
        """Reads the image; errors do not name it, for callers that do."""
        image = decode(self.file)
        return image if self.crop is None else image.crop(self.crop)

    def size(self) -> tuple[int, int]:
        """Returns (H, W) of the crop or, from the file's header, of the whole image.

        Raises:
            DataError: The file is missing, no image, or too large to be decoded.
        """
        if self.crop is not None:
            return self.crop[3] - self.crop[1], self.crop[2] - self.crop[0]
        try:
            return size_of(self.file)
        except DataError as error:
            raise DataError(f"{self.id}: {error}") from error


@dataclass(frozen=True)
class Pair:
    """Points of a source image and the points of a target image that they correspond to.

    All are visible in both images. Coordinates are as annotated: (x, y) in pixels of the image (of its crop), without
    a half-pixel shift.

    Attributes:
        source: Position of the source in `PairSet.images`.
        target: Position of the target.
        source_points: (K, 2) float64.
        target_points: (K, 2) float64, in the same order.
        source_box: (x0, y0, x1, y1) of the object, or None where the set has no boxes.
        target_box: Likewise.
        category: Class of the objects; "" where the set has none.
        keys: Name or number of each key point, K of them, such as SPair's ids; () where points have none.
        about: Other annotations, plain JSON.
    """

    source: int
    target: int
    source_points: np.ndarray
    target_points: np.ndarray
    source_box: Box | None = None
    target_box: Box | None = None
    category: str = ""
    keys: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSet:
    """A set of pairs.

    Attributes:
        name: What it is, "spair".
        images: Each image once.
        pairs: The pairs.
        mirrored: For each category the key that each key becomes when an image is mirrored, {"cat": {"0": "1",
            "1": "0"}}; a key that is missing stays. Categories that are missing have no known symmetry.
        dropped: What the reader left out: "points" that are visible and lie outside their image, and "pairs" that were
            left without points.
    """

    name: str
    images: list[PairImage]
    pairs: list[Pair]
    mirrored: dict[str, dict[str, str]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if not self.pairs:
            raise DataError(f"{self.name}: there are no pairs")
        for number, pair in enumerate(self.pairs):
            where = f"{self.name}: pair {number} ({self.images[pair.source].id} -> {self.images[pair.target].id})"
            for points in (pair.source_points, pair.target_points):
                if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
                    raise DataError(f"{where} has points of shape {points.shape}; finite (K, 2) are needed")
            if len(pair.source_points) != len(pair.target_points):
                raise DataError(
                    f"{where} has {len(pair.source_points)} source points and {len(pair.target_points)} target points"
                )
            if pair.keys and len(pair.keys) != len(pair.source_points):
                raise DataError(f"{where} has {len(pair.source_points)} points and {len(pair.keys)} keys")
            for box in (pair.source_box, pair.target_box):
                if box is not None and not (box[2] > box[0] and box[3] > box[1]):
                    raise DataError(f"{where} has a box without area, {tuple(box)}; it must be x0, y0, x1, y1")

    def fingerprint(self) -> str:
        """Returns a digest of files, their sizes, crops and pairs."""
        parts: list[object] = [(one.id, one.file.stat().st_size, one.crop) for one in self.images]
        for pair in self.pairs:
            points = (pair.source_points.tolist(), pair.target_points.tolist())
            parts.append((pair.source, pair.target, points, pair.source_box, pair.target_box, pair.category))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class PairReader:
    """The images of a set of pairs, each once, as a `diffrep.data.images.Reader`."""

    def __init__(self, images: list[PairImage]):
        self.images, self.ids, self.labels = images, [image.id for image in images], None

    def image(self, index: int) -> Image.Image:
        """Reads one image, cropped."""
        return self.images[index].decode()

    def fingerprint(self) -> list[object]:
        """Returns (id, bytes, crop) of every image."""
        return [(image.id, image.file.stat().st_size, image.crop) for image in self.images]


def pair_images(pair_set: PairSet, channels: int, size: int, fit: str = "resize") -> ImageSet:
    """Returns the images of a set of pairs for an extraction, so that each is read once however many its pairs are.

    Args:
        pair_set: The pairs.
        channels: Channels of the backbone's images, 1 or 3.
        size: Side of the square canvas they are put on.
        fit: "resize" or "pad"; see `diffrep.data.frame.frame_of`.

    Raises:
        ConfigError: There is no such fit.
    """
    return ImageSet({"all": PairReader(pair_set.images)}, Canvas(channels, size, fit))


def frames(pair_set: PairSet, size: int, fit: str = "resize") -> list[Frame]:
    """Returns where each image of `pair_images` lies on its canvas, in the order of `pair_set.images`.

    Raises:
        ConfigError: There is no such fit.
        DataError: The size of an image cannot be read.
    """
    return [frame_of(image.size(), (size, size), fit) for image in pair_set.images]
