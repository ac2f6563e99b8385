"""The Frechet distance between two sets of images, told by features of any encoder (Heusel et al., 2017).

Published FID takes Inception's pooled features of 50,000 images. With other features or fewer images, numbers compare
with each other only: an estimate from N samples is too great by an amount that grows with the width over N.
"""

from __future__ import annotations

import torch

from diffrep.errors import DataError


class FeatureStatistics:
    """Count, mean and scatter of features, kept in fp64 and taken in a batch at a time.

    Batches and parts are joined by the update of Chan et al. (1979), which never subtracts large sums; how samples are
    cut into batches changes rounding only.

    Args:
        width: D.
        device: Where the statistics lie.

    Attributes:
        count: Samples so far.
        mean: (D,).
        scatter: Sum of (x - mean)(x - mean)^T, (D, D).
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    @property
    def covariance(self) -> torch.Tensor:
        """The covariance (D, D), over count - 1.

        Raises:
            DataError: There are fewer than two samples.
        """
        if self.count < 2:
            raise DataError(f"a covariance needs two samples or more; given: {self.count}")
        return self.scatter / (self.count - 1)

    def add(self, features: torch.Tensor) -> None:
        """Takes in features (B, D).

        Raises:
            DataError: The width is another, or values are not finite.
        """
        width = len(self.mean)
        if features.ndim != 2 or features.shape[1] != width:
            raise DataError(f"these statistics are of features (B, {width}); given: {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise DataError("the features hold NaN or infinity")
        if len(features):
            features = features.to(self.mean.device, torch.float64)
            mean = features.mean(0)
            centred = features - mean
            self._join(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Takes in the samples of other statistics, such as another process's.

        Raises:
            DataError: The width is another.
        """
        if len(other.mean) != len(self.mean):
            raise DataError(f"statistics of width {len(other.mean)} do not go with those of width {len(self.mean)}")
        if other.count:
            self._join(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns `count`, `mean` and `scatter` as fp64 tensors, which can be gathered over processes or saved."""
        count = torch.tensor(self.count, dtype=torch.float64, device=self.mean.device)
        return {"count": count, "mean": self.mean.clone(), "scatter": self.scatter.clone()}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> FeatureStatistics:
        """Returns the statistics that `state_dict` wrote, on the tensors' device."""
        statistics = cls(len(state["mean"]), state["mean"].device)
        statistics.count = int(state["count"])
        statistics.mean, statistics.scatter = state["mean"].double().clone(), state["scatter"].double().clone()
        return statistics

    def _join(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total, shift = self.count + count, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Returns |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a^1/2 S_b S_a^1/2)^1/2), in the features' unit squared.

    With factors S = F F^T from the eigenvectors, the last trace is the sum of the singular values of F_a^T F_b. No
    root is taken of eigenvalues that are rounding, which are dropped: fewer samples than features will do, and equal
    statistics are at distance 0 to fp64 precision.

    Args:
        a: Statistics.
        b: Statistics of features of the same encoder.

    Raises:
        DataError: The widths differ, or one has fewer than two samples.
    """
    if len(a.mean) != len(b.mean):
        raise DataError(
            f"features of width {len(a.mean)} and {len(b.mean)} are of two encoders; a distance needs the same one"
        )
    first, second = _factor(a.covariance), _factor(b.covariance.to(a.mean.device))
    shift = (a.mean - b.mean.to(a.mean.device)).square().sum()
    overlap = torch.linalg.svdvals(first.T @ second).sum()
    return max((shift + first.square().sum() + second.square().sum() - 2 * overlap).item(), 0.0)


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """Returns F (D, rank) with F F^T the covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
