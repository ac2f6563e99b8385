"""The contract of a frozen backbone: a network, its codec, its conditioner and its noise schedule."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffrep.backbones.codec import Codec
from diffrep.backbones.conditioning import Conditioner
from diffrep.config import FeatureRequest
from diffrep.errors import ConfigError, LayerError
from diffrep.noise import Schedule
from diffrep.taps import Address, Call, capture, dry_run, parse_address, to_meta

if TYPE_CHECKING:
    from diffrep.extract import Features


@dataclass(frozen=True)
class Layer:
    """One module whose output is a feature map, measured in a dry run.

    Attributes:
        name: Address of the output.
        kind: Class of the module.
        shape: (C, H, W) of its feature map at the network's native input size.
        stride: Cells of the network's input per cell of the map, along one side.
        depth: How many named modules it lies inside, lists not counted; 1 for a top-level block.
        flops_share: FLOPs inside the module over those of the whole network.
        flops_to_here: FLOPs until it has ended over those of the whole network: what an early exit costs.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    stride: int
    depth: int
    flops_share: float
    flops_to_here: float


class Backbone(ABC):
    """A frozen diffusion network that can be read.

    Subclasses say how their network is called and which blocks it has. Construction freezes the network
    (`requires_grad_(False)`, eval).

    Args:
        name: What the user called it; stored with the features.
        network: The network.
        schedule: Its noise schedule.
        codec: Images to network input.
        conditioner: What stands for the condition.
    """

    def __init__(self, name: str, network: nn.Module, schedule: Schedule, codec: Codec, conditioner: Conditioner):
        self.name = name
        self.network = network.requires_grad_(False).eval()
        self.schedule = schedule
        self.codec = codec
        self.conditioner = conditioner
        self._parsed: dict[tuple[str, ...], dict[str, Address]] = {}
        if codec.module() is not None:
            codec.module().requires_grad_(False).eval()
        if codec.latent_channels != self.in_channels:
            raise ConfigError(
                f"{name}: the codec gives {codec.latent_channels} channels, the network takes {self.in_channels}; "
                "load the network with the codec it was trained with"
            )

    # What a family says -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Channels of the network's input."""

    @property
    @abstractmethod
    def sample_size(self) -> int:
        """Native side of the network's input."""

    @abstractmethod
    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """Calls the network (or its meta copy) and returns its raw output."""

    @abstractmethod
    def blocks(self) -> list[str]:
        """Returns the addresses of the top-level blocks, in execution order: the alias "blocks"."""

    def grid(self, tokens: int, height: int, width: int) -> tuple[int, int] | None:
        """Returns the (h, w) grid of a token sequence for an input of (height, width), or None when it is not one.

        Here, for U-Nets: the input halved, rounding up, as often as it takes.
        """
        while height * width > tokens and height * width > 1:
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        return (height, width) if height * width == tokens else None

    # What a user calls --------------------------------------------------------------------------------------------

    @property
    def image_channels(self) -> int:
        """Channels of the images, 1 or 3."""
        return self.codec.image_channels

    @property
    def image_size(self) -> int:
        """Native side of the images, in pixels."""
        return self.sample_size * self.codec.downscale

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the network's weights."""
        return next(self.network.parameters()).dtype

    def layers(self) -> list[Layer]:
        """Returns every module that gives a feature map, in execution order, from a dry run on the meta device.

        Modules that run several times in one pass (shared activations) are left out.
        """
        calls, total = self._trace
        size = self.sample_size
        found = []
        for call in calls:
            shape = None if call.shape is None else self._map_shape(call.shape, size, size)
            if shape is not None and len(call.shape) == 3 and not self._gives_tokens(call.module):
                continue
            if shape is None or call.calls > 1:
                continue
            depth = sum(not part.isdigit() for part in call.module.split("."))
            stride = round(size / shape[-1])
            share, here = call.flops / total, call.flops_to_here / total
            found.append(Layer(call.module, call.kind, shape, stride, depth, share, here))
        return found

    def addresses(self, layers: Iterable[str]) -> dict[str, Address]:
        """Expands aliases and checks addresses.

        Raises:
            LayerError: An address does not exist, or its module does not run exactly once in a pass.
        """
        key = tuple(layers)
        if key not in self._parsed:
            names = [name for layer in key for name in (self.blocks() if layer == "blocks" else [layer])]
            found = {name: parse_address(name, self.network) for name in names}
            calls = {call.module: call.calls for call in self._trace[0]}
            for name, address in found.items():
                if calls.get(address.module, 0) != 1:
                    raise LayerError(
                        f"layer {name!r} runs {calls.get(address.module, 0)} times in one pass, so its feature is not "
                        "one tensor; name a module that contains it"
                    )
            self._parsed[key] = found
        return self._parsed[key]

    @torch.no_grad()
    def capture(
        self,
        x: torch.Tensor,
        time: float | torch.Tensor,
        layers: Iterable[str],
        cond: torch.Tensor | None = None,
        tokens: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Reads layers in one forward pass that stops after the deepest of them.

        Args:
            x: Network input (B, in_channels, h, w), already noised.
            time: Native time, a scalar or (B,).
            layers: Addresses or aliases.
            cond: Condition of the whole batch or one for each row.
            tokens: Keep token sequences as (B, N, C) in place of maps.

        Returns:
            A tensor for each address: (B, C, H, W), or (B, N, C) for tokens; detached, in the network's dtype.

        Raises:
            LayerError: A layer does not exist or did not run.
            ConfigError: `x`, `time` or `cond` do not fit the network.
        """
        addresses = self.addresses([layers] if isinstance(layers, str) else layers)
        if getattr(self.network, "is_cache_enabled", False):
            raise LayerError("a diffusers cache is enabled on this network: skipped blocks would give stale features")
        found = capture(self.network, addresses.values(), lambda: self._forward(x, time, cond))
        size = tuple(x.shape[-2:])
        features = {name: found[address] for name, address in addresses.items()}
        if tokens:
            return features
        return {name: self._as_map(name, feature, size) for name, feature in features.items()}

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, time: float | torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the network's raw output for a noised input; arguments as for `capture`."""
        return self._forward(x, time, cond)

    def extract(
        self,
        images: torch.Tensor,
        request: FeatureRequest,
        ids: list[str] | None = None,
        cond: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
    ) -> Features:
        """Reads everything a request names from a batch of images; see `diffrep.extract.extract`.

        Args:
            images: (B, image_channels, H, W) in [0, 1].
            request: What is wanted.
            ids: A stable id for each image; None uses the SHA-256 of its pixels.
            cond: Condition, for the whole batch or one for each image.
            noise: (B, draws, C, h, w) in place of the seeded noise.
            posterior_noise: (B, draws, C, h, w) in place of the seeded posterior draws.
        """
        from diffrep.extract import extract

        return extract(self, images, request, ids=ids, cond=cond, noise=noise, posterior_noise=posterior_noise)

    def describe(self) -> dict[str, Any]:
        """Returns plain values that identify the backbone; they go into a store's meta.json."""
        return {
            "name": self.name,
            "network": type(self.network).__name__,
            "weights": self.weights_hash,
            "codec": self.codec.describe(),
            "schedule": self.schedule.describe(),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @cached_property
    def weights_hash(self) -> str:
        """Digest of all names and values of network and codec."""
        digest = hashlib.blake2b(digest_size=8)
        for module in (self.network, self.codec.module()):
            for name, tensor in module.state_dict().items() if module is not None else ():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def flops(self, addresses: dict[str, Address], height: int, width: int) -> tuple[dict[str, int], int]:
        """Counts FLOPs of one image's forward for an input (height, width).

        Returns:
            FLOPs of a forward that stops after each address, and FLOPs of the whole network.
        """
        trace, total = self._dry_run(height, width)
        calls = {call.module: call for call in trace}
        spent = {
            name: calls[a.module].flops_to_input if a.point == "input" else calls[a.module].flops_to_here
            for name, a in addresses.items()
        }
        return spent, total

    def shapes(
        self, addresses: dict[str, Address], height: int, width: int, tokens: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Returns the shape of one sample's feature at each address, for an input (height, width).

        Measured by running `capture` on the meta device.
        """
        meta = to_meta(self.network)
        found = capture(meta, addresses.values(), lambda: self.call(meta, *self._example(height, width)))
        shapes = {}
        for name, address in addresses.items():
            feature = found[address]
            shapes[name] = tuple((feature if tokens else self._as_map(name, feature, (height, width))).shape[1:])
        return shapes

    def encode_flops(self, height: int, width: int) -> int:
        """Returns the FLOPs of encoding one image of (height, width) pixels."""
        if self.codec.module() is None:
            return 0
        images = torch.zeros(1, self.image_channels, height, width, device="meta", dtype=self.dtype)
        return dry_run(self.codec.module(), lambda vae: vae.encode(images))[1]

    # Inside -------------------------------------------------------------------------------------------------------

    @cached_property
    def _trace(self) -> tuple[list[Call], int]:
        return self._dry_run(self.sample_size, self.sample_size)

    def _dry_run(self, height: int, width: int) -> tuple[list[Call], int]:
        example = self._example(height, width)
        return dry_run(self.network, lambda network: self.call(network, *example))

    def _example(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        x = torch.zeros(1, self.in_channels, height, width, device="meta", dtype=self.dtype)
        cond = self.conditioner.example()
        cond = cond.to(self.dtype) if cond is not None and cond.is_floating_point() else cond
        return x, torch.zeros(1, dtype=torch.int64, device="meta"), cond

    def _forward(self, x: torch.Tensor, time: float | torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ConfigError(f"x must be (B, {self.in_channels}, h, w), got {tuple(x.shape)}")
        time = torch.as_tensor(time, device=self.device)
        time = time.float() if time.is_floating_point() else time
        if time.ndim > 1 or (time.ndim == 1 and len(time) not in (1, len(x))):
            raise ConfigError(f"time must be a scalar or ({len(x)},), got {tuple(time.shape)}")
        cond = self.conditioner(cond, len(x), self.device)
        cond = cond.to(self.dtype) if cond is not None and cond.is_floating_point() else cond
        return self.call(self.network, x.to(self.device, self.dtype), time.reshape(-1).expand(len(x)), cond)

    def _gives_tokens(self, name: str) -> bool:
        """Whether a 3-d output is (B, N, C) of the image: no norm over (B, C, N), no keys and values of text."""
        module, last = self.network.get_submodule(name), name.rsplit(".", 1)[-1]
        return not isinstance(module, nn.GroupNorm) and not (last in ("to_k", "to_v") and ".attn2." in f".{name}")

    def _map_shape(self, shape: tuple[int, ...], height: int, width: int) -> tuple[int, int, int] | None:
        if len(shape) == 4:
            return shape[1:]
        grid = self.grid(shape[1], height, width) if len(shape) == 3 else None
        return None if grid is None else (shape[2], *grid)

    def _as_map(self, name: str, feature: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if feature.ndim == 4:
            return feature
        shape = self._map_shape(tuple(feature.shape), *size)
        if shape is None or (":" not in name and not self._gives_tokens(name)):
            raise LayerError(
                f"layer {name!r} gives {tuple(feature.shape)}, which is no map of a {tuple(size)} input; "
                "ask for tokens=True, or another layer"
            )
        return feature.transpose(1, 2).reshape(len(feature), *shape)
