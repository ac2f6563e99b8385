"""Layer addresses: a dotted module path, and the point of the module that is read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from diffrep.errors import LayerError, suggest

POINTS = ("output", "input")


@dataclass(frozen=True)
class Address:
    """Where to look.

    Attributes:
        module: Dotted path from the network's root, such as "up_blocks.1.resnets.0".
        point: "output", or "input": the tensor the module is called with.
    """

    module: str
    point: str = "output"

    def __str__(self) -> str:
        return self.module if self.point == "output" else f"{self.module}:{self.point}"


def parse_address(text: str, network: nn.Module) -> Address:
    """Reads an address and checks that the network has it.

    Raises:
        LayerError: No such module or point; the message has the closest names.
    """
    path, colon, point = text.partition(":")
    point = point if colon else "output"
    if point not in POINTS:
        raise LayerError(f"layer {text!r}: unknown point {point!r}; points are {', '.join(POINTS)}")
    names = [name for name, _ in network.named_modules() if name]
    if path not in names:
        raise LayerError(
            f"no layer {path!r} in {type(network).__name__}; {suggest(path, names)} 'diffrep layers' lists them"
        )
    if isinstance(network.get_submodule(path), nn.ModuleList):
        first = next((name for name in names if name.startswith(path + ".")), path)
        raise LayerError(f"layer {path!r} is a list of modules and is never called; name a member, such as {first!r}")
    return Address(path, point)
