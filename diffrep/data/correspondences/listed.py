"""A plain JSON of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences.catalogue import Annotation, Catalogue
from diffrep.data.correspondences.files import box_of, points_of, read_json
from diffrep.data.correspondences.listing import Listing
from diffrep.data.pairs import PairImage
from diffrep.errors import DataError

FILE = "pairs.json"
IMAGE_FOLDERS = (".", "images")
NEEDED = ("source_path", "target_path", "source_points", "target_points")
USED = (*NEEDED, "source_bounding_box", "target_bounding_box", "category", "keys")


def read_listed(path: Path, config: PairsConfig) -> Catalogue:
    """Reads `path`, or pairs.json in it.

    It is a list of pairs, or a dict with that list as "pairs" and optionally "name" and "mirrored" (as in `PairSet`).
    A pair has source_path and target_path, relative to the file or to images/ beside it, source_points and
    target_points ([x, y], or null for one that is not visible), and optionally category, keys (names of the points)
    and source_bounding_box, target_bounding_box (x0, y0, x1, y1). Its other entries come back in `about`.

    Raises:
        DataError: The file cannot be read, or a pair is malformed.
    """
    file = path / FILE if path.is_dir() else path
    content = read_json(file)
    whole: dict[str, Any] = content if isinstance(content, dict) else {"pairs": content}
    pairs = whole.get("pairs")
    if not isinstance(pairs, list) or not all(isinstance(one, dict) for one in pairs):
        raise DataError(f"{file} is not a list of pairs, nor a dict with such a list as 'pairs'")
    listing = Listing()
    for number, one in enumerate(pairs):
        where = f"{file}, pair {number}"
        missing = [name for name in NEEDED if name not in one]
        if missing:
            raise DataError(f"{where} lacks {', '.join(missing)}; it has {', '.join(one)}")
        ends = [listing.image(_find(file.parent, str(one[f"{side}_path"]))) for side in ("source", "target")]
        listing.add(*ends, str(one.get("category", "")), _annotation(one, where))
    name = file.resolve().parent.name if file.name == FILE else file.stem
    return listing.catalogue(str(whole.get("name", name)), _mirrored(whole, file))


def _find(folder: Path, name: str) -> PairImage:
    files = [folder / place / name for place in IMAGE_FOLDERS]
    return PairImage(name, next((file for file in files if file.is_file()), files[0]))


def _annotation(one: dict[str, Any], where: str) -> Annotation:
    points = [points_of(one[f"{side}_points"], where) for side in ("source", "target")]
    boxes = [one.get(f"{side}_bounding_box") for side in ("source", "target")]
    return Annotation(
        *points,
        *(None if box is None else box_of(box, where) for box in boxes),
        tuple(str(key) for key in one.get("keys", ())),
        {name: value for name, value in one.items() if name not in USED},
    )


def _mirrored(whole: dict[str, Any], file: Path) -> dict[str, dict[str, str]]:
    given = whole.get("mirrored", {})
    try:
        return {str(name): {str(key): str(other) for key, other in keys.items()} for name, keys in given.items()}
    except AttributeError as error:
        raise DataError(f"{file}: 'mirrored' has keys and their partners for each category, given: {given}") from error
