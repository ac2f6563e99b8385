"""Sets whose files list their pairs, and sets whose pairs are made of annotated images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffrep.data.correspondences.catalogue import Annotation, Catalogue
from diffrep.data.pairs import Box, PairImage
from diffrep.errors import ConfigError

# Positions of both images of every pair of this many images take a few hundred MB while they are compared.
MOST_IMAGES = 5_000


class Listing:
    """Collects the pairs that a set's files list one by one."""

    def __init__(self):
        self.images: dict[str, int] = {}
        self.listed: list[PairImage] = []
        self.sizes: dict[int, tuple[int, int]] = {}
        self.ends: list[tuple[int, int]] = []
        self.names: list[str] = []
        self.annotations: list[Annotation] = []

    def image(self, image: PairImage, size: tuple[int, int] | None = None) -> int:
        """Returns the position of an image, which is taken in when its id is new.

        Args:
            image: The image.
            size: Its (H, W), where the annotations tell.
        """
        place = self.images.setdefault(image.id, len(self.listed))
        if place == len(self.listed):
            self.listed.append(image)
        if size is not None:
            self.sizes[place] = size
        return place

    def add(self, source: int, target: int, category: str, annotation: Annotation) -> None:
        """Takes in a pair of two images, given by their positions."""
        self.ends.append((source, target))
        self.names.append(category)
        self.annotations.append(annotation)

    def catalogue(self, name: str, mirrored: dict[str, dict[str, str]] | None = None) -> Catalogue:
        """Returns all that was taken in."""
        sources, targets = np.array(self.ends, dtype=np.int64).reshape(-1, 2).T
        categories = sorted(set(self.names))
        numbers = {category: number for number, category in enumerate(categories)}
        return Catalogue(
            name,
            self.listed,
            sources,
            targets,
            categories,
            np.array([numbers[category] for category in self.names], dtype=np.int64),
            self.annotations.__getitem__,
            self.sizes,
            mirrored or {},
        )


@dataclass(frozen=True)
class Shot:
    """An annotated image.

    Attributes:
        image: The image.
        points: (K, 2) float64, in the order of the set's keys; NaN for a point that is not visible.
        box: Of the object.
        size: (H, W), where the annotations tell.
    """

    image: PairImage
    points: np.ndarray
    box: Box | None = None
    size: tuple[int, int] | None = None


def catalogue_of_shots(
    name: str,
    shots: Sequence[Shot],
    groups: Sequence[str],
    keys: tuple[str, ...],
    apart: Sequence[str] | None = None,
    least: int = 1,
) -> Catalogue:
    """Pairs annotated images with each other, in both orders.

    Args:
        name: Name of the set.
        shots: The images.
        groups: Category of each; partners are of the same.
        keys: Names of the points. Those that name a side are mirrored; see `mirrored_names`.
        apart: Names, one for each image, that partners must not share.
        least: Points that must be visible in both.

    Raises:
        ConfigError: A category has too many images to pair.
    """
    sources, targets, category = [], [], []
    categories = sorted(set(groups))
    group, visible = np.array(groups), np.array([~np.isnan(shot.points).any(axis=1) for shot in shots])
    for number, one in enumerate(categories):
        members = np.flatnonzero(group == one)
        if len(members) > MOST_IMAGES:
            raise ConfigError(
                f"{name}: {len(members):,} images are too many to pair with each other (at most {MOST_IMAGES:,}); "
                "read a smaller split or subset"
            )
        shared = visible[members].astype(np.float32) @ visible[members].astype(np.float32).T
        allowed = (shared >= least) & ~np.eye(len(members), dtype=bool)
        if apart is not None:
            _, kinds = np.unique(np.array(apart)[members], return_inverse=True)
            allowed &= kinds[:, None] != kinds[None]
        rows, columns = np.nonzero(allowed)
        sources.append(members[rows])
        targets.append(members[columns])
        category.append(np.full(len(rows), number))
    starts, ends = np.concatenate([[], *sources]).astype(np.int64), np.concatenate([[], *targets]).astype(np.int64)

    def annotation(number: int) -> Annotation:
        one, other = shots[starts[number]], shots[ends[number]]
        return Annotation(one.points, other.points, one.box, other.box, keys)

    mirrored = mirrored_names(keys)
    return Catalogue(
        name,
        [shot.image for shot in shots],
        starts,
        ends,
        categories,
        np.concatenate([[], *category]).astype(np.int64),
        annotation,
        {place: shot.size for place, shot in enumerate(shots) if shot.size is not None},
        {one: mirrored for one in categories} if mirrored else {},
    )


def mirrored_names(keys: Sequence[str]) -> dict[str, str]:
    """Returns the partner of each key whose name has "left" or "right" in it, where there is such a partner."""
    swapped = {key: key.replace("left", "\0").replace("right", "left").replace("\0", "right") for key in keys}
    return {key: other for key, other in swapped.items() if other != key and other in swapped}
