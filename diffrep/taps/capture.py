"""Capture of chosen layers in one forward pass that ends after the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from diffrep.errors import LayerError
from diffrep.taps.address import Address
from diffrep.taps.attention import AttentionMaps
from diffrep.taps.outputs import Joined, image_reader, input_stream, joined_block
from diffrep.taps.points import Reading, resolve


class _AllCaptured(Exception):
    """Unwinds the forward pass once every address has been read."""


class Recorder:
    """Hooks that stay on a network, and reads through them; `capture` is the same for one pass.

    Under `torch.compile`, hooks that come after the compilation are silently ignored. So register first, then compile
    the function that returns the features; what lies beyond the deepest layer is not compiled at all:

        recorder = Recorder(network, addresses).register()
        features = torch.compile(lambda x: recorder.run(lambda: network(x)), fullgraph=True)

    Attention maps are for eager passes only. Outside `run` the hooks do nothing.

    Args:
        network: Network to read.
        addresses: What to read; a module that is called several times in one pass is read at its first call.
        detach: Take the tensors out of the graph; else gradients flow through them.

    Raises:
        LayerError: A module does not have the point that an address names.
    """

    def __init__(self, network: nn.Module, addresses: Iterable[Address], detach: bool = True):
        self.detach = detach
        self.addresses = list(dict.fromkeys(addresses))
        self._maps = AttentionMaps(self._keep)
        # Made once, registered as often as wanted: compiled code goes on with the hooks that it was traced with.
        self._hooks = self._make_hooks(network)
        self._handles: list[Any] = []
        self._registered = False  # Dynamo cannot look at handles
        self._eager = any(address.point == "attention" for address in self.addresses)
        self._found: dict[int, torch.Tensor] = {}
        self._inside = False
        self._stop = False

    def register(self) -> Recorder:
        """Puts the hooks on the network; returns the recorder."""
        if not self._registered:
            self._handles, self._registered = [hook() for hook in self._hooks], True
        return self

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._registered = [], False

    def __enter__(self) -> Recorder:
        return self.register()

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def run(self, forward: Callable[[], Any], stop: bool = True) -> dict[Address, torch.Tensor]:
        """Runs `forward` and reads the layers on the way.

        Args:
            forward: Calls the network.
            stop: End the pass as soon as every address has been read.

        Returns:
            A tensor for each address, as from `capture`.

        Raises:
            LayerError: As from `capture`, or the hooks are not registered.
        """
        if not self._registered:
            raise LayerError("the recorder's hooks are not on the network; call register() before run()")
        self._inside, self._stop = True, stop
        try:
            if self._eager:
                with self._maps:
                    forward()
            else:
                forward()
        except _AllCaptured:
            pass
        finally:
            self._inside = False
            found, self._found = self._found, {}
        silent = [str(address) for i, address in enumerate(self.addresses) if i not in found]
        if silent:
            raise LayerError(f"these layers did not run in the forward pass, so nothing was read: {', '.join(silent)}")
        return {address: found[i] for i, address in enumerate(self.addresses)}

    def _make_hooks(self, network: nn.Module) -> list[Callable[[], Any]]:
        joined: dict[str, Joined] = {}
        maps: dict[str, list[tuple[int, Address]]] = {}
        hooks: list[Callable[[], Any]] = []
        for index, address in enumerate(self.addresses):
            reading = resolve(address.module, address.point, network)
            around = joined_block(reading.site.module, network)
            block = None if around is None else joined.setdefault(around, Joined())
            if address.point != "attention":
                hooks.append(self._hook(index, str(address), reading, network, block))
                continue
            if address.module not in maps:
                maps[address.module] = []
                module = network.get_submodule(address.module)
                hooks += self._maps.hooks(address.module, module, maps[address.module], block)
            maps[address.module].append((index, address))
        return [block.hook(network.get_submodule(path)) for path, block in joined.items()] + hooks

    def _hook(
        self, index: int, name: str, reading: Reading, network: nn.Module, joined: Joined | None
    ) -> Callable[[], Any]:
        module = network.get_submodule(reading.site.module)
        image = image_reader(module, name)

        def read(tensor: torch.Tensor) -> None:
            tensor = tensor if joined is None else joined.trim(tensor)
            self._keep(index, tensor if reading.pick is None else reading.pick(tensor))

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._inside:
                read(input_stream(args, kwargs, name))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if self._inside:
                read(image(output))

        if reading.site.at == "input":
            return partial(module.register_forward_pre_hook, before, with_kwargs=True)
        return partial(module.register_forward_hook, after)

    def _keep(self, index: int, tensor: torch.Tensor) -> None:
        if index in self._found:
            return
        self._found[index] = (tensor.detach() if self.detach else tensor).clone()
        if self._stop and len(self._found) == len(self.addresses):
            raise _AllCaptured


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
        A tensor for each address, as the module gave it: maps (B, C, H, W) or tokens (B, N, C); of the image alone
        where a module works on text and image together. Attention maps are (B, N, K), see `AttentionMaps`.

    Raises:
        LayerError: A layer did not run in this pass, its output cannot be resolved, or it has no attention map.
    """
    with Recorder(network, addresses) as recorder:
        return recorder.run(forward, stop)
