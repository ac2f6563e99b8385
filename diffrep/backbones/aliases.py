"""Names that papers give to layers, and the addresses they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffrep.errors import LayerError

if TYPE_CHECKING:
    from diffrep.backbones.backbone import Backbone

# Family -> (form, what it names, where it comes from). What a name means in a network is the network's affair: see
# `Backbone.alias`.
ALIASES: dict[str, tuple[str, str]] = {
    "dift": ("dift.I", "output of up block I: up_blocks.I, or output_blocks.I of ADM (Tang et al., 2023)"),
    "hf": ("hf.I.J", "second convolution of a ResNet, before the skip is added (Luo et al., 2023, Hyperfeatures)"),
    "cleandift": ("cleandift.us1 to us10, cleandift.mid", "Stracke et al. (2025)"),
    "gd": ("gd.1 to gd.37", "blocks of guided-diffusion counted through from 1 (Mukhopadhyay et al., 2023)"),
    "ddae": ("ddae.I", "I-th residual block of the decoder, from 1 (Xiang et al., 2023)"),
    "repa": ("repa.K", "stream after K transformer blocks (Yu et al., 2025)"),
    "odise": ("odise.s5 to odise.s2", "decoder stream before it meets the skip (Xu et al., 2023)"),
}


def expand(layer: str, backbone: Backbone) -> list[str]:
    """Returns the addresses that a layer's name stands for; an address stands for itself.

    Raises:
        LayerError: The name has the form of an alias and this network has no such layer.
    """
    if layer == "blocks":
        return backbone.blocks()
    path, colon, point = layer.partition(":")
    family, dot, rest = path.partition(".")
    if family not in ALIASES or not dot or family in dict(backbone.network.named_children()):
        return [layer]
    address = backbone.alias(family, rest)
    if address is None:
        form, meaning = ALIASES[family]
        raise LayerError(f"alias {layer!r} ({form}: {meaning}) names no layer of {type(backbone.network).__name__}")
    return [address + colon + point]


def pick(names: list[str], index: str, first: int = 0) -> str | None:
    """Returns the member of a list that an alias counts to, from `first`; None beyond its ends."""
    position = int(index) - first if index.isdecimal() else -1
    return names[position] if 0 <= position < len(names) else None
