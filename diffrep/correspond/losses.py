"""What descriptors are trained on: pairs of maps with points that correspond.

Points are (x, y) in cells of the map they lie on, with the centre of the first cell at (0, 0). A batch is a sequence
of maps (C, h, w), or a tensor (B, C, h, w), with one set of points a map; the number of points and the size of the
maps may differ from pair to pair. Each loss returns one number a pair, (B,), so that pairs can be weighed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from diffrep.correspond.soft import soft_argmax
from diffrep.errors import ConfigError, DataError

LOGIT_SCALE = math.log(1 / 0.07)
Batch = torch.Tensor | Sequence[torch.Tensor]
Points = Sequence[np.ndarray | torch.Tensor]


def contrastive_loss(
    source: Batch,
    target: Batch,
    source_points: Points,
    target_points: Points,
    logit_scale: float | torch.Tensor = LOGIT_SCALE,
) -> torch.Tensor:
    """Each point must find its partner among all cells of the other map, in both directions.

    Diffusion Hyperfeatures (Luo et al., 2023): cross-entropy over the cosines with every cell, times
    exp(logit_scale); the mean over points and over the two directions. Only the rows of the K points are computed.

    Args:
        source: Maps of descriptors.
        target: Maps of descriptors.
        source_points: (K, 2) a pair.
        target_points: (K, 2) a pair, in the same order.
        logit_scale: Logarithm of the scale, a constant or a parameter.

    Returns:
        (B,) fp32.

    Raises:
        ConfigError: Maps, points and batch do not go together.
        DataError: A pair has no points, or points that are not finite.
    """
    losses = []
    for one, other, start, end in _pairs(source, target, source_points, target_points):
        found, wanted = cell_index(start, one.shape[-2:]), cell_index(end, other.shape[-2:])
        here, there = (F.normalize(cells.flatten(1).float(), dim=0) for cells in (one, other))
        found, wanted = found.to(here.device), wanted.to(here.device)
        scale = torch.as_tensor(logit_scale, device=here.device).exp()
        forth = F.cross_entropy(scale * (here[:, found].T @ there), wanted)
        back = F.cross_entropy(scale * (there[:, wanted].T @ here), found)
        losses.append((forth + back) / 2)
    return torch.stack(losses)


def sparse_contrastive_loss(
    source: Batch,
    target: Batch,
    source_points: Points,
    target_points: Points,
    logit_scale: float | torch.Tensor = LOGIT_SCALE,
) -> torch.Tensor:
    """Each point must find its partner among the pair's points, in both directions.

    GeoAware-SC (Zhang et al., 2024): symmetric cross-entropy of the K x K cosines, times exp(logit_scale), between the
    cells that the points lie in. Arguments, result and errors as for `contrastive_loss`.
    """
    losses = []
    for one, other, start, end in _pairs(source, target, source_points, target_points):
        here, there = (
            F.normalize(cells.flatten(1)[:, cell_index(points, cells.shape[-2:]).to(cells.device)].float(), dim=0)
            for cells, points in ((one, start), (other, end))
        )
        logits = torch.as_tensor(logit_scale, device=here.device).exp() * (here.T @ there)
        own = torch.arange(len(logits), device=logits.device)
        losses.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)
    return torch.stack(losses)


def end_point_loss(
    source: Batch,
    target: Batch,
    source_points: Points,
    target_points: Points,
    beta: float = 0.02,
    window: int | None = None,
    noise: float | Sequence[float] = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The distance between where soft-argmax finds each source point in the target and where it is.

    The dense loss of GeoAware-SC (Zhang et al., 2024): soft-argmax over the cosines with every target cell, and the
    mean Euclidean distance in cells. What is looked up is the descriptor of the source point's cell, so what it should
    find is the target point moved by as much as that cell's centre lies beside the source point.

    Args:
        source: Maps of descriptors.
        target: Maps of descriptors.
        source_points: (K, 2) a pair.
        target_points: (K, 2) a pair, in the same order.
        beta: Temperature of the soft-argmax.
        window: Side of its window, see `soft_argmax`; None takes all cells.
        noise: Standard deviation of Gaussian noise on the target points, in cells of the target; one number, or one a
            pair. Published: 0.1 * threshold / 2, with the pair's PCK threshold before alpha.
        generator: What the noise is drawn from, on the CPU; needed with noise.

    Returns:
        (B,) fp32, in cells of the target.

    Raises:
        ConfigError: Maps, points and batch do not go together, or noise has no generator.
        DataError: A pair has no points, or points that are not finite.
    """
    pairs = _pairs(source, target, source_points, target_points)
    spreads = list(noise) if isinstance(noise, Sequence) else [noise] * len(pairs)
    if len(spreads) != len(pairs) or not all(0 <= spread < math.inf for spread in spreads):
        raise ConfigError(f"noise must be a number from 0, or one for each of {len(pairs)} pairs; got {noise}")
    if any(spreads) and generator is None:
        raise ConfigError("noise needs a generator, so that a run can be repeated; give a seeded torch.Generator")
    losses = []
    for (one, other, start, end), spread in zip(pairs, spreads, strict=True):
        here = F.normalize(one.flatten(1)[:, cell_index(start, one.shape[-2:]).to(one.device)].float(), dim=0)
        there = F.normalize(other.flatten(1).float(), dim=0)
        found = soft_argmax((here.T @ there).unflatten(1, other.shape[-2:]), beta, window)
        wanted = end + (_cells(start, one.shape[-2:]) - start).clamp(-0.5, 0.5)
        if spread:
            wanted = wanted + spread * torch.randn(wanted.shape, generator=generator, dtype=wanted.dtype)
        losses.append((found - wanted.to(found)).norm(dim=1).mean())
    return torch.stack(losses)


