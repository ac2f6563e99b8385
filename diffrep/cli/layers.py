"""Print a backbone's layers in execution order, from its config alone: no weights are read.

Examples:
  diffrep layers fashion-unet
  diffrep layers sdxl --depth 1
  diffrep layers path/to/pipeline --all
  diffrep layers DiT-XL-2-512x512.pt --family dit --config XL/2
  diffrep layers sd15 --levels 261 sigma=0.7 "step 4/18"
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffrep.backbones import Backbone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument("source", help="name ('diffrep ls backbones'), diffusers folder, hub id, or file of weights")
    parser.add_argument("--family", help="of a file of weights: dit, sit, repa, adm, edm, or a diffusers class")
    parser.add_argument("--config", help="of a file of weights: a variant such as XL/2, or a JSON file of arguments")
    parser.add_argument("--depth", type=_positive, default=2, help="how deep inside blocks to look (default: 2)")
    parser.add_argument("--all", action="store_true", help="every layer that gives a feature map")
    parser.add_argument("--levels", nargs="+", metavar="LEVEL", help="print noise levels in place of layers")


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    from diffrep import load_backbone
    from diffrep.noise import DiscreteSchedule

    # Layers do not depend on the schedule, so a network without one will do.
    schedule = None if arguments.levels else DiscreteSchedule.linear()
    config = {"family": arguments.family, "config": arguments.config}
    backbone = load_backbone(arguments.source, **config, schedule=schedule, device="meta")
    if arguments.levels:
        print(level_table(backbone, arguments.levels))
        return
    print(summary(backbone))
    print(layer_table(backbone, None if arguments.all else arguments.depth))


def summary(backbone: Backbone) -> str:
    """Returns a line on the network: class, parameters, what it takes."""
    millions = sum(parameter.numel() for parameter in backbone.network.parameters()) / 1e6
    x = f"{backbone.in_channels}x{backbone.sample_size}x{backbone.sample_size}"
    parts = [type(backbone.network).__name__, f"{millions:,.1f} M parameters", f"input {x}"]
    if backbone.codec.downscale > 1:
        parts.append(f"images of {backbone.image_size} px through {backbone.codec.describe()['kind']}")
    rows = [f"{name} {tuple(row.shape[1:])}" for name, row in backbone.conditioner.example().items()]
    return f"{backbone.name}: " + ", ".join(parts + ([f"cond {', '.join(rows)}"] if rows else []))


def layer_table(backbone: Backbone, depth: int | None) -> str:
    """Returns the table of a backbone's layers down to a depth; None shows all."""
    layers = backbone.layers()
    top = min(layer.depth for layer in layers)
    layers = [layer for layer in layers if depth is None or layer.depth < top + depth]
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


def level_table(backbone: Backbone, specs: list[str]) -> str:
    """Returns what each level means in this backbone: the time that is passed, and the mixture."""
    lines = [f"{'spec':16} {'key':18} {'time passed':>14} {'signal':>9} {'noise':>9} {'sigma':>9}"]
    for spec in specs:
        level = backbone.schedule.level(spec)
        lines.append(
            f"{spec:16} {level.key:18} {level.time:>14.9g} {level.signal:>9.5g} {level.noise:>9.5g} "
            f"{level.sigma:>9.5g}"
        )
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)
