"""Predicts target points of many pairs at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from diffrep.correspond.matching import Side
from diffrep.correspond.pose import pose_distance
from diffrep.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Question:
    """Points of a source that are looked for in a target.

    Attributes:
        source: The source, prepared.
        target: The target, prepared for the same protocol.
        points: (K, 2) in the source, as annotated.
        mirror: The mirrored source; pose alignment needs it.
        partners: (K,) as `partners_of` gives them; pose alignment needs them.
    """

    source: Side
    target: Side
    points: np.ndarray
    mirror: Side | None = None
    partners: np.ndarray | None = None


def predict(
    source: Side,
    target: Side,
    points: np.ndarray,
    mirror: Side | None = None,
    partners: np.ndarray | None = None,
) -> np.ndarray:
    """Predicts where points of a source are in a target.

    With pose alignment, points whose partner (the other side's point) is not known keep the prediction from the source
    as it is, as in GeoAware-SC.

    Args:
        source: The source, prepared.
        target: The target, prepared for the same protocol.
        points: (K, 2) in the source, as annotated.
        mirror: The mirrored source; pose alignment needs it.
        partners: (K,) as `partners_of` gives them; pose alignment needs them.

    Returns:
        (K, 2) fp64 in the target, as its points are annotated.

    Raises:
        ConfigError: Protocols or channels differ, or pose alignment lacks something.
    """
    return predict_all([Question(source, target, points, mirror, partners)])[0]


def predict_all(questions: Iterable[Question]) -> list[np.ndarray]:
    """Predicts for many pairs, each as `predict` does.

    Pairs with the same target (the same `Side`) are matched together, so give them in one call.

    Returns:
        (K, 2) fp64 for each question, in their order.
    """
    asked = [(one.target, _descriptors(one)) for one in questions]
    groups: dict[int, list[int]] = {}
    for number, (target, _) in enumerate(asked):
        groups.setdefault(id(target), []).append(number)
    answers: list[np.ndarray] = [np.empty((0, 2))] * len(asked)
    for numbers in groups.values():
        target = asked[numbers[0]][0]
        queries = [asked[number][1] for number in numbers]
        found = target.match(torch.cat(queries)).cpu().numpy().astype(np.float64)
        points = target.layout.annotate(found.clip(0, target.layout.last))
        ends = np.cumsum([len(one) for one in queries])[:-1]
        for number, part in zip(numbers, np.split(points, ends), strict=True):
            answers[number] = part
    return answers


def _descriptors(question: Question) -> torch.Tensor:
    source, target, mirror, partners = question.source, question.target, question.mirror, question.partners
    protocol = source.protocol
    if any(side is not None and side.protocol != protocol for side in (target, mirror)):
        raise ConfigError(
            f"the source is prepared for {protocol.name!r}, the target for {target.protocol.name!r}; prepare both "
            "(and the mirrored source) for one protocol"
        )
    points = np.asarray(question.points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ConfigError(f"points of shape {points.shape} are given; finite (K, 2) are needed")
    descriptors = source.lookup(points)
    target.check(descriptors)
    if protocol.pose == "none":
        return descriptors
    if mirror is None or partners is None:
        raise ConfigError(
            f"the protocol {protocol.name!r} aligns poses (pose={protocol.pose}): it needs the mirrored source's map "
            "and each point's partner; give both, or set pose=none"
        )
    able = np.flatnonzero(np.asarray(partners) >= 0)
    if len(able) and pose_distance(mirror, target) < pose_distance(source, target):
        turned = mirror.lookup(source.layout.mirror(points[partners[able]]))
        descriptors = descriptors.index_copy(0, torch.from_numpy(able).to(descriptors.device), turned)
    return descriptors
