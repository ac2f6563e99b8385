"""Paths from data to noise: coefficients, slopes and levels at a share of the way, in fp64, for any number of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

# Song et al. (2021), VP: beta(s) = 0.1 + 19.9 s; log signal = -(19.9 / 4) s^2 - (0.1 / 2) s.
VP_BETA_MIN, VP_BETA_SLOPE = 0.1, 19.9


def coefficients(path: str, share: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns signal and noise of x = signal x_0 + noise eps.

    Args:
        path: "linear", "cosine" or "vp"; see `FlowSchedule`.
        share: Share of the way to noise, in [0, 1], of any shape.
    """
    share = np.asarray(share, dtype=np.float64)
    if path == "linear":
        return 1 - share, share
    if path == "cosine":
        return np.cos(np.pi / 2 * share), np.sin(np.pi / 2 * share)
    log_signal = -VP_BETA_SLOPE / 4 * share**2 - VP_BETA_MIN / 2 * share
    return np.exp(log_signal), np.sqrt(-np.expm1(2 * log_signal))


def slopes(path: str, share: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns the derivatives of signal and noise by the share; that of the noise of vp is infinite at the data."""
    signal, noise = coefficients(path, share)
    if path == "linear":
        return -np.ones_like(signal), np.ones_like(noise)
    if path == "cosine":
        return -np.pi / 2 * noise, np.pi / 2 * signal
    slope = -signal * (VP_BETA_SLOPE * np.asarray(share, dtype=np.float64) + VP_BETA_MIN) / 2
    with np.errstate(divide="ignore"):
        return slope, -signal * slope / noise


def share_at(path: str, sigma: ArrayLike) -> np.ndarray:
    """Returns the share of the way at a ratio of noise to signal; above 1 beyond the end of the vp path."""
    sigma = np.asarray(sigma, dtype=np.float64)
    if path == "linear":
        return sigma / (1 + sigma)
    if path == "cosine":
        return 2 / np.pi * np.arctan(sigma)
    # The bound keeps the square finite and lies beyond the end.
    root = np.sqrt(VP_BETA_MIN**2 + 2 * VP_BETA_SLOPE * np.log1p(np.minimum(sigma, 1e100) ** 2))
    return (root - VP_BETA_MIN) / VP_BETA_SLOPE
