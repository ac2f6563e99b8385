"""How alike two representations of the same samples are: HSIC, CKA, CKNNA, SVCCA.

Both are (N, D) tensors of the same samples in the same order, of any widths. All is computed in fp64 on the tensors'
device; kernel matrices are made a part at a time and never held whole. Published values of CKA and CKNNA are of
features that `prepare` made; what unrelated features reach is `chance`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from diffrep.errors import ConfigError, DataError
from diffrep.metrics.neighbours import PART, nearest, pair

Kernel = Literal["linear", "rbf"]


def hsic(
    a: torch.Tensor, b: torch.Tensor, kernel: Kernel = "linear", unbiased: bool = False, sigma: float = 1.0
) -> float:
    """Returns the Hilbert-Schmidt independence criterion of two kernels K, L over the samples.

    Biased: tr(K H L H) with H = I - 1/N, without the factor 1 / (N - 1)^2 (Gretton et al., 2005). Unbiased, with zeros
    in the diagonals (Song et al., 2012): [sum(K * L^T) + sum(K) sum(L) / ((N - 1)(N - 2)) - 2 sum(K L) / (N - 2)] /
    (N (N - 3)).

    Args:
        a: Features (N, D).
        b: Features (N, E) of the same samples.
        kernel: "linear", the inner product, or "rbf", exp(-||x - y||^2 / (2 sigma^2)).
        unbiased: Which estimator; the unbiased needs 4 samples.
        sigma: Width of "rbf", in the units of the features.

    Raises:
        ConfigError: The kernel is unknown, or sigma is not above 0.
        DataError: The samples differ in number or are too few, or values are not finite.
    """
    return _hsics(a, b, kernel, unbiased, sigma)[0]


def cka(
    a: torch.Tensor,
    b: torch.Tensor,
    kernel: Kernel = "linear",
    unbiased: bool = False,
    sigma: float = 1.0,
    eps: float = 1e-6,
) -> float:
    """Returns centred kernel alignment, HSIC(K, L) / (sqrt(HSIC(K, K) HSIC(L, L)) + eps) (Kornblith et al., 2019).

    The biased estimator grows with the widths over N, for unrelated features too; the unbiased is 0 for them.

    Args:
        a: Features (N, D).
        b: Features (N, E) of the same samples.
        kernel: As of `hsic`.
        unbiased: As of `hsic`.
        sigma: As of `hsic`.
        eps: The published code's. It is not small beside the unbiased HSIC of unit vectors that differ little, and
            then draws the result to 0. With eps 0 the result does not depend on the scale of the features.

    Raises:
        ConfigError: As of `hsic`.
        DataError: As of `hsic`; or eps is 0 and all samples are equal.
    """
    cross, own_a, own_b = _hsics(a, b, kernel, unbiased, sigma)
    # Both estimators are squared norms here, negative by rounding only.
    return _ratio(cross, max(own_a, 0.0), max(own_b, 0.0), eps)


def cknna(a: torch.Tensor, b: torch.Tensor, k: int = 10, eps: float = 1e-6) -> float:
    """Returns centred kernel nearest-neighbour alignment as the code of Huh et al. (2024) has it, platonic-rep.

    It is unbiased linear CKA of kernels that are zeroed where j is not among the k neighbours of i in both features;
    each HSIC with itself is masked by its own neighbours only. The masks are not symmetric, so the first sum of HSIC
    keeps pairs that are neighbours both ways. The formula of the paper is another and gives other numbers; figures of
    the paper and of REPA are compared with this one. With k = N - 1 it is unbiased CKA. The biased form of that code
    gives unrelated features 0.4 and is left out.

    Args:
        a: Features (N, D), usually of unit length (`prepare`).
        b: Features (N, E) of the same samples.
        k: Neighbours, from 2 to N - 1.
        eps: As of `cka`.

    Raises:
        DataError: The samples differ in number or are fewer than 4, k is out of range, values are not finite, or a
            masked HSIC with itself is negative, which has no root.
    """
    a, b = pair(a, b)
    if k < 2:
        raise DataError(f"CKNNA of fewer than 2 neighbours is not defined; given: k = {k}")
    _check_count(len(a))
    in_a, in_b = _Neighbours.of(a, k), _Neighbours.of(b, k)
    own_a, own_b = in_a.hsic(in_a.products), in_b.hsic(in_b.products)
    if min(own_a, own_b) < 0:
        raise DataError(
            f"CKNNA is not defined here: a masked HSIC with itself is {min(own_a, own_b):g}; take a larger k"
        )
    return _ratio(in_a.both(in_b), own_a, own_b, eps)


def svcca(a: torch.Tensor, b: torch.Tensor, directions: int = 10) -> float:
    """Returns the mean canonical correlation of the leading singular directions, in [0, 1] (Raghu et al., 2017).

    Columns are standardised, constant ones left out; the singular vectors are exact and the correlations are the
    cosines of the principal angles between their spans. Codes that approximate either give a result that changes from
    call to call.

    Args:
        a: Features (N, D).
        b: Features (N, E) of the same samples.
        directions: Of each, at most its rank.

    Raises:
        DataError: The samples differ in number, values are not finite, or a rank is less than the directions.
    """
    spans = [_leading(name, rows, directions) for name, rows in zip("ab", pair(a, b), strict=True)]
    return torch.linalg.svdvals(spans[0].T @ spans[1]).clamp(max=1).mean().item()


class _Neighbours(NamedTuple):
    """A kernel that is zero but for each sample's neighbours: entries (i, j) in order of `keys`, i N + j."""

    count: int
    keys: torch.Tensor
    products: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, k: int) -> _Neighbours:
        products, columns = nearest(features, k)
        columns, order = columns.sort(1)
        rows = torch.arange(len(features), device=features.device)[:, None]
        return cls(len(features), (rows * len(features) + columns).flatten(), products.gather(1, order).flatten())

    def hsic(self, others: torch.Tensor) -> float:
        """Returns the unbiased HSIC with a kernel of the same entries."""
        n, rows, columns = self.count, self.keys // self.count, self.keys % self.count
        # Inner products are symmetric, so an entry of the transpose is the entry itself, where there is one.
        mutual = (self.products * others)[torch.isin(columns * n + rows, self.keys)].sum()
        down = self.products.new_zeros(n).index_add_(0, columns, self.products)
        across = self.products.new_zeros(n).index_add_(0, rows, others)
        return _unbiased(n, mutual.item(), down.sum().item(), across.sum().item(), (down @ across).item())

    def both(self, other: _Neighbours) -> float:
        """Returns the unbiased HSIC of two kernels that are masked by each other."""
        place = torch.searchsorted(other.keys, self.keys).clamp(max=len(other.keys) - 1)
        shared = other.keys[place] == self.keys
        mine = _Neighbours(self.count, self.keys[shared], self.products[shared])
        return mine.hsic(other.products[place[shared]])


