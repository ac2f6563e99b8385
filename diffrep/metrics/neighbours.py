"""Whether two representations have the same neighbours (Huh et al., 2024, the Platonic Representation Hypothesis).

Both are (N, D) tensors of the same samples in the same order, of any widths. Neighbours are the k other samples with
the greatest inner product, the nearest first, so features are brought to one length before: `prepare` does it. All is
computed in fp64 on the tensors' device, a part of the N x N products at a time. What representations that have nothing
in common reach, about k / N, is `chance`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from diffrep.errors import DataError

# Numbers of a part of an N x N matrix: 128 MB in fp64.
PART = 2**24


def prepare(features: torch.Tensor, q: float = 0.95) -> torch.Tensor:
    """Clamps outliers and brings rows to unit length, as the published scores are taken.

    The bound of the clamp is the q-quantile of a row's absolute values, averaged over rows.

    Args:
        features: (N, D).
        q: From 0 to 1; 1 clamps nothing.

    Returns:
        (N, D) in fp64; rows of zeros stay so.

    Raises:
        DataError: The shape is another, values are not finite, or q is out of range.
    """
    features = checked(features)
    if not 0 <= q <= 1:
        raise DataError(f"q is a quantile, from 0 to 1; given: {q}")
    if q < 1:
        # torch.quantile takes no more than 2^24 numbers.
        rows = max(1, PART // features.shape[1])
        bound = torch.cat([part.abs().quantile(q, dim=1) for part in features.split(rows)]).mean().item()
        features = features.clamp(-bound, bound)
    return F.normalize(features, dim=1)


def nearest(features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k other samples with the greatest inner product.

    Args:
        features: (N, D).
        k: From 1 to N - 1.

    Returns:
        Inner products (N, k) fp64, descending, and rows (N, k) int64.

    Raises:
        DataError: k is out of range, the shape is another, or values are not finite.
    """
    features = checked(features)
    count = len(features)
    if not 1 <= k < count:
        raise DataError(f"a sample among {count} has {count - 1} neighbours; k is from 1 to that; given: {k}")
    found = []
    for rows in torch.arange(count, device=features.device).split(max(1, PART // count)):
        products = features[rows] @ features.T
        products[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        found.append(products.topk(k))
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def mutual_knn(a: torch.Tensor, b: torch.Tensor, k: int = 10) -> float:
    """Returns the share of a sample's k neighbours in `a` that are its neighbours in `b`, averaged, in [0, 1].

    Args:
        a: Features (N, D).
        b: Features (N, E) of the same samples.
        k: Neighbours, from 1 to N - 1.

    Raises:
        DataError: The samples differ in number, k is out of range, or values are not finite.
    """
    same = _matches(*_lists(a, b, k))
    return same.sum((1, 2)).double().mean().item() / k


def cycle_knn(a: torch.Tensor, b: torch.Tensor, k: int = 10) -> float:
    """Returns the share of samples that a step to a neighbour in `b` and one to a neighbour in `a` can lead back to.

    Near 1 for any features when k^2 is near N; not symmetric. Arguments and errors are those of `mutual_knn`.
    """
    in_a, in_b = _lists(a, b, k)
    back = torch.zeros(len(in_a), dtype=torch.bool, device=in_a.device)
    itself = torch.arange(len(in_a), device=in_a.device)[:, None]
    for step in in_b.T:
        back |= (in_a[step] == itself).any(1)
    return back.double().mean().item()


def lcs_knn(a: torch.Tensor, b: torch.Tensor, k: int = 10) -> float:
    """Returns the mean length, from 0 to k, of the longest common subsequence of the two lists of neighbours.

    Arguments and errors are those of `mutual_knn`.
    """
    same = _matches(*_lists(a, b, k)).long()
    before = same.new_zeros(k + 1, len(same))
    for i in range(k):
        row = [before[0]]
        for j in range(k):
            row.append(torch.maximum(torch.maximum(before[j + 1], row[j]), before[j] + same[:, i, j]))
        before = torch.stack(row)
    return before[k].double().mean().item()


def edit_distance_knn(a: torch.Tensor, b: torch.Tensor, k: int = 10) -> float:
    """Returns 1 - d / k, d the Levenshtein distance between the two lists of neighbours, averaged, in [0, 1].

    The distance counts insertions, deletions and substitutions; k of them turn any list into any other. Arguments and
    errors are those of `mutual_knn`.
    """
    other = (~_matches(*_lists(a, b, k))).long()
    before = torch.arange(k + 1, device=other.device)[:, None].expand(-1, len(other))
    for i in range(k):
        row = [before[0] + 1]
        for j in range(k):
            row.append(torch.minimum(torch.minimum(before[j + 1], row[j]) + 1, before[j] + other[:, i, j]))
        before = torch.stack(row)
    return 1 - before[k].double().mean().item() / k


def chance(
    metric: Callable[..., float], a: torch.Tensor, b: torch.Tensor, seed: int = 0, shuffles: int = 4, **options: Any
) -> float:
    """Returns what a metric gives for samples that do not belong together: its mean over shuffles of the rows of `b`.

    Args:
        metric: Function of this module or of `kernels`.
        a: Features (N, D).
        b: Features (N, E).
        seed: Seeds the shuffles, which are the same on all devices.
        shuffles: How many.
        options: Further arguments of the metric, such as k.

    Raises:
        DataError: As the metric does.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(b), generator=generator).to(b.device) for _ in range(shuffles)]
    return sum(metric(a, b[order], **options) for order in orders) / shuffles


def checked(features: torch.Tensor) -> torch.Tensor:
    """Returns features (N, D) in fp64.

    Raises:
        DataError: The shape is another, or values are not finite.
    """
    if features.ndim != 2 or not features.shape[1]:
        raise DataError(
            f"features are (N, D), a row for each sample; given: {tuple(features.shape)}; average maps first"
        )
    if not torch.isfinite(features).all():
        broken = int((~features.isfinite()).any(1).sum())
        raise DataError(f"the features of {broken} of {len(features)} samples hold NaN or infinity")
    return features.double()


def pair(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features (N, D) and (N, E) of the same samples in fp64.

    Raises:
        DataError: The samples differ in number, shapes are others, or values are not finite.
    """
    if len(a) != len(b):
        raise DataError(f"the features must be of the same samples in the same order; given: {len(a)} and {len(b)}")
    return checked(a), checked(b)


def _lists(a: torch.Tensor, b: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = pair(a, b)
    return nearest(a, k)[1], nearest(b, k)[1]


def _matches(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[:, :, None] == b[:, None, :]
