"""What is known of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from diffrep.backbones.spatial import is_spatial
from diffrep.taps import Address

if TYPE_CHECKING:
    from diffrep.backbones.backbone import Backbone

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


def list_layers(backbone: Backbone) -> list[Layer]:
    """Returns every module of a network that gives a feature map; see `Backbone.layers`."""
    calls, total = backbone._trace
    network, size = backbone.network, backbone.sample_size
    lists = {path for path, module in network.named_modules() if isinstance(module, CONTAINERS)}
    found = []
    for call in calls:
        shape = None if call.shape is None else backbone._map_shape(call.shape, size, size)
        if shape is None or call.calls > 1 or not is_spatial(network, Address(call.module), len(call.shape)):
            continue
        parts = call.module.split(".")
        depth = sum(".".join(parts[: end + 1]) not in lists for end in range(len(parts)))
        stride = round(size / shape[-1])
        share, here = call.flops / total, call.flops_to_here / total
        found.append(Layer(call.module, call.kind, shape, stride, depth, share, here))
    return found
