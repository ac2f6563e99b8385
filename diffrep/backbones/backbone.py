"""The contract of a frozen backbone: a network, its codec, its conditioner and its noise schedule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffrep.backbones.aliases import expand
from diffrep.backbones.attention import AttentionBackend
from diffrep.backbones.codec import Codec, IdentityCodec
from diffrep.backbones.compiled import Mode, Region, compiled_capture, find_regions
from diffrep.backbones.conditioning import Cond, Condition, Conditioner, Ready
from diffrep.backbones.fingerprint import hash_of_config, hash_of_weights
from diffrep.backbones.layer import Layer, list_layers
from diffrep.backbones.spatial import is_spatial
from diffrep.config import FeatureRequest
from diffrep.errors import ConfigError, LayerError
from diffrep.noise import Schedule
from diffrep.taps import Address, Call, capture, dry_run, parse_address, site_of, to_meta

if TYPE_CHECKING:
    from diffrep.extract import Features


class Backbone(ABC):
    """A frozen diffusion network that can be read.

    Subclasses say how their network is called and which blocks it has. Construction freezes the network
    (`requires_grad_(False)`, eval). For a network of your own see `Backbone.from_module`.

    Args:
        name: What the user called it; stored with the features.
        network: The network.
        schedule: Its noise schedule.
        codec: Images to network input; None when the network takes pixels in [-1, 1], or latents that are given.
        conditioner: What stands for the condition.

    Attributes:
        convolutional: Whether the network gains from the channels-last memory layout.
        compiler: The torch.compile backend, such as "inductor", that `capture` compiles with; None runs everything as
            it is. Attention maps always do.
        compile_mode: "graph" compiles the function that returns the features, once for each set of layers; "regional"
            the repeated blocks, once for all sets; "cudagraphs" records that function, once for each shape of batch.
        attention: The kernel that softmax attention runs on; None is torch's choice.
    """

    convolutional = False

    def __init__(
        self, name: str, network: nn.Module, schedule: Schedule, codec: Codec | None, conditioner: Conditioner
    ):
        self.name = name
        self.network = network.requires_grad_(False).eval()
        self.schedule = schedule
        self.codec = codec = codec or IdentityCodec(self.in_channels)
        self.conditioner = conditioner
        self.compiler: str | None = None
        self.compile_mode: Mode = "graph"
        self.attention: AttentionBackend | None = None
        self._parsed: dict[tuple[str, ...], dict[str, Address]] = {}
        self._functions: dict[tuple[Address, ...], Callable[..., dict[Address, torch.Tensor]]] = {}
        if codec.module() is not None:
            codec.module().requires_grad_(False).eval()
        if codec.latent_channels != self.in_channels:
            raise ConfigError(
                f"{name}: the codec gives {codec.latent_channels} channels, the network takes {self.in_channels}; "
                "load the network with the codec it was trained with"
            )

    @staticmethod
    def from_module(module: nn.Module, schedule: Schedule, **options: Any) -> Backbone:
        """Wraps any network; see `diffrep.backbones.module.ModuleBackbone` for the options and an example."""
        from diffrep.backbones.module import ModuleBackbone

        return ModuleBackbone(module, schedule, **options)

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
    def call(self, network: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        """Calls the network (or its meta copy) and returns its raw output."""

    @abstractmethod
    def blocks(self) -> list[str]:
        """Returns the addresses of the top-level blocks, in execution order: the alias "blocks"."""

    @property
    def patch_size(self) -> int | None:
        """Input cells per token, along one side; None for U-Nets."""
        return None

    def grid(self, tokens: int, height: int, width: int) -> tuple[int, int] | None:
        """Returns the (h, w) grid of a token sequence for an input of (height, width), or None when it is not one.

        That is the grid of patches, or for U-Nets the input halved, rounding up, as often as it takes.
        """
        if self.patch_size is not None:
            height, width = height // self.patch_size, width // self.patch_size
        else:
            while height * width > tokens and height * width > 1:
                height, width = math.ceil(height / 2), math.ceil(width / 2)
        return (height, width) if height * width == tokens else None

    def alias(self, family: str, rest: str) -> str | None:
        """Returns the address that a published name such as "dift.1" stands for in this network, or None.

        Args:
            family: What stands before the dot, "dift".
            rest: What stands after it, "1".
        """
        return None

    @property
    def input_dtype(self) -> torch.dtype:
        """Element type that `call` takes x in."""
        return self.dtype

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
        return next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the network's weights."""
        return next((parameter.dtype for parameter in self.network.parameters()), torch.float32)

    def layers(self) -> list[Layer]:
        """Returns every module that gives a feature map, in execution order, from a dry run on the meta device.

        Modules that run several times in one pass (shared activations) are left out.
        """
        return list_layers(self)

    def addresses(self, layers: Iterable[str]) -> dict[str, Address]:
        """Expands aliases and checks addresses.

        Returns:
            Each address by its canonical text, which is the name that features are stored under.

        Raises:
            LayerError: An address does not exist, or its module does not run exactly once in a pass.
        """
        key = (layers,) if isinstance(layers, str) else tuple(layers)
        if key not in self._parsed:
            found = [parse_address(name, self.network) for layer in key for name in expand(layer, self)]
            calls = {call.module: call.calls for call in self._trace[0]}
            for address in found:
                times = calls.get(site_of(address, self.network).module, 0)
                if times != 1:
                    raise LayerError(
                        f"layer {str(address)!r} runs {times} times in one pass, so its feature is not one tensor; "
                        "name a module that contains it"
                    )
            self._parsed[key] = {str(address): address for address in found}
        return self._parsed[key]

    @torch.no_grad()
    def capture(
        self,
        x: torch.Tensor,
        time: float | torch.Tensor,
        layers: Iterable[str],
        cond: Cond = None,
        tokens: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Reads layers in one forward pass that stops after the deepest of them.

        Args:
            x: Network input (B, in_channels, h, w), already noised.
            time: Native time, a scalar or (B,).
            layers: Addresses or aliases.
            cond: Condition of the whole batch or one for each row: labels, prompts, embeddings, or a dict of tensors.
            tokens: Keep token sequences as (B, N, C) in place of maps.

        Returns:
            A tensor for each address: (B, C, H, W), or (B, N, C) for tokens; detached, in the network's dtype, but
            attention maps in fp32.

        Raises:
            LayerError: A layer does not exist or did not run.
            ConfigError: `x`, `time` or `cond` do not fit the network.
        """
        addresses = self._readable(layers)
        arguments = self._arguments(x, time, cond)
        wanted = tuple(addresses.values())
        with self.attention or nullcontext():
            if self.compiler is not None and not any(address.point == "attention" for address in wanted):
                if wanted not in self._functions:
                    self._functions[wanted] = compiled_capture(self, wanted)
                found = self._functions[wanted](*arguments)
            else:
                found = capture(self.network, wanted, lambda: self.call(self.network, *arguments))
        return self._shaped(addresses, found, tuple(x.shape[-2:]), tokens)

    @torch.no_grad()
    def capture_with_output(
        self,
        x: torch.Tensor,
        time: float | torch.Tensor,
        layers: Iterable[str],
        cond: Cond = None,
        tokens: bool = False,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Reads layers as `capture` does, in a whole pass that is never compiled; returns them and the raw output."""
        addresses, outputs = self._readable(layers), []
        wanted = addresses.values()
        found = capture(self.network, wanted, lambda: outputs.append(self.denoise(x, time, cond)), stop=False)
        return self._shaped(addresses, found, tuple(x.shape[-2:]), tokens), outputs[0]

    @torch.no_grad()
    def denoise(self, x: torch.Tensor, time: float | torch.Tensor, cond: Cond = None) -> torch.Tensor:
        """Returns the network's raw output for a noised input; arguments as for `capture`."""
        with self.attention or nullcontext():
            return self.call(self.network, *self._arguments(x, time, cond))

    def condition(self, cond: Cond, batch: int) -> Condition:
        """Returns `cond` as the named tensors that the network takes, one row for all or one for each sample.

        Raises:
            ConfigError: `cond` does not fit the network.
        """
        owner = (self.conditioner, self.device, self.dtype)
        if isinstance(cond, Ready) and cond.owner == owner and cond.serves(batch):
            return cond
        rows = self.conditioner(cond, batch, self.device).items()
        return Ready({name: row.to(self.dtype) if row.is_floating_point() else row for name, row in rows}, owner)

    def extract(
        self,
        images: torch.Tensor | None,
        request: FeatureRequest,
        ids: list[str] | None = None,
        cond: Cond = None,
        noise: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
        uncond: Cond = None,
        whole: bool = False,
    ) -> Features:
        """Reads everything a request names from a batch of images (B, image_channels, H, W) in [0, 1].

        Arguments are those of `diffrep.extract.extract`.
        """
        from diffrep.extract import extract

        return extract(self, images, request, ids, cond, noise, posterior_noise, uncond=uncond, whole=whole)

    def describe(self) -> dict[str, Any]:
        """Returns plain values that identify the backbone; they go into a store's meta.json."""
        return {
            "name": self.name,
            "network": type(self.network).__name__,
            "weights": self.weights_hash,
            "config": hash_of_config(self.network),
            "codec": self.codec.describe(),
            "schedule": self.schedule.describe(),
            "dtype": str(self.dtype).removeprefix("torch."),
        } | ({} if self.attention is None else {"attention": self.attention.name})

    @cached_property
    def weights_hash(self) -> str:
        """Digest of all names and values of network and codec."""
        return hash_of_weights(self.network, self.codec.module())

    def flops(
        self, addresses: dict[str, Address], height: int, width: int, condition: Condition | None = None
    ) -> tuple[dict[str, int], int]:
        """Counts FLOPs of one image's forward for an input (height, width).

        Args:
            addresses: As `addresses` gives them.
            height: Of the network's input.
            width: Of the network's input.
            condition: As `condition` gives it, for the length of its prompt; None takes the native length.

        Returns:
            FLOPs of a forward that stops after each address, and FLOPs of the whole network.
        """
        trace, total = self._dry_run(height, width, condition)
        calls = {call.module: call for call in trace}
        spent = {}
        for name, address in addresses.items():
            site = site_of(address, self.network)
            call = calls[site.module]
            spent[name] = call.flops_to_input if site.at == "input" else call.flops_to_here
        return spent, total

    def shapes(
        self,
        addresses: dict[str, Address],
        height: int,
        width: int,
        tokens: bool = False,
        condition: Condition | None = None,
    ) -> dict[str, tuple[int, ...]]:
        """Returns the shape of one sample's feature at each address; arguments as for `flops`.

        Measured by running `capture` on the meta device.
        """
        meta = to_meta(self.network)
        found = capture(meta, addresses.values(), lambda: self.call(meta, *self._example(height, width, condition)))
        shapes = {}
        for name, address in addresses.items():
            feature = found[address]
            shapes[name] = tuple((feature if tokens else self._as_map(address, feature, (height, width))).shape[1:])
        return shapes

    def encode_flops(self, height: int, width: int) -> int:
        """Returns the FLOPs of encoding one image of (height, width) pixels."""
        if self.codec.module() is None:
            return 0
        images = torch.zeros(1, self.image_channels, height, width, device="meta")
        return dry_run(self.codec.module(), lambda module: self.codec.with_module(module).encode(images))[1]

    # Inside -------------------------------------------------------------------------------------------------------

    @cached_property
    def regions(self) -> dict[str, Region]:
        """The blocks that compile mode "regional" compiles, by path."""
        return find_regions(self.network, self.compiler)

    def _readable(self, layers: Iterable[str]) -> dict[str, Address]:
        if getattr(self.network, "is_cache_enabled", False):
            raise LayerError("a diffusers cache is enabled on this network: skipped blocks would give stale features")
        return self.addresses(layers)

    def _shaped(
        self, addresses: dict[str, Address], found: dict[Address, torch.Tensor], size: tuple[int, int], tokens: bool
    ) -> dict[str, torch.Tensor]:
        if tokens:
            return {name: found[address] for name, address in addresses.items()}
        return {name: self._as_map(address, found[address], size) for name, address in addresses.items()}

    @cached_property
    def _trace(self) -> tuple[list[Call], int]:
        return self._dry_run(self.sample_size, self.sample_size)

    def _dry_run(self, height: int, width: int, condition: Condition | None = None) -> tuple[list[Call], int]:
        example = self._example(height, width, condition)
        calls, total = dry_run(self.network, lambda network: self.call(network, *example))
        return calls, max(total, 1)  # one that only hands values on has shares too

    def _example(
        self, height: int, width: int, condition: Condition | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Condition]:
        self._check_sides(height, width)
        x = torch.zeros(1, self.in_channels, height, width, device="meta", dtype=self.input_dtype)
        rows = {name: row[:1].to("meta") for name, row in (condition or self.conditioner.example()).items()}
        cond = {name: row.to(self.dtype) if row.is_floating_point() else row for name, row in rows.items()}
        return x, torch.tensor([self.schedule.clean_time], device="meta"), cond

    def _arguments(
        self, x: torch.Tensor, time: float | torch.Tensor, cond: Cond
    ) -> tuple[torch.Tensor, torch.Tensor, Condition]:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ConfigError(f"x must be (B, {self.in_channels}, h, w), got {tuple(x.shape)}")
        self._check_sides(*x.shape[-2:])
        time = torch.as_tensor(time, device=self.device)
        time = time.float() if time.is_floating_point() else time
        if time.ndim > 1 or (time.ndim == 1 and len(time) not in (1, len(x))):
            raise ConfigError(f"time must be a scalar or ({len(x)},), got {tuple(time.shape)}")
        rows = self.condition(cond, len(x))
        rows = {name: row.expand(len(x), *row.shape[1:]) for name, row in rows.items()}
        return x.to(self.device, self.input_dtype), time.reshape(-1).expand(len(x)), rows

    def _check_sides(self, height: int, width: int) -> None:
        # Without the check most transformers drop what is left over at the right and the bottom.
        patch = self.patch_size or 1
        if height % patch or width % patch:
            raise ConfigError(
                f"{self.name} takes inputs whose sides are multiples of its patch, {patch}, got {height} x {width}; "
                f"sides of images are then multiples of {patch * self.codec.downscale} pixels, see data.size"
            )

    def _map_shape(self, shape: tuple[int, ...], height: int, width: int) -> tuple[int, int, int] | None:
        if len(shape) == 4:
            return shape[1:]
        grid = self.grid(shape[1], height, width) if len(shape) == 3 else None
        return None if grid is None else (shape[2], *grid)

    def _as_map(self, address: Address, feature: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        shape = self._map_shape(tuple(feature.shape), *size)
        if shape is None or not is_spatial(self.network, address, feature.ndim):
            raise LayerError(
                f"layer {str(address)!r} gives {tuple(feature.shape)}, which is no map of a {tuple(size)} input; "
                "ask for tokens=True, or another layer"
            )
        return feature if feature.ndim == 4 else feature.transpose(1, 2).reshape(len(feature), *shape)
