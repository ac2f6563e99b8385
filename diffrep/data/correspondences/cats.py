"""Heads of the CAT set (Zhang, Sun and Tang, 2008): photos with nine clicked points each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences.catalogue import Catalogue
from diffrep.data.correspondences.files import box_around, read_lines
from diffrep.data.correspondences.listing import Shot, catalogue_of_shots
from diffrep.data.folder import files_below
from diffrep.data.pairs import PairImage
from diffrep.errors import DataError

KEYS = (
    "left_eye",
    "right_eye",
    "mouth",
    "left_ear_1",
    "left_ear_2",
    "left_ear_3",
    "right_ear_1",
    "right_ear_2",
    "right_ear_3",
)
# Sides are the picture's. Both ears are clicked from left to right: the left one from its outer foot over the tip to
# the inner foot, the right one from the inner foot.
MIRRORED = {
    "left_eye": "right_eye",
    "right_eye": "left_eye",
    **{
        f"{one}_ear_{i}": f"{other}_ear_{4 - i}"
        for one, other in (("left", "right"), ("right", "left"))
        for i in (1, 2, 3)
    },
}
CATEGORY = "cat"


def head_crop(points: np.ndarray, size: tuple[int, int], scale: float) -> tuple[int, int, int, int]:
    """Returns the square (x0, y0, x1, y1) around a head, in whole pixels, moved and cut until it is in the photo.

    Args:
        points: (9, 2) key points; some may lie outside the photo.
        size: (H, W) of the photo.
        scale: Side in longer sides of the points' box. The side is never longer than the photo's shorter side.
    """
    height, width = size
    low, high = points.min(axis=0), points.max(axis=0)
    side = min(max(1, round(float(scale * (high - low).max()))), height, width)
    corner = np.round((low + high) / 2 - side / 2)
    x, y = (int(value) for value in np.clip(corner, 0, (width - side, height - side)))
    return x, y, x + side, y + side


def read_cats(root: Path, config: PairsConfig) -> Catalogue:
    """Pairs all heads in both orders.

    Points outside a crop are dropped from its pairs, ears that the photo cuts off for example. The set has no boxes;
    the box of a head's points inside the crop stands for it.

    Raises:
        DataError: A file with points, or a photo, cannot be read.
    """
    shots = []
    for name in files_below(root, (".cat",)):
        points = _read_points(root / name)
        photo = PairImage(name.removesuffix(".cat"), root / name.removesuffix(".cat"))
        if not photo.file.is_file():
            raise DataError(f"{root / name} has no photo beside it, {photo.file.name!r}")
        crop = head_crop(points, photo.size(), config.crop_scale)
        # The crop is a part of the id, for the features of another crop are others.
        head = replace(photo, id=f"{photo.id}@{','.join(map(str, crop))}", crop=crop)
        inside = points - crop[:2]
        side = crop[2] - crop[0]
        hidden = ~((inside >= 0) & (inside < side)).all(axis=1)
        box = box_around(np.where(hidden[:, None], np.nan, inside))
        shots.append(Shot(head, inside, box, (side, side)))
    catalogue = catalogue_of_shots("cats", shots, [CATEGORY] * len(shots), KEYS)
    return replace(catalogue, mirrored={CATEGORY: MIRRORED})


def _read_points(file: Path) -> np.ndarray:
    try:
        count, *values = (int(word) for word in " ".join(read_lines(file)).split())
        points = np.array(values, dtype=np.float64).reshape(count, 2)
    except ValueError as error:
        raise DataError(f"{file}: expected '9 x0 y0 ... x8 y8': {error}") from error
    if count != len(KEYS):
        raise DataError(f"{file} has {count} points; a head has {len(KEYS)}")
    return points
