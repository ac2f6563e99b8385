"""Any network as a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffrep.backbones.backbone import Backbone
from diffrep.backbones.codec import Codec
from diffrep.backbones.conditioning import Condition, Conditioner, Unconditional
from diffrep.backbones.folders import load_codec
from diffrep.backbones.layer import CONTAINERS
from diffrep.errors import ConfigError, UnknownNameError
from diffrep.noise import Schedule
from diffrep.taps import Call


class ModuleBackbone(Backbone):
    """A network that diffrep knows nothing of: `Backbone.from_module`.

    Shapes and costs come from a dry run on the meta device, so its forward must put the tensors it makes on the device
    of its input. `ExtractJob(config, backbone)` extracts a data set with it.

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
        codec: Images to network input: a `Codec`, or the folder of an autoencoder; None for a network that takes
            pixels in [-1, 1].
        conditioner: What `cond` means; None for an unconditional network.
        call: How to call it, `call(network, x, time, cond)` with x (B, C, h, w), time (B,) in the schedule's native
            convention and cond a dict of tensors; None calls `network(x, time)`.
        blocks: Addresses that "blocks" stands for; None takes the network's children, and the members of lists.
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
        codec: Codec | str | Path | None = None,
        conditioner: Conditioner | None = None,
        call: Callable[[nn.Module, torch.Tensor, torch.Tensor, Condition], Any] | None = None,
        blocks: Sequence[str] | None = None,
        patch_size: int | None = None,
        name: str | None = None,
    ):
        self._in_channels, self._sample_size = in_channels, sample_size
        self._call, self._patch_size = call, patch_size
        self._blocks = _top_level(module) if blocks is None else list(blocks)
        names = [path for path, _ in module.named_modules() if path]
        unknown = [block for block in self._blocks if block not in names]
        if unknown:
            raise UnknownNameError(f"block of {type(module).__name__}", unknown[0], names)
        if isinstance(codec, (str, Path)):
            weight = next(module.parameters(), torch.empty(0))
            codec = load_codec(Path(codec), weight.device, weight.dtype)
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

    @property
    def patch_size(self) -> int | None:
        """The patch size that was given."""
        return self._patch_size

    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network as it was said to be called."""
        out = network(x, time) if self._call is None else self._call(network, x, time, cond)
        out = getattr(out, "sample", out)
        return out[0] if isinstance(out, tuple) else out

    def _dry_run(self, height: int, width: int, condition: Condition | None = None) -> tuple[list[Call], int]:
        try:
            return super()._dry_run(height, width, condition)
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
            raise ConfigError(
                f"{self.name} does not run on the meta device, which shapes and costs come from ({error}); create "
                "tensors inside forward with device=x.device, and read no values there"
            ) from error


def _top_level(module: nn.Module) -> list[str]:
    names = []
    for name, child in module.named_children():
        inner = [f"{name}.{key}" for key, _ in child.named_children()]
        names += inner if isinstance(child, CONTAINERS) else [name]
    return names
