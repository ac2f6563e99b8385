"""PF-PASCAL and PF-WILLOW (Ham et al., 2016 and 2018), with the lists of pairs that the field uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences.catalogue import Annotation, Catalogue
from diffrep.data.correspondences.files import box_around, box_of, points_of, read_table, split_named
from diffrep.data.correspondences.listing import Listing
from diffrep.data.pairs import Box, PairImage
from diffrep.errors import BackendUnavailable, DataError

PASCAL_FOLDER, WILLOW_FOLDER = "PF-dataset-PASCAL", "PF-dataset"
CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
# By the names of the lists in WeakAlign's and SCNet's releases, without .csv.
PASCAL_LISTS = {
    "train": ("trn_pairs", "train_pairs", "trn_pairs_pf_pascal", "train_pairs_pf_pascal"),
    "val": ("val_pairs", "val_pairs_pf_pascal"),
    "test": ("test_pairs", "test_pairs_pf_pascal"),
}
WILLOW_LISTS = ("test_pairs", "test_pairs_pf")
WILLOW_POINTS = 10
Marks = tuple[np.ndarray, Box]  # key points and box of an image


def pascal_home(root: Path) -> Path:
    """Returns the folder with JPEGImages/: the given one, or the unpacked archive in it."""
    return root if (root / "JPEGImages").is_dir() else root / PASCAL_FOLDER


def find_list(folders: tuple[Path, ...], names: tuple[str, ...]) -> Path | None:
    """Returns the first list of pairs of these names in these folders."""
    found = (folder / f"{name}.csv" for folder in folders for name in names)
    return next((file for file in found if file.is_file()), None)


def read_pf_pascal(root: Path, config: PairsConfig) -> Catalogue:
    """Reads a list of pairs of PF-PASCAL.

    Lists with the columns source_image, target_image, class, XA, YA, XB, YB (numbers separated by semicolons) hold the
    points; the lists for training have a column flip instead, and the points are in Annotations/<class>/*.mat. Rows
    with flip=1, which are other rows mirrored, are left out. Boxes come from the same files where they are there,
    else pairs have none.

    Raises:
        DataError: A list or an annotation cannot be read.
        BackendUnavailable: A .mat file must be read, and scipy is not installed.
        UnknownNameError: There is no such split.
    """
    home = pascal_home(root)
    lists = {name: find_list((root, home), names) for name, names in PASCAL_LISTS.items()}
    file = split_named(config.split, {name: found for name, found in lists.items() if found}, "PF-PASCAL")
    header, rows = read_table(file)
    listed = {"XA", "YA", "XB", "YB"} <= set(header)
    if not {"source_image", "target_image", "class"} <= set(header) or not (listed or "flip" in header):
        raise DataError(
            f"{file} has the columns {header}; a list of PF-PASCAL has source_image, target_image, class, and either "
            "XA, YA, XB, YB or flip"
        )
    listing, read_mat = Listing(), cache(_read_mat)
    for number, values in enumerate(rows, 2):
        row, where = dict(zip(header, values, strict=True)), f"{file}, row {number}"
        if row.get("flip", "0").strip() == "1":
            continue
        category = _class_of(row["class"], where)
        one, other = (Path(row[f"{side}_image"]) for side in ("source", "target"))
        ends = [listing.image(PairImage(image.name, home / "JPEGImages" / image.name)) for image in (one, other)]
        marks = [home / "Annotations" / category / f"{image.stem}.mat" for image in (one, other)]
        listing.add(*ends, category, _pascal_annotation(row, listed, marks, read_mat, where))
    return listing.catalogue("pf-pascal")


def _class_of(text: str, where: str) -> str:
    try:
        number = int(float(text))
    except ValueError:
        number = 0
    if not 1 <= number <= len(CLASSES):
        raise DataError(f"{where}: class {text!r}; PASCAL VOC's classes are 1 to {len(CLASSES)}")
    return CLASSES[number - 1]


def _pascal_annotation(
    row: dict[str, str], listed: bool, marks: list[Path], read_mat: Callable[[Path], Marks], where: str
) -> Annotation:
    boxes = [read_mat(file)[1] if file.is_file() else None for file in marks]
    if listed:
        points = [_semicolons(row, side, where) for side in "AB"]
        return Annotation(*points, *boxes)
    points = [read_mat(file)[0] for file in marks]
    if len(points[0]) != len(points[1]):
        raise DataError(f"{where}: {marks[0]} and {marks[1]} have {len(points[0])} and {len(points[1])} points")
    return Annotation(*points, *boxes, tuple(str(number) for number in range(len(points[0]))))


def _semicolons(row: dict[str, str], side: str, where: str) -> np.ndarray:
    try:
        x, y = ([float(value) for value in row[f"{axis}{side}"].split(";") if value.strip()] for axis in "XY")
        return points_of(list(zip(x, y, strict=True)), where)
    except ValueError as error:
        raise DataError(f"{where}: X{side} and Y{side} are not equally many numbers: {error}") from error


def _read_mat(file: Path) -> Marks:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        raise BackendUnavailable(
            "points of training pairs and boxes of PF-PASCAL are .mat files, which scipy reads: pip install scipy"
        ) from None
    try:
        content: dict[str, Any] = loadmat(file)
        return points_of(content["kps"], str(file)), box_of(np.ravel(content["bbox"]), str(file))
    except (OSError, ValueError, KeyError, MatReadError) as error:
        raise DataError(f"cannot read kps and bbox of {file}: {error}") from error


def read_pf_willow(root: Path, config: PairsConfig) -> Catalogue:
    """Reads the pairs of PF-WILLOW: two images, then ten x and ten y of the first and of the second.

    It has no boxes; the box of an image's ten points stands for it, as the field does.

    Raises:
        DataError: The list cannot be read.
    """
    home = root / WILLOW_FOLDER if (root / WILLOW_FOLDER).is_dir() else root
    file = find_list((root, home), WILLOW_LISTS)
    if file is None:
        raise DataError(f"no list of pairs in {root}; PF-WILLOW has {' or '.join(WILLOW_LISTS)}, as .csv")
    header, rows = read_table(file)
    if len(header) != 2 + 4 * WILLOW_POINTS:
        raise DataError(f"{file} has {len(header)} columns; a list of PF-WILLOW has {2 + 4 * WILLOW_POINTS}")
    listing = Listing()
    for number, row in enumerate(rows, 2):
        where = f"{file}, row {number}"
        names = [name.removeprefix(f"{WILLOW_FOLDER}/") for name in row[:2]]
        ends = [listing.image(PairImage(name, home / name)) for name in names]
        try:
            values = np.array(row[2:], dtype=np.float64).reshape(2, 2, WILLOW_POINTS)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        points = [side.T for side in values]
        boxes = [box_around(side) for side in points]
        keys = tuple(str(key) for key in range(WILLOW_POINTS))
        listing.add(*ends, names[0].split("/")[0], Annotation(*points, *boxes, keys))
    return listing.catalogue("pf-willow")
