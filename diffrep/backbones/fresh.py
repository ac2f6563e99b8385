"""Networks to be trained: new ones, and copies of frozen ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffrep.backbones import folders
from diffrep.backbones.backbone import Backbone
from diffrep.backbones.opening import DIFFUSERS, OFFICIAL
from diffrep.errors import UnknownNameError
from diffrep.noise import Schedule
from diffrep.taps import to_meta


def new_network(kind: str, args: Mapping[str, Any] | str) -> tuple[nn.Module, type[Backbone]]:
    """Builds a network with fresh weights, drawn from torch's global generator.

    Args:
        kind: A family of official checkpoints, or a class of diffusers.
        args: What `load_backbone` takes as config, or the class's arguments.

    Returns:
        The network, and the class that reads it.

    Raises:
        UnknownNameError: There is no such kind.
        ConfigError: The arguments do not fit.
    """
    if kind in OFFICIAL:
        return OFFICIAL[kind].build(args, None), OFFICIAL[kind]
    adapters = {adapter.diffusers_class: adapter for adapter in DIFFUSERS.values()}
    if kind not in adapters:
        raise UnknownNameError("kind of network", kind, [*OFFICIAL, *adapters])
    return folders.build(kind, args), adapters[kind]


def template_of(network: nn.Module, adapter: type[Backbone], schedule: Schedule, name: str) -> Backbone:
    """Returns a backbone on the meta device that says how a network is called; the network itself stays as it is.

    Args:
        network: The network.
        adapter: The class that reads it.
        schedule: What it is trained with.
        name: What it is called.
    """
    return adapter(name, to_meta(network), schedule, None, adapter.conditioner_of(network))


def with_network(backbone: Backbone, network: nn.Module) -> Backbone:
    """Returns a backbone like another one around another network of the same form, which is frozen."""
    twin = copy.copy(backbone)
    twin.network = network.requires_grad_(False).eval()
    twin.__dict__.pop("weights_hash", None)  # of the other's weights
    twin._functions = {}
    return twin


def trainable(network: nn.Module) -> nn.Module:
    """Returns a copy of a frozen network to train, in eval mode; fixed tables of official networks stay fixed."""
    student = copy.deepcopy(network).requires_grad_(True).eval()
    if hasattr(network, "arguments"):
        with torch.device("meta"):
            fresh = type(network)(**network.arguments)
        for weight, published in zip(student.parameters(), fresh.parameters(), strict=True):
            weight.requires_grad_(published.requires_grad)
    return student
