"""Ridge classification for several penalties at once."""

from __future__ import annotations

import torch

from diffrep.heads import LinearHead
from diffrep.probe.logistic import one_hot, standardisation


class RidgePath:
    """Fits linear classifiers by least squares, one for each penalty, from one eigendecomposition.

    Minimises |Y - XW|^2 + alpha |W|^2 on standardised features X (N, D) and centred targets Y (N, K) of 0 and 1, with
    alpha = penalty * N * v: v is the mean eigenvalue of the features' covariance, their mean variance, which is 1
    unless some features are constant. So a penalty means the same for any number of samples, and
    `RidgeClassifier(alpha)` of scikit-learn, whose targets are -1 and 1, gives 2 * scores - 1.

    Of the covariance (D, D) and the Gram matrix (N, N) the smaller one is decomposed, in double precision: it costs
    the same for one penalty and for a hundred (Hastie et al., 2009, section 3.4.1).

    Args:
        penalties: Penalties, as a share of the features' mean variance.
    """

    def __init__(self, penalties: tuple[float, ...]):
        self.penalties = penalties

    def fit(self, features: torch.Tensor, labels: torch.Tensor, classes: int) -> RidgePath:
        """Fits on features (N, ...) and labels (N,) int64 below `classes`, or (N, classes) of 0 and 1."""
        x = features.flatten(1).float()
        self.mean, self.std = standardisation(x)
        x = ((x - self.mean) / self.std).double()
        y = one_hot(labels, classes).to(x)
        self.bias = y.mean(0).float()
        y = y - y.mean(0)
        alphas = torch.tensor(self.penalties).to(x) * x.square().sum() / x.shape[1]
        wide = x.shape[1] > len(x)
        values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
        # Rounding leaves the zero eigenvalues of a singular matrix a little below zero.
        shrink = 1 / (values.clamp(min=0) + alphas[:, None])
        projected = vectors.T @ (y if wide else x.T @ y)
        weights = vectors @ (shrink[..., None] * projected)
        self.weights = (x.T @ weights if wide else weights).float()
        return self

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Returns scores (S, N, K) of features (N, ...) for each penalty."""
        x = (features.flatten(1).float() - self.mean) / self.std
        return torch.einsum("nd,sdk->snk", x, self.weights) + self.bias

    def head(self, index: int) -> LinearHead:
        """Returns the classifier of one penalty as a module, in eval mode."""
        return LinearHead.from_fit(self.mean, self.std, self.weights[index].T, self.bias)
