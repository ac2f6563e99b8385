"""Capture of chosen layers in one forward pass that ends after the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from diffrep.errors import LayerError
from diffrep.taps.address import Address
from diffrep.taps.outputs import image_stream, input_stream


class _AllCaptured(Exception):
    """Unwinds the forward pass once every address has been read."""


def capture(
    network: nn.Module, addresses: Iterable[Address], forward: Callable[[], Any], stop: bool = True
) -> dict[Address, torch.Tensor]:
    """Runs `forward` and reads layers on the way.

    The tensors are detached copies: some networks (EDM, FreeU) go on editing the hooked tensor in place.

    Args:
        network: Module that `forward` runs.
        addresses: What to read; a module that is called several times in one pass is read at its first call.
        forward: Calls the network.
        stop: End the pass as soon as every address has been read.

    Returns:
        A tensor for each address, as the module gave it: maps (B, C, H, W) or tokens (B, N, C).

    Raises:
        LayerError: A layer did not run in this pass, or its output cannot be resolved.
    """
    wanted = list(dict.fromkeys(addresses))
    found: dict[Address, torch.Tensor] = {}

    def keep(address: Address, tensor: torch.Tensor) -> None:
        if address in found:
            return
        found[address] = tensor.detach().clone()
        if stop and len(found) == len(wanted):
            raise _AllCaptured

    handles = [_hook(network.get_submodule(address.module), address, keep) for address in wanted]
    try:
        forward()
    except _AllCaptured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    silent = [str(address) for address in wanted if address not in found]
    if silent:
        raise LayerError(f"these layers did not run in the forward pass, so nothing was read: {', '.join(silent)}")
    return {address: found[address] for address in wanted}


def _hook(module: nn.Module, address: Address, keep: Callable[[Address, torch.Tensor], None]) -> Any:
    if address.point == "input":
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(address, input_stream(args, kwargs, str(address))), with_kwargs=True
        )
    return module.register_forward_hook(
        lambda module, _, output: keep(address, image_stream(module, output, str(address)))
    )
