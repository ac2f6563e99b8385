"""Pose alignment: does the source or its mirror image face the way the target does?

GeoAware-SC (Zhang et al., 2024, section 4.1) matches from both, and keeps the one whose descriptors are nearer to the
target's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from diffrep.correspond.matching import Side, nearest
from diffrep.data.pairs import Pair
from diffrep.errors import DataError


def pose_distance(source: Side, target: Side) -> float:
    """Returns how far the source's descriptors are from the target's, as L2 distances of unit vectors in [0, 2].

    By the protocol's `pose`: "nn" is the mean over cells of the source's object of the distance to the nearest cell of
    the target's object; "mutual" is the mean over cells of both that are each other's nearest. Without masks all cells
    count, those of padding too.

    Raises:
        DataError: A mask covers no cell.
    """
    (first, on_first), (second, on_second) = source.cells(), target.cells()
    for on, which in ((on_first, "source"), (on_second, "target")):
        if not on.any():
            raise DataError(f"the {which}'s mask covers no cell of its map; leave the mask out or use larger maps")
    first, second = (
        units[torch.from_numpy(on).to(units.device)] for units, on in ((first, on_first), (second, on_second))
    )
    forth, back, cosine = nearest(first, second, "cosine")
    distance = (2 - 2 * cosine.double()).clamp(min=0).sqrt()
    if source.protocol.pose == "mutual":
        distance = distance[back[forth] == torch.arange(len(forth), device=forth.device)]
    return distance.mean().item()


def partners_of(pair: Pair, mirrored: Mapping[str, Mapping[str, str]]) -> np.ndarray:
    """Finds for each point of a pair the one that takes its name when the source is mirrored.

    Args:
        pair: With keys.
        mirrored: `PairSet.mirrored`.

    Returns:
        (K,) int64: a position among the pair's points, that of the point itself where its key has no other side; -1
        where the other one is not among them, and for all points of a category whose symmetry is not known.

    Raises:
        DataError: The keys of a category do not go in pairs: one becomes another that does not become it.
    """
    if pair.category not in mirrored or not pair.keys:
        return np.full(len(pair.source_points), -1)
    becomes, at = mirrored[pair.category], {key: position for position, key in enumerate(pair.keys)}
    for key, other in becomes.items():
        if becomes.get(other, other) != key:
            raise DataError(
                f"mirrored: {pair.category!r} turns key {key!r} into {other!r}, and {other!r} into "
                f"{becomes.get(other, other)!r}; two keys must turn into each other"
            )
    return np.array([at.get(becomes.get(key, key), -1) for key in pair.keys], dtype=np.int64)
