"""The linear head: standardise, then one linear map."""

from __future__ import annotations

import torch
from torch import nn


class LinearHead(nn.Module):
    """Class scores as a linear function of flattened features.

    Args:
        dim: Length of the flattened features.
        classes: Number of classes.

    The buffers `mean` and `std` (dim,) standardise the features; they are those of the training samples.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.linear = nn.Linear(dim, classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns scores (B, classes) for features (B, ...)."""
        return self.linear((features.flatten(1).float() - self.mean) / self.std)
