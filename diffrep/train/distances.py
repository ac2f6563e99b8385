"""Distances between a student's features and their targets, and what is done to both before; everything in fp32.

Distances that compare samples with one another see the samples of all processes. Their gradients, averaged over the
processes as DDP does it, are those of one process that has the whole batch.
"""

from __future__ import annotations

import math

import torch
from torch import distributed
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from diffrep.errors import ConfigError

EPS = 1e-6


def cosine(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Returns minus the cosine over channels, averaged over positions and samples: REPA's loss (Yu et al., 2025).

    Args:
        found: Of the student, (B, D, h, w).
        wanted: Of the target, likewise.

    Returns:
        A scalar from -1 (equal directions) to 1.
    """
    return -F.cosine_similarity(found, wanted, dim=1).mean()


def smooth_l1(found: torch.Tensor, wanted: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns the mean of d^2 / (2 beta) where |d| < beta, and of |d| - beta / 2 beyond.

    Args:
        found: Of the student, (B, D, h, w).
        wanted: Of the target, likewise.
        beta: Above 0.
    """
    return F.smooth_l1_loss(found, wanted, beta=beta)


def contrastive(found: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns NT-Xent (Chen et al., 2020) from student to target: the mean of -log softmax_j(cos(s_i, t_j) / tau)_i.

    s and t are means over positions, so grids may differ. The negatives of a sample are the targets of all other
    samples of the batch, on all processes; each process returns the mean over its own samples.

    Args:
        found: Of the student, (B, D, h, w).
        wanted: Of the target, (B, D, h', w'); no gradient goes there.
        temperature: tau.
    """
    student = F.normalize(found.mean((2, 3)), dim=1)
    # A row's loss is its own process's, so the targets can be gathered without a way back.
    target = F.normalize(wanted.detach().mean((2, 3)), dim=1)
    own = torch.arange(len(student), device=student.device) + _rank() * len(student)
    return F.cross_entropy(student @ gathered(target).T / temperature, own)


def dispersive(found: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns log mean_ij exp(-||z_i - z_j||^2 / (n tau)) over all pairs, i = j too (Wang and He, 2025).

    z are the samples' features as vectors of n = D h w numbers, from all processes; each returns the same number.

    Args:
        found: Of the student, (B, D, h, w).
        temperature: tau.

    Returns:
        A scalar from -log B (far apart) to 0 (all equal).
    """
    z = gathered(found.flatten(1))
    count, size = z.shape
    # Distances stay as they are without the common mean, and |a|^2 + |b|^2 - 2 ab then loses fewer digits. The form
    # that is exact, pdist, takes B^2 n numbers for its gradient on a GPU.
    z = z - z.mean(0).detach()
    powers = z.square().sum(1)
    squared = (powers[:, None] + powers - 2 * z @ z.T).clamp(min=0)
    squared = squared.masked_fill(torch.eye(count, dtype=torch.bool, device=z.device), 0)
    return (-squared / (size * temperature)).flatten().logsumexp(0) - 2 * math.log(count)


def manifold(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Returns the mean over all pairs of samples of (s_ij - t_ij)^2: U-REPA's manifold loss (Tian et al., 2025).

    s_ij is the cosine over channels between samples i and j at the same position, averaged over positions, t_ij the
    same of the targets. So samples are to be as alike as their targets are, whatever the directions in either space,
    and the widths may differ. The samples of all processes are compared; each returns the same number. Its authors
    add three times this to the cosine of each position.

    Args:
        found: Of the student, (B, C, h, w).
        wanted: Of the target, (B, D, h, w); no gradient goes there.

    Returns:
        A scalar from 0 (as alike) to 4.
    """
    alike = []
    for features in (found, wanted.detach()):
        rows = gathered(F.normalize(features, dim=1).flatten(1))
        alike.append(rows @ rows.T / features[0, 0].numel())
    return F.mse_loss(*alike)


def gathered(features: torch.Tensor) -> torch.Tensor:
    """Returns the rows (B, n) of all processes one after another, with gradients from all of them."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return features
    return torch.cat(all_gather(features))


def standardised(target: torch.Tensor, alpha: float) -> torch.Tensor:
    """Returns (z - alpha mean) / (std + 1e-6), mean and unbiased std over the positions of each sample and channel.

    iREPA's spatial normalisation (Singh et al., 2025): less of what all positions share.

    Args:
        target: (B, D, h, w).
        alpha: Share of the mean that is taken away.

    Raises:
        ConfigError: There is only one position.
    """
    height, width = target.shape[-2:]
    if height * width == 1:
        raise ConfigError("transform 'spatial' compares positions, and the targets have only one; use transform: none")
    spread, mean = torch.std_mean(target, dim=(2, 3), keepdim=True)
    return (target - alpha * mean) / (spread + EPS)


def resized(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Brings a map to another grid: averages of areas where a side shrinks, bilinear where it grows.

    Args:
        features: (B, D, h, w).
        size: The grid (h', w'); bilinear without aligned corners, as images are resized.
    """
    shrunk = tuple(map(min, features.shape[-2:], size))
    if shrunk != tuple(features.shape[-2:]):
        features = F.adaptive_avg_pool2d(features, shrunk)
    if shrunk == tuple(size):
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0
