"""A convolutional head."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.heads.head import Head


class ConvHead(Head):
    """Class scores of a map by four convolutions: Diff-C of Revelio (Kim et al., 2025).

    Batch norm without affine; four times 3x3 convolution, batch norm, ReLU and dropout of whole channels, all but the
    first with stride 2; mean over the cells, dropout, a linear map. Maps may have any size. State-dict keys are the
    published ones: `input_bn`, `conv1` to `conv4`, `bn1` to `bn4`, `fc`.

    Args:
        channels: Channels of the map.
        classes: Number of classes.
        width: Channels inside the head.
        dropout: Dropout after each convolution and before the linear map.
    """

    def __init__(self, channels: int, classes: int, width: int = 1024, dropout: float = 0.5):
        super().__init__()
        self.dropout = dropout
        self.input_bn = nn.BatchNorm2d(channels, affine=False)
        for index in range(1, 5):
            first = index == 1
            convolution = nn.Conv2d(channels if first else width, width, 3, stride=1 if first else 2, padding=1)
            self.add_module(f"conv{index}", convolution)
            self.add_module(f"bn{index}", nn.BatchNorm2d(width))
        self.fc = nn.Linear(width, classes)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Returns scores (B, classes) for maps (B, channels, h, w) of any floating type."""
        x = self.input_bn(maps.float())
        stages = (
            (self.conv1, self.bn1),
            (self.conv2, self.bn2),
            (self.conv3, self.bn3),
            (self.conv4, self.bn4),
        )
        for convolution, norm in stages:
            x = F.dropout2d(F.relu(norm(convolution(x))), self.dropout, self.training)
        return self.fc(F.dropout(x.mean((2, 3)), self.dropout, self.training))
