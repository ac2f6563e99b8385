"""Print a backbone's layers in execution order, from its config alone where that is enough.

Examples:
  diffrep layers fashion-unet
  diffrep layers path/to/pipeline --depth 2
  diffrep layers owner/name --all
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffrep.backbones import Backbone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("source", help="bundled name, diffusers folder, or hub id")
    parser.add_argument("--depth", type=int, default=2, help="how deep inside blocks to look (default: 2)")
    parser.add_argument("--all", action="store_true", help="every layer that gives a feature map")


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    from diffrep import load_backbone

    backbone = load_backbone(arguments.source, device="meta")
    print(layer_table(backbone, None if arguments.all else arguments.depth))


def layer_table(backbone: Backbone, depth: int | None) -> str:
    """Returns the table of a backbone's layers down to a depth; None shows all."""
    layers = [layer for layer in backbone.layers() if depth is None or layer.depth <= depth]
    width = max(len(layer.name) for layer in layers)
    kind = max(len(layer.kind) for layer in layers)
    lines = [f"{'name':{width}}  {'kind':{kind}}  {'shape':>14}  {'stride':>6}  {'FLOPs':>6}  {'to here':>7}"]
    for layer in layers:
        shape = "x".join(map(str, layer.shape))
        lines.append(
            f"{layer.name:{width}}  {layer.kind:{kind}}  {shape:>14}  {layer.stride:>6}  {layer.flops_share:>6.1%}  "
            f"{layer.flops_to_here:>7.1%}"
        )
    return "\n".join(lines)
