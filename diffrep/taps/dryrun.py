"""A forward pass on the meta device: which modules run, in what order, with what shapes and FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffrep.errors import LayerError
from diffrep.taps.outputs import Joined, image_reader, joined_block


@dataclass(frozen=True)
class Call:
    """The first call of one module.

    Attributes:
        module: Dotted path.
        kind: Class name.
        shape: Shape of the image stream of its output; None where no one tensor of the output is known to be that.
        flops: FLOPs spent inside the module (2 per multiply-add).
        flops_to_input: FLOPs of the whole pass when the module starts.
        flops_to_here: FLOPs of the whole pass when the module has ended.
        calls: How often the module runs in one pass.
    """

    module: str
    kind: str
    shape: tuple[int, ...] | None
    flops: int
    flops_to_input: int
    flops_to_here: int
    calls: int


def to_meta(network: nn.Module) -> nn.Module:
    """Returns a copy of the network whose parameters and buffers hold no data, at no cost in memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in network.parameters()
    }
    memo.update({id(b): b.to("meta") for b in network.buffers()})
    return copy.deepcopy(network, memo)


def dry_run(network: nn.Module, forward: Callable[[nn.Module], Any]) -> tuple[list[Call], int]:
    """Runs the network on the meta device.

    Args:
        network: Network to examine; it is not changed.
        forward: Calls the given (meta) network on a batch of one.

    Returns:
        Every module that ran, in the order in which they ended, and the FLOPs of the whole pass.
    """
    meta = to_meta(network)
    starts: dict[str, list[int]] = {}
    ended: dict[str, tuple[int, tuple[int, ...] | None, int, int]] = {}
    counter = FlopCounterMode(display=False)

    def begin(name: str) -> None:
        starts.setdefault(name, []).append(counter.get_total_flops())

    def end(name: str, module: nn.Module, output: Any) -> None:
        if name in ended:
            return
        try:
            tensor = image_reader(module, name)(output)
            shape = tuple((joined[around[name]].trim(tensor) if around[name] else tensor).shape)
        except LayerError:
            shape = None
        ended[name] = (len(ended), shape, starts[name][0], counter.get_total_flops())

    around = {name: joined_block(name, meta) for name, _ in meta.named_modules() if name}
    joined = {path: Joined() for path in around.values() if path}
    handles = [block.hook(meta.get_submodule(path))() for path, block in joined.items()]
    for name, module in meta.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
            handles.append(module.register_forward_hook(lambda m, _, out, name=name: end(name, m, out)))
    with counter, torch.no_grad():
        forward(meta)
    for handle in handles:
        handle.remove()
    modules = dict(meta.named_modules())
    calls = [
        Call(name, type(modules[name]).__name__, shape, after - before, before, after, len(starts[name]))
        for name, (_, shape, before, after) in sorted(ended.items(), key=lambda item: item[1][0])
    ]
    return calls, counter.get_total_flops()
