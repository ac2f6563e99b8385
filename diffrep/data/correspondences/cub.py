"""CUB-200-2011 (Wah et al., 2011): pairs of birds of one species."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences.catalogue import Catalogue
from diffrep.data.correspondences.files import box_of_extent, read_lines, read_numbered, split_named
from diffrep.data.correspondences.listing import Shot, catalogue_of_shots
from diffrep.data.pairs import Box, PairImage
from diffrep.errors import DataError

# Values of train_test_split.txt, where 1 is a training image.
SPLITS = {"train": ("1",), "test": ("0",), "all": ("0", "1")}


def read_cub(root: Path, config: PairsConfig) -> Catalogue:
    """Pairs all images of a species in both orders, with the parts that are visible in both.

    Keys are the names of parts/parts.txt, "left eye" and "right eye" among them; categories are the folders, such as
    "001.Black_footed_Albatross".

    Raises:
        DataError: A file cannot be read, or files do not agree.
        UnknownNameError: There is no such split.
    """
    values = split_named(config.split, SPLITS, "CUB-200-2011")
    names = read_numbered(root / "images.txt")
    split = read_numbered(root / "train_test_split.txt")
    boxes = _read_boxes(root / "bounding_boxes.txt")
    parts = read_numbered(root / "parts" / "parts.txt")
    keys = [parts[number] for number in sorted(parts)]
    points = _read_parts(root / "parts" / "part_locs.txt", {number: i for i, number in enumerate(sorted(parts))})
    shots = []
    for number, name in names.items():
        if number not in split or number not in boxes or number not in points:
            raise DataError(f"{root}: image {number} ({name}) lacks its split, its box or its parts")
        if split[number] in values:
            shots.append(Shot(PairImage(name, root / "images" / name), points[number], boxes[number]))
    return catalogue_of_shots("cub", shots, [shot.image.id.split("/")[0] for shot in shots], tuple(keys))


def _read_boxes(file: Path) -> dict[int, Box]:
    lines = read_numbered(file).items()
    return {number: box_of_extent(text.split(), f"{file}, image {number}") for number, text in lines}


def _read_parts(file: Path, rows: dict[int, int]) -> dict[int, np.ndarray]:
    points: dict[int, np.ndarray] = {}
    for line in read_lines(file):
        try:
            image, part, x, y, visible = line.split()
            place = points.setdefault(int(image), np.full((len(rows), 2), np.nan))
            if visible == "1":
                place[rows[int(part)]] = float(x), float(y)
        except (ValueError, KeyError) as error:
            raise DataError(f"{file}: {line!r} is not image, part, x, y, visible") from error
    return points
