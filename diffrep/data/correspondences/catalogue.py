"""From all pairs that a set offers to the chosen ones, with their points checked."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffrep.config.pairs import PairsConfig
from diffrep.data.pairs import Box, Pair, PairImage, PairSet
from diffrep.errors import ConfigError, DataError, UnknownNameError

# A pair with its points takes about 2 kB.
MOST_PAIRS = 1_000_000


@dataclass(frozen=True)
class Annotation:
    """The points of one pair as a set's files give them.

    Attributes:
        source_points: (K, 2) float64 (x, y) in pixels of the image or its crop; NaN for a point that is not visible.
        target_points: (K, 2), likewise.
        source_box: (x0, y0, x1, y1), or None.
        target_box: Likewise.
        keys: K names of the points, or ().
        about: Other annotations, plain JSON.
    """

    source_points: np.ndarray
    target_points: np.ndarray
    source_box: Box | None = None
    target_box: Box | None = None
    keys: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """All pairs that a set offers, without their points.

    Attributes:
        name: Name of the set.
        images: Its images.
        sources: (P,) position of each pair's source in `images`.
        targets: (P,) position of its target.
        categories: Names of the categories; one "" where there are none.
        category: (P,) position of its category in `categories`.
        annotation: Gives the points of a pair by its number.
        sizes: (H, W) of images, where the annotations tell; the others are read from the files.
        mirrored: As in `PairSet`.
    """

    name: str
    images: list[PairImage]
    sources: np.ndarray
    targets: np.ndarray
    categories: list[str]
    category: np.ndarray
    annotation: Callable[[int], Annotation]
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    mirrored: dict[str, dict[str, str]] = field(default_factory=dict)


def build(catalogue: Catalogue, config: PairsConfig) -> PairSet:
    """Chooses pairs, and checks their images and points.

    A point stays when it is visible in both images of its pair and lies inside both, 0 <= x < W and 0 <= y < H; a pair
    that is left without points is left out. `PairSet.dropped` counts both.

    Raises:
        UnknownNameError: There is no such category.
        DataError: No pair is left, images are missing or cannot be read, or a pair's points do not match.
        ConfigError: The pairs are too many to hold.
    """
    chosen = select(catalogue, config)
    sizes = _sizes(catalogue, np.unique([catalogue.sources[chosen], catalogue.targets[chosen]]))
    found: list[tuple[int, int, Annotation, str]] = []
    dropped = {"points": 0, "pairs": 0}
    for number in chosen:
        source, target = int(catalogue.sources[number]), int(catalogue.targets[number])
        whole = catalogue.annotation(int(number))
        where = f"{catalogue.name}: {catalogue.images[source].id} -> {catalogue.images[target].id}"
        kept, outside = _inside(whole, sizes[source], sizes[target], where)
        dropped["points"] += outside
        if len(kept.source_points):
            found.append((source, target, kept, catalogue.categories[catalogue.category[number]]))
        else:
            dropped["pairs"] += 1
    if not found:
        raise DataError(
            f"{catalogue.name}: none of the {len(chosen)} pairs has a point that is visible in both images"
        )
    used = sorted({image for pair in found for image in pair[:2]}, key=lambda image: catalogue.images[image].id)
    place = {image: position for position, image in enumerate(used)}
    pairs = [
        Pair(
            place[source],
            place[target],
            kept.source_points,
            kept.target_points,
            kept.source_box,
            kept.target_box,
            category,
            kept.keys,
            kept.about,
        )
        for source, target, kept, category in found
    ]
    present = {pair.category for pair in pairs}
    mirrored = {name: keys for name, keys in catalogue.mirrored.items() if name in present}
    return PairSet(catalogue.name, [catalogue.images[image] for image in used], pairs, mirrored, dropped)


def select(catalogue: Catalogue, config: PairsConfig) -> np.ndarray:
    """Returns the numbers of the chosen pairs, rising.

    Raises:
        UnknownNameError: There is no such category.
        DataError: There is no pair, or none is left.
        ConfigError: They are more than can be held.
    """
    chosen = np.arange(len(catalogue.sources))
    if not len(chosen):
        raise DataError(f"{catalogue.name}: there are no pairs in {config.path}")
    if config.categories is not None:
        for name in config.categories:
            if name not in catalogue.categories:
                raise UnknownNameError(f"category of {catalogue.name}", name, catalogue.categories)
        wanted = [catalogue.categories.index(name) for name in config.categories]
        chosen = chosen[np.isin(catalogue.category, wanted)]
    if config.images is not None:
        chosen = _with_images(catalogue, chosen, config.images)
    if config.sample is not None:
        drawn = []
        for number, name in enumerate(catalogue.categories):
            rows = chosen[catalogue.category[chosen] == number]
            # By name, so that the draw of a category does not depend on which others are read.
            rng = np.random.default_rng([config.seed & 0xFFFFFFFF, zlib.crc32(name.encode())])
            drawn.append(rng.choice(rows, config.sample, replace=False) if len(rows) > config.sample else rows)
        chosen = np.sort(np.concatenate(drawn))
    chosen = chosen[: config.limit]
    if not len(chosen):
        raise DataError(f"{catalogue.name}: no pair is left with the chosen categories and images={config.images}")
    if len(chosen) > MOST_PAIRS:
        raise ConfigError(
            f"{catalogue.name} has {len(chosen):,} pairs here, and {MOST_PAIRS:,} can be held; draw some with "
            "sample=N for each category, or set limit or categories"
        )
    return chosen


def _with_images(catalogue: Catalogue, chosen: np.ndarray, images: int | tuple[int, int]) -> np.ndarray:
    occurring = np.unique([catalogue.sources[chosen], catalogue.targets[chosen]])
    ordered = sorted(occurring.tolist(), key=lambda image: catalogue.images[image].id)
    if isinstance(images, tuple):
        kept = ordered[images[0] : images[1]]
    else:
        kept = ordered[:images] if images > 0 else ordered[images:]
    return chosen[np.isin(catalogue.sources[chosen], kept) & np.isin(catalogue.targets[chosen], kept)]


def _sizes(catalogue: Catalogue, used: np.ndarray) -> dict[int, tuple[int, int]]:
    missing = [catalogue.images[image] for image in used if not catalogue.images[image].file.is_file()]
    if missing:
        raise DataError(
            f"{catalogue.name}: {len(missing)} of {len(used)} images are missing; the first is "
            f"{str(missing[0].file)!r}"
        )
    return {int(image): catalogue.sizes.get(int(image)) or catalogue.images[image].size() for image in used}


def _inside(
    whole: Annotation, source_size: tuple[int, int], target_size: tuple[int, int], where: str
) -> tuple[Annotation, int]:
    """Returns the points that are visible and inside in both images, and how many visible ones are outside."""
    one, other = whole.source_points, whole.target_points
    if len(one) != len(other):
        raise DataError(f"{where} has {len(one)} source points and {len(other)} target points")
    if whole.keys and len(whole.keys) != len(one):
        raise DataError(f"{where} has {len(one)} points and {len(whole.keys)} keys")
    visible = ~(np.isnan(one) | np.isnan(other)).any(axis=1)
    inside = visible.copy()
    for points, (height, width) in ((one, source_size), (other, target_size)):
        # Comparisons with NaN are false, which is what a hidden point needs.
        inside &= ((points >= 0) & (points < (width, height))).all(axis=1)
    keys = tuple(key for key, keep in zip(whole.keys, inside, strict=True) if keep) if whole.keys else ()
    kept = Annotation(one[inside], other[inside], whole.source_box, whole.target_box, keys, whole.about)
    return kept, int(visible.sum() - inside.sum())
