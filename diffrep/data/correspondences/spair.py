"""SPair-71k (Min et al., 2019): PairAnnotation/<split>/*.json and JPEGImages/<class>/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences.catalogue import Annotation, Catalogue
from diffrep.data.correspondences.files import box_of, points_of, read_json, split_named
from diffrep.data.correspondences.listing import Listing
from diffrep.data.pairs import PairImage
from diffrep.errors import DataError

ABOUT = ("viewpoint_variation", "scale_variation", "truncation", "occlusion", "mirror", "src_pose", "trg_pose")
USERS_NAMES = {"trn": "train"}
# Key points that change places when an image is mirrored, by the ids of the annotation files; as in GeoAware-SC's
# `utils_geoware.py` (SPAIR_FLIP_TRN), whose second table of left and right points agrees.
_HEAD = ((0, 1), (2, 3), (4, 5))
_PAWS = ((9, 10), (11, 12))
_WHEELS = ((10, 20), (11, 21), (12, 22), (13, 23), (14, 24), (15, 25), (16, 17), (18, 19), (26, 27), (28, 29))
_GRAZING = (*_HEAD, (6, 7), *_PAWS, (15, 16), (17, 18), (19, 20))
SWAPS: dict[str, tuple[tuple[int, int], ...]] = {
    "aeroplane": tuple((left, left + 1) for left in range(4, 22, 2)),
    "bicycle": ((2, 3), (6, 7), (9, 10)),
    "bird": ((1, 2), (4, 5), (7, 8), (10, 11), (12, 13), (14, 15)),
    "boat": tuple((left, left + 1) for left in range(1, 13, 2)),
    "bottle": tuple((left, left + 1) for left in range(0, 10, 2)),
    "bus": ((0, 1), (2, 3), (5, 6), *_WHEELS),
    "car": ((0, 1), (2, 3), (6, 7), *_WHEELS),
    "cat": (*_HEAD, (6, 7), *_PAWS),
    "chair": tuple((left, left + 1) for left in range(0, 14, 2)),
    "cow": _GRAZING,
    "dog": (*_HEAD, *_PAWS),
    "horse": (*_HEAD, (6, 7), (10, 11), (12, 13), (16, 17), (18, 19)),
    "motorbike": ((0, 1), (2, 3)),
    "person": ((0, 1), (2, 3), *((left, left + 1) for left in range(8, 20, 2))),
    "pottedplant": ((0, 2), (4, 5), (6, 8)),
    "sheep": _GRAZING,
    "train": tuple((left, left + 1) for left in range(0, 18, 2)),
    "tvmonitor": ((0, 2), (4, 6), (3, 7), (8, 10), (12, 14), (11, 15)),
}


def mirrored_keys() -> dict[str, dict[str, str]]:
    """Returns, for each class, the id that each key point has in a mirrored image."""
    return {name: {str(a): str(b) for pair in swaps for a, b in (pair, pair[::-1])} for name, swaps in SWAPS.items()}


def read_spair(root: Path, config: PairsConfig) -> Catalogue:
    """Reads the pairs of a split.

    Points carry SPair's ids as keys; the difficulty flags are in `about`.

    Raises:
        DataError: A file cannot be read or lacks a key.
        UnknownNameError: There is no such split.
    """
    folders = sorted(folder for folder in (root / "PairAnnotation").iterdir() if folder.is_dir())
    splits = {USERS_NAMES.get(folder.name, folder.name): folder for folder in folders}
    listing = Listing()
    for file in sorted(split_named(config.split, splits, "SPair-71k").glob("*.json")):
        one = read_json(file)
        try:
            source, target = (_image(listing, root, one, side) for side in ("src", "trg"))
            listing.add(source, target, one["category"], _annotation(one, str(file)))
        except KeyError as error:
            raise DataError(f"{file}: the key {error} of a SPair-71k pair is missing") from error
    return listing.catalogue("spair", mirrored_keys())


def _image(listing: Listing, root: Path, one: dict[str, Any], side: str) -> int:
    name = f"{one['category']}/{one[f'{side}_imname']}"
    width, height = one[f"{side}_imsize"][:2]
    return listing.image(PairImage(name, root / "JPEGImages" / name), (int(height), int(width)))


def _annotation(one: dict[str, Any], where: str) -> Annotation:
    return Annotation(
        points_of(one["src_kps"], where),
        points_of(one["trg_kps"], where),
        box_of(one["src_bndbox"], where),
        box_of(one["trg_bndbox"], where),
        tuple(str(key) for key in one["kps_ids"]),
        {name: one[name] for name in ABOUT if name in one},
    )