def weighted_mean(losses: torch.Tensor, weights: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """Returns the mean of losses (B,), each counted by its weight."""
    weights = torch.as_tensor(weights, dtype=losses.dtype, device=losses.device)
    return (losses * weights).sum() / weights.sum()


def cell_index(points: np.ndarray | torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns the row-major index w * y + x of the cell that each point lies in.

    Points outside are brought to the map's edge. Halves are rounded to even, as numpy does (Diffusion Hyperfeatures).

    Args:
        points: (K, 2), (x, y) in cells.
        size: (h, w) of the map.

    Returns:
        (K,) int64 on the CPU.
    """
    x, y = _cells(torch.as_tensor(points, dtype=torch.float64, device="cpu"), size).long().unbind(1)
    return size[1] * y + x


@dataclass(frozen=True)
class Couple:
    """Two maps whose points correspond.

    Attributes:
        source: Map (C, h, w).
        target: Map (C, h, w).
        source_points: (K, 2) float64.
        target_points: (K, 2) float64, in the same order.
        weight: What it counts in the mean, see `weighted_mean`.
    """

    source: torch.Tensor
    target: torch.Tensor
    source_points: torch.Tensor
    target_points: torch.Tensor
    weight: float = 1.0


def flipped_pairs(
    pair: Couple,
    source_mirrored: torch.Tensor,
    target_mirrored: torch.Tensor,
    partners: Sequence[int] | np.ndarray | None = None,
    double: float = 1.0,
    itself: float = 0.25,
) -> list[Couple]:
    """Returns a pair and what mirror images add to it; the augmentation of GeoAware-SC (Zhang et al., 2024).

    Both images mirrored are a pair with the same points. And an image has itself, mirrored, as a partner: where the
    left eye was, there is now what looks like a right eye. This takes points that have their mirror image among the
    pair's points; without any, it is left out.

    Args:
        pair: Two maps.
        source_mirrored: The source map's descriptors for the mirrored image, not its descriptors mirrored.
        target_mirrored: Likewise.
        partners: For each point the position of its mirror image among the points, itself for what lies in the middle,
            -1 where it is missing; see `pose.partners_of`. None knows no symmetry and leaves the second form out.
        double: Weight of the pair of mirrored images; 0 leaves it out.
        itself: Weight of the source with itself; 0 leaves it out.

    Raises:
        ConfigError: A mirrored map has another shape, or partners are not as many as points.
    """
    for name, one, other in (
        ("source", pair.source, source_mirrored),
        ("target", pair.target, target_mirrored),
    ):
        if one.shape != other.shape:
            raise ConfigError(f"the mirrored {name} map is {tuple(other.shape)} and the map {tuple(one.shape)}")
    if partners is not None and len(partners) != len(pair.source_points):
        raise ConfigError(f"{len(partners)} partners for {len(pair.source_points)} points; give one for each")
    found = [pair]
    source_points = mirrored_points(pair.source_points, pair.source.shape[-1])
    if double:
        target_points = mirrored_points(pair.target_points, pair.target.shape[-1])
        weight = pair.weight * double
        found.append(Couple(source_mirrored, target_mirrored, source_points, target_points, weight))
    there = [number for number, partner in enumerate([] if partners is None else partners) if partner >= 0]
    if itself and there:
        swapped = source_points[[partners[number] for number in there]]
        weight = pair.weight * itself
        found.append(Couple(source_mirrored, pair.source, swapped, pair.source_points[there], weight))
    return found


def mirrored_points(points: torch.Tensor, width: int) -> torch.Tensor:
    """Returns points (K, 2) in cells where they lie on a map of this width once it is mirrored left to right."""
    return torch.stack([width - 1 - points[:, 0], points[:, 1]], dim=1)


def _cells(points: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns the centres (x, y) of the cells that points lie in, or of the nearest cells for points outside."""
    last = torch.tensor([size[1] - 1, size[0] - 1], dtype=points.dtype)
    return points.clamp(min=torch.zeros_like(last), max=last).round()


def _pairs(
    source: Batch, target: Batch, source_points: Points, target_points: Points
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Returns (source, target, source points, target points) of each pair, points in float64 on the CPU."""
    counts = [len(one) for one in (source, target, source_points, target_points)]
    if len(set(counts)) > 1 or not counts[0]:
        raise ConfigError(
            f"{counts[0]} source maps, {counts[1]} target maps, {counts[2]} and {counts[3]} sets of points for them; "
            "give one of each for every pair"
        )
    found = []
    for number, (one, other, *both) in enumerate(zip(source, target, source_points, target_points, strict=True)):
        if one.ndim != 3 or other.ndim != 3 or len(one) != len(other):
            raise ConfigError(
                f"pair {number}: maps must be (C, h, w) of the same C, got {tuple(one.shape)} and {tuple(other.shape)}"
            )
        start, end = (torch.as_tensor(points, dtype=torch.float64, device="cpu") for points in both)
        if start.shape != end.shape or start.ndim != 2 or start.shape[1] != 2:
            raise ConfigError(
                f"pair {number}: points must be (K, 2) in both, got {tuple(start.shape)} and {tuple(end.shape)}"
            )
        if not len(start):
            raise DataError(f"pair {number} has no points, so there is nothing to learn from it; leave it out")
        if not (start.isfinite().all() and end.isfinite().all()):
            raise DataError(f"pair {number} has points that are not finite")
        found.append((one, other, start, end))
    return found
