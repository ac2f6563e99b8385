"""Linear and multi-layer heads on flattened features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.errors import ConfigError, UnknownNameError
from diffrep.heads.head import Head, flatten

Norm = Literal["none", "batch", "layer", "standard"]
NORMS = ("none", "batch", "layer", "standard")


class MLPHead(Head):
    """Class scores of flattened features by linear maps with ReLU between them.

    With norm "none" this is the head of diffssl (Mukhopadhyay et al., 2024), and its state-dict keys, `fcs.0.weight`
    and so on, are the published ones.

    Args:
        dim: Length of the flattened features, after pooling: C * k * k.
        classes: Number of classes.
        hidden: Widths of the hidden layers.
        pool: Side k of the grid that maps are averaged to first; None takes features as they are.
        norm: "none"; "batch", batch norm without affine and with eps 1e-6, as MAE (He et al., 2022) and SODA probe;
            "layer", each sample's features to mean 0 and variance 1, without affine, which the linear map after it
            would absorb; "standard", the buffers `mean` and `std` (dim,), to be set to those of the training samples.

    Raises:
        UnknownNameError: There is no such norm.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        hidden: Sequence[int] = (),
        pool: int | None = None,
        norm: Norm = "none",
    ):
        super().__init__()
        if norm not in NORMS:
            raise UnknownNameError("norm", norm, NORMS)
        self.dim, self.pool, self.kind = dim, pool, norm
        if norm == "standard":
            self.register_buffer("mean", torch.zeros(dim))
            self.register_buffer("std", torch.ones(dim))
        elif norm == "batch":
            self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        widths = [dim, *hidden, classes]
        self.fcs = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns scores (B, classes) for features (B, C, h, w) or (B, D) of any floating type.

        Raises:
            ConfigError: The features have another length, or are no maps and the head pools.
        """
        if self.pool is not None:
            if features.dim() != 4:
                raise ConfigError(f"a head with pool={self.pool} reads maps (B, C, h, w), not {tuple(features.shape)}")
            features = F.adaptive_avg_pool2d(features.float(), self.pool)
        x = self._normed(flatten(features, self.dim))
        for layer in self.fcs[:-1]:
            x = F.relu(layer(x))
        return self.fcs[-1](x)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "standard":
            return (x - self.mean) / self.std
        if self.kind == "layer":
            return F.layer_norm(x, (self.dim,))
        return self.norm(x) if self.kind == "batch" else x


class LinearHead(MLPHead):
    """Class scores as a linear function of flattened features.

    Args:
        dim: Length of the flattened features, after pooling.
        classes: Number of classes.
        pool: As in `MLPHead`.
        norm: As in `MLPHead`; "standard" unless said otherwise.
    """

    def __init__(self, dim: int, classes: int, pool: int | None = None, norm: Norm = "standard"):
        super().__init__(dim, classes, (), pool, norm)

    @classmethod
    def from_fit(cls, mean: torch.Tensor, std: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> LinearHead:
        """Returns a fitted classifier of standardised features as a head, in eval mode.

        Args:
            mean: Of the training samples' features (dim,).
            std: Their standard deviation (dim,).
            weight: (classes, dim).
            bias: (classes,).
        """
        head = cls(len(mean), len(bias), norm="standard")
        head.load_state_dict({"mean": mean, "std": std, "fcs.0.weight": weight, "fcs.0.bias": bias})
        return head.eval()
