"""HPatches full sequences (Balntas et al., 2017): a reference image and five others with their homographies."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences.catalogue import Annotation, Catalogue
from diffrep.data.correspondences.listing import Listing
from diffrep.data.pairs import PairImage
from diffrep.errors import DataError

CATEGORIES = {"v": "viewpoint", "i": "illumination"}
OTHERS = range(2, 7)
SUFFIXES = (".ppm", ".png", ".jpg")


def sequences(root: Path) -> list[Path]:
    """Returns the folders v_NAME and i_NAME with homographies."""
    return sorted(folder for folder in root.glob("[vi]_*") if (folder / "H_1_2").is_file())


def read_hpatches(root: Path, config: PairsConfig) -> Catalogue:
    """Pairs the first image of each sequence with the five others.

    Points are the centres of `config.grid` x `config.grid` equal cells of the first image, in pixel indices, and where
    the homography takes them; those that leave the other image are dropped. The homography is in `about`.

    Raises:
        DataError: A homography or an image's size cannot be read.
    """
    listing = Listing()
    for folder in sequences(root):
        first = _image(folder, 1)
        height, width = first.size()
        source = listing.image(first, (height, width))
        x, y = np.meshgrid(_centres(width, config.grid), _centres(height, config.grid))
        points = np.stack([x.ravel(), y.ravel()], axis=1)
        for number in OTHERS:
            matrix = _homography(folder / f"H_1_{number}")
            annotation = Annotation(points, project(matrix, points), about={"homography": matrix.tolist()})
            listing.add(source, listing.image(_image(folder, number)), CATEGORIES[folder.name[0]], annotation)
    return listing.catalogue("hpatches")


def project(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Applies a homography.

    Args:
        matrix: (3, 3).
        points: (K, 2) pixel indices.

    Returns:
        (K, 2); NaN for a point that comes to lie behind the camera.
    """
    x, y, depth = matrix @ np.concatenate([points, np.ones((len(points), 1))], axis=1).T
    return np.stack([x, y], axis=1) / np.where(depth > 0, depth, np.nan)[:, None]


def _centres(side: int, count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) * side / count - 0.5


def _image(folder: Path, number: int) -> PairImage:
    files = [folder / f"{number}{suffix}" for suffix in SUFFIXES]
    file = next((file for file in files if file.is_file()), files[0])
    return PairImage(f"{folder.name}/{file.name}", file)


def _homography(file: Path) -> np.ndarray:
    try:
        return np.loadtxt(file).reshape(3, 3)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the homography {file}: {error}") from error
