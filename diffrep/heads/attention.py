"""An attention-pooled head for feature maps."""

from __future__ import annotations

import torch
from torch import nn


class AttentionPool(nn.Module):
    """Reads a feature map with a small transformer through one class token.

    Batch norm without affine, a 1x1 projection to `width`, learned positions, pre-norm transformer blocks over the
    cells and a class token, layer norm, a linear map of the class token. diffssl (Mukhopadhyay et al., 2024)
    introduced such a head for diffusion features; its exact form with its state-dict keys is not this one.

    Args:
        channels: Channels of the map.
        size: (h, w) of the map.
        classes: Number of classes.
        width: Token width.
        depth: Transformer blocks.
        heads: Attention heads; divides `width`.
        dropout: Dropout in the blocks.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        classes: int,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.project = nn.Conv2d(channels, width, 1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, size[0] * size[1], width))
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.classify = nn.Linear(width, classes)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Returns scores (B, classes) for maps (B, channels, h, w)."""
        tokens = self.project(self.norm(maps.float())).flatten(2).transpose(1, 2) + self.positions
        tokens = torch.cat([self.query.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.classify(self.blocks(tokens)[:, 0])
