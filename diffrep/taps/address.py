"""Layer addresses: a dotted module path, and the point of the module that is read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from diffrep.errors import LayerError, suggest
from diffrep.taps.points import POINTS, Site, resolve


@dataclass(frozen=True)
class Address:
    """Where to look.

    Attributes:
        module: Dotted path from the network's root, such as "up_blocks.1.resnets.0".
        point: "output"; "input", the tensor the module is called with; "q", "k", "v" or "attention" of an attention
            module; "adaln" of a block with an adaptive layer norm. See `diffrep.taps.points.resolve`.
        tokens: Of the point "attention": indices of the key tokens whose weights are read; empty reads all.

    Raises:
        LayerError: The point does not exist, or `tokens` are repeated, negative, or given for another point.
    """

    module: str
    point: str = "output"
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise LayerError(f"layer {str(self)!r}: unknown point {self.point!r}; points are {', '.join(POINTS)}")
        if self.tokens and self.point != "attention":
            raise LayerError(f"layer {str(self)!r}: only the point 'attention' takes tokens, as in ':attention[1,4]'")
        if len(set(self.tokens)) < len(self.tokens) or any(token < 0 for token in self.tokens):
            raise LayerError(f"layer {str(self)!r}: token indices count from 0, each named once")

    def __str__(self) -> str:
        tokens = f"[{','.join(map(str, self.tokens))}]" if self.tokens else ""
        return self.module if self.point == "output" else f"{self.module}:{self.point}{tokens}"


def parse_address(text: str, network: nn.Module) -> Address:
    """Reads an address, `path`, `path:point` or `path:attention[1,4]`, and checks that the network has it.

    Raises:
        LayerError: No such module or point; the message has the closest names.
    """
    path, colon, point = text.partition(":")
    address = _parse_point(text, path, point) if colon else Address(path)
    try:
        module = network.get_submodule(path) if path else None
    except AttributeError:
        module = None
    if module is None:
        # Names are listed for the message alone: a large U-Net has thousands, and a request may hold 100 addresses.
        names = [name for name, _ in network.named_modules() if name]
        raise LayerError(
            f"no layer {path!r} in {type(network).__name__}; {suggest(path, names)} 'diffrep layers' lists them"
        )
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        first = next((f"{path}.{name}" for name, _ in module.named_children()), path)
        raise LayerError(f"layer {path!r} is a list of modules and is never called; name a member, such as {first!r}")
    resolve(path, address.point, network)
    return address


def site_of(address: Address, network: nn.Module) -> Site:
    """Returns which end of which module's call an address is read at; what a pass costs up to it follows from that.

    `blocks.8.attn:q` is read at the output of `blocks.8.attn.to_q` or `.qkv`, `blocks.8:adaln` at the input of
    `blocks.8.attn`, and `:attention`, which passes inside the module, counts as the module's output.

    Raises:
        LayerError: The module does not have the point.
    """
    return resolve(address.module, address.point, network).site


def _parse_point(text: str, path: str, point: str) -> Address:
    name, bracket, rest = point.partition("[")
    if not bracket:
        return Address(path, name)
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*\]", rest):
        raise LayerError(f"layer {text!r}: tokens are indices between brackets, such as '{path}:attention[1,4]'")
    return Address(path, name, tuple(int(token) for token in rest[:-1].split(",")))
