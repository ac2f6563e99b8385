"""Capture as one compiled graph."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

from diffrep.taps import Address, Recorder

if TYPE_CHECKING:
    from diffrep.backbones.backbone import Backbone
    from diffrep.backbones.conditioning import Condition


class CompiledCapture:
    """The function from a network's arguments to the features of chosen layers, compiled as one graph.

    torch.compile ignores hooks that come after it, so they are in place before the first call; and because it does not
    look at hooks again, other captures of the same network are not disturbed once they are gone.
    """

    def __init__(self, backbone: Backbone, addresses: tuple[Address, ...], compiler: str):
        self.recorder = Recorder(backbone.network, addresses)

        def features(x: torch.Tensor, time: torch.Tensor, cond: Condition) -> dict[Address, torch.Tensor]:
            return self.recorder.run(lambda: backbone.call(backbone.network, x, time, cond))

        # torch counts recompilations for each code object; without one of its own, the ninth set of layers would fail.
        own = types.FunctionType(features.__code__.replace(), globals(), "features", None, features.__closure__)
        self.function = torch.compile(own, fullgraph=True, backend=compiler)

    def __call__(self, *arguments: Any) -> dict[Address, torch.Tensor]:
        """Returns the features for x, time and condition, as `Backbone.call` takes them."""
        x, time, cond = arguments
        for rows in (x, time, *cond.values()):
            if len(rows) > 1:  # the last batch of a unit is smaller, and would be compiled anew
                torch._dynamo.maybe_mark_dynamic(rows, 0)
        with self.recorder:
            return self.function(*arguments)