def _hsics(
    a: torch.Tensor, b: torch.Tensor, kernel: Kernel, unbiased: bool, sigma: float
) -> tuple[float, float, float]:
    """Returns HSIC(K, L), HSIC(K, K), HSIC(L, L)."""
    a, b = pair(a, b)
    if kernel not in ("linear", "rbf"):
        raise ConfigError(f"unknown kernel {kernel!r}; known: 'linear', 'rbf'")
    if not sigma > 0:
        raise ConfigError(f"sigma is the width of a kernel, above 0; given: {sigma}")
    if unbiased:
        _check_count(len(a))
    # Neither estimator depends on the mean, which would cost digits.
    a, b = a - a.mean(0), b - b.mean(0)
    rows_a, rows_b, squares = [], [], a.new_zeros(3)
    for rows in torch.arange(len(a), device=a.device).split(max(1, PART // len(a))):
        own, other = (_kernel(x, rows, kernel, sigma) for x in (a, b))
        if unbiased:
            for part in (own, other):
                part[torch.arange(len(rows), device=rows.device), rows] = 0
        squares += torch.stack([(own * other).sum(), own.square().sum(), other.square().sum()])
        rows_a.append(own.sum(1))
        rows_b.append(other.sum(1))
    total_a, total_b = torch.cat(rows_a), torch.cat(rows_b)
    found = []
    for square, x, y in zip(squares, (total_a, total_a, total_b), (total_b, total_a, total_b), strict=True):
        n, sums = len(a), (square.item(), x.sum().item(), y.sum().item(), (x @ y).item())
        found.append(_unbiased(n, *sums) if unbiased else _biased(n, *sums))
    return found[0], found[1], found[2]


def _kernel(x: torch.Tensor, rows: torch.Tensor, kernel: Kernel, sigma: float) -> torch.Tensor:
    if kernel == "linear":
        return x[rows] @ x.T
    return (torch.cdist(x[rows], x).square() / (-2 * sigma**2)).exp()


def _biased(n: int, product: float, sum_a: float, sum_b: float, chained: float) -> float:
    return product + sum_a * sum_b / n**2 - 2 * chained / n


def _unbiased(n: int, product: float, sum_a: float, sum_b: float, chained: float) -> float:
    return (product + sum_a * sum_b / ((n - 1) * (n - 2)) - 2 * chained / (n - 2)) / (n * (n - 3))


def _ratio(cross: float, own_a: float, own_b: float, eps: float) -> float:
    scale = math.sqrt(own_a) * math.sqrt(own_b) + eps
    if not scale:
        raise DataError("one of the features is the same for all samples; there is nothing to compare")
    return cross / scale


def _check_count(count: int) -> None:
    if count < 4:
        raise DataError(f"the unbiased estimator needs 4 samples or more; given: {count}")


def _leading(name: str, rows: torch.Tensor, directions: int) -> torch.Tensor:
    centred = rows - rows.mean(0)
    spread = centred.square().mean(0).sqrt()
    # What rounding leaves of a constant column is no direction.
    varies = spread > 1e-12 * rows.abs().amax(0)
    vectors, values, _ = torch.linalg.svd(centred[:, varies] / spread[varies], full_matrices=False)
    rank = int((values > values.amax() * max(rows.shape) * torch.finfo(values.dtype).eps).sum()) if len(values) else 0
    if not 1 <= directions <= rank:
        raise DataError(
            f"{name} spans {rank} directions over {len(rows)} samples; svcca takes 1 to that; given: {directions}"
        )
    return vectors[:, :directions]
