"""Any network as a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from diffrep.backbones.backbone import Backbone
from diffrep.backbones.codec import Codec, IdentityCodec
from diffrep.backbones.conditioning import Condition, Conditioner, Unconditional
from diffrep.errors import UnknownNameError
from diffrep.noise import Schedule


class ModuleBackbone(Backbone):
    """A network that diffrep knows nothing of: `Backbone.from_module`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from diffrep import Backbone, FeatureRequest
        >>> from diffrep.noise import FlowSchedule
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.down = nn.Conv2d(3, 8, 4, stride=4)
        ...         self.up = nn.ConvTranspose2d(8, 3, 4, stride=4)
        ...
        ...     def forward(self, x, time):
        ...         return self.up(self.down(x) * time[:, None, None, None])
        >>> backbone = Backbone.from_module(Net(), FlowSchedule(), in_channels=3, sample_size=32)
        >>> features = backbone.extract(torch.rand(2, 3, 32, 32), FeatureRequest("down", ["sigma=0.5"]))
        >>> features["down", "sigma=0.5"].shape
        torch.Size([2, 8, 8, 8])

    Args:
        module: The network; frozen from here on.
        schedule: Its noise levels, such as `DiscreteSchedule.linear()`, `FlowSchedule()` or `SigmaSchedule()`.
        in_channels: Channels of its input.
        sample_size: Native side of its input.
        codec: Images to network input; None for a network that takes pixels in [-1, 1].
        conditioner: What `cond` means; None for an unconditional network.
        call: How to call it, `call(network, x, time, cond)` with x (B, C, h, w), time (B,) in the schedule's native
            convention and cond a dict of tensors; None calls `network(x, time)`.
        blocks: Addresses that "blocks" stands for; None takes the network's children.
        patch_size: Input cells per token along one side, for networks whose layers give tokens (B, N, C).
        name: Stored with the features.

    Raises:
        ConfigError: A block does not exist, or codec and network do not fit.
    """

    def __init__(
        self,
        module: nn.Module,
        schedule: Schedule,
        *,
        in_channels: int,
        sample_size: int,
        codec: Codec | None = None,
        conditioner: Conditioner | None = None,
        call: Callable[[nn.Module, torch.Tensor, torch.Tensor, Condition], Any] | None = None,
        blocks: Sequence[str] | None = None,
        patch_size: int | None = None,
        name: str | None = None,
    ):
        self._in_channels, self._sample_size = in_channels, sample_size
        self._call, self._patch_size = call, patch_size
        self._blocks = [child for child, _ in module.named_children()] if blocks is None else list(blocks)
        names = [path for path, _ in module.named_modules() if path]
        unknown = [block for block in self._blocks if block not in names]
        if unknown:
            raise UnknownNameError(f"block of {type(module).__name__}", unknown[0], names)
        codec = codec or IdentityCodec(in_channels)
        super().__init__(name or type(module).__name__, module, schedule, codec, conditioner or Unconditional())

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self._in_channels

    @property
    def sample_size(self) -> int:
        """Native side of the network's input."""
        return self._sample_size

    def blocks(self) -> list[str]:
        """Returns the blocks that were named, or the network's children."""
        return self._blocks

    def grid(self, tokens: int, height: int, width: int) -> tuple[int, int] | None:
        """Returns the patch grid, or the grid of a halved input where no patch size was given."""
        if self._patch_size is None:
            return super().grid(tokens, height, width)
        rows, columns = height // self._patch_size, width // self._patch_size
        return (rows, columns) if rows * columns == tokens else None

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network as it was said to be called."""
        out = network(x, time) if self._call is None else self._call(network, x, time, cond)
        out = getattr(out, "sample", out)
        return out[0] if isinstance(out, tuple) else out
