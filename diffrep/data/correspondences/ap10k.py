"""AP-10K (Yu et al., 2021): pairs of animals within a species, across species and across families."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences.catalogue import Annotation, Catalogue
from diffrep.data.correspondences.files import box_of_extent, points_of, read_json, split_named
from diffrep.data.correspondences.listing import Listing, Shot, catalogue_of_shots, mirrored_names
from diffrep.data.pairs import Box, PairImage
from diffrep.errors import DataError

KEYS = (
    "left_eye",
    "right_eye",
    "nose",
    "neck",
    "root_of_tail",
    "left_shoulder",
    "left_elbow",
    "left_front_paw",
    "right_shoulder",
    "right_elbow",
    "right_front_paw",
    "left_hip",
    "left_knee",
    "left_back_paw",
    "right_hip",
    "right_knee",
    "right_back_paw",
)
VISIBLE = 2  # COCO: 0 is not labelled, 1 labelled and hidden
LEAST_POINTS = 3
# GeoAware-SC's folders of prepared pairs.
PREPARED = {"intra-species": "", "cross-species": "_cross_species", "cross-family": "_cross_family"}
USERS_NAMES = {"trn": "train"}


def read_ap10k(root: Path, config: PairsConfig) -> Catalogue:
    """Reads pairs that GeoAware-SC's notebook prepared, or pairs the animals of annotations/ap10k-*.json.

    Made pairs are all of the subset in both orders, of images with one animal, with at least three points visible in
    both; draw some of them with `sample`. Their category is the species, the family for "cross-species", and "all" for
    "cross-family". The published numbers are of the notebook's own random pairs, which lie in PairAnnotation/.

    Raises:
        DataError: A file cannot be read.
        UnknownNameError: There is no such split.
    """
    return _read_prepared(root, config) if (root / "PairAnnotation").is_dir() else _make_pairs(root, config)


def _make_pairs(root: Path, config: PairsConfig) -> Catalogue:
    files = {file.stem.removeprefix("ap10k-"): file for file in sorted((root / "annotations").glob("ap10k-*.json"))}
    files = {name.removesuffix("-split1"): file for name, file in files.items()}
    file = split_named(config.split, files, "AP-10K")
    content = read_json(file)
    try:
        images = {one["id"]: one for one in content["images"]}
        kinds = {one["id"]: (one["name"], one["supercategory"]) for one in content["categories"]}
        animals = Counter(one["image_id"] for one in content["annotations"])
        alone = [one for one in content["annotations"] if animals[one["image_id"]] == 1]
        shots = [_shot(root, images[one["image_id"]], one, file) for one in alone]
        species, families = ([kinds[one["category_id"]][place] for one in alone] for place in (0, 1))
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: the key {error} of a COCO annotation is missing") from error
    groups, apart = {
        "intra-species": (species, None),
        "cross-species": (families, species),
        "cross-family": (["all"] * len(shots), families),
    }[config.subset]
    return catalogue_of_shots("ap-10k", shots, groups, KEYS, apart, LEAST_POINTS)


def _shot(root: Path, image: dict[str, Any], animal: dict[str, Any], file: Path) -> Shot:
    where = f"{file}, annotation {animal['id']}"
    name, size = image["file_name"], (image["height"], image["width"])
    return Shot(PairImage(name, root / "data" / name), *_marks(animal, where), size)


def _marks(animal: dict[str, Any], where: str) -> tuple[np.ndarray, Box]:
    values = animal["keypoints"]
    if len(values) != 3 * len(KEYS):
        raise DataError(f"{where}: {len(values)} numbers of key points; {len(KEYS)} points with x, y, v are needed")
    triples = [values[start : start + 3] for start in range(0, len(values), 3)]
    points = points_of([triple[:2] if triple[2] == VISIBLE else None for triple in triples], where)
    return points, box_of_extent(animal["bbox"], where)


def _read_prepared(root: Path, config: PairsConfig) -> Catalogue:
    suffix = PREPARED[config.subset]
    folders = sorted(folder for folder in (root / "PairAnnotation").iterdir() if folder.is_dir())
    named = {folder.name.removesuffix(suffix): folder for folder in folders if folder.name.endswith(suffix)}
    # "test_cross_species" ends with "" too.
    named = {USERS_NAMES.get(name, name): folder for name, folder in named.items() if "_cross_" not in name}
    listing = Listing()
    for file in sorted(split_named(config.split, named, f"AP-10K, {config.subset}").glob("*.json")):
        pair = read_json(file)
        try:
            (source, one), (target, other) = (
                _prepared_image(listing, root, pair[f"{side}_json_path"]) for side in ("src", "trg")
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}: the key {error} of a prepared pair is missing") from error
        category = file.stem.rpartition(":")[2]
        listing.add(source, target, category, Annotation(one[0], other[0], one[1], other[1], KEYS))
    return listing.catalogue("ap-10k", {category: mirrored_names(KEYS) for category in set(listing.names)})


def _prepared_image(listing: Listing, root: Path, path: str) -> tuple[int, tuple[np.ndarray, Box]]:
    # Written relative to that project's own folder.
    name = path.rpartition("ImageAnnotation/")[2]
    file = root / "ImageAnnotation" / name
    animal = read_json(file)
    name = str(Path(name).with_suffix(".jpg").as_posix())
    image = PairImage(name, root / "JPEGImages" / name)
    return listing.image(image, (animal["height"], animal["width"])), _marks(animal, str(file))
