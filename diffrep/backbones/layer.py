"""What is known of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

# Modules that hold others and are never called.
CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Layer:
    """One module whose output is a feature map, measured in a dry run.

    Attributes:
        name: Address of the output.
        kind: Class of the module.
        shape: (C, H, W) of its feature map at the network's native input size.
        stride: Cells of the network's input per cell of the map, along one side.
        depth: Modules on its path, itself included, lists not counted; 1 for a top-level block.
        flops_share: FLOPs inside the module over those of the whole network.
        flops_to_here: FLOPs until it has ended over those of the whole network: what an early exit costs.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    stride: int
    depth: int
    flops_share: float
    flops_to_here: float
