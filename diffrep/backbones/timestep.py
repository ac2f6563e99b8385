"""The embedding of time that DDPM's descendants share."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def timestep_embedding(time: torch.Tensor, width: int) -> torch.Tensor:
    """Returns [cos | sin] of times at frequencies 1e4^(-i / half), half = width // 2 (Ho et al., 2020).

    Args:
        time: Native times (B,).
        width: Of the embedding; an odd one ends in a zero.

    Returns:
        (B, width) in fp32.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    angles = time.float()[:, None] * torch.exp(-math.log(1e4) * steps / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))
