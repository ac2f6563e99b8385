"""The aggregation network of Diffusion Hyperfeatures: many layers and noise levels become one descriptor per pixel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from diffrep.backbones.checkpoint import State, check_keys, read_tensors
from diffrep.errors import CheckpointError, ConfigError, UnknownNameError
from diffrep.heads.head import Head

Maps = Mapping[tuple[str, str], torch.Tensor]
LOGIT_SCALE = math.log(1 / 0.07)
# Where Hyperfeatures' checkpoints hold the weights; GeoAware-SC's are bare.
HOLDER = "aggregation_network"
# A parameter of GeoAware-SC's network that its loss never reads.
UNUSED = "self_logit_scale"


class AggregationNetwork(Head):
    """Mixes the maps of several layers at several noise levels into one map of descriptors.

    Diffusion Hyperfeatures (Luo et al., 2023): each layer has a bottleneck block, the same at all levels, that brings
    its maps to `projection_dim` channels; a softmax over all (level, layer) weighs the results, and their weighted sum
    is the descriptor. State-dict keys are the published ones, `bottleneck_layers.0.0.conv1.weight` and on and
    `mixing_weights`, level after level and layer after layer within a level. GeoAware-SC (Zhang et al., 2024) has the
    same network with a learned `logit_scale` and dropout of what it reads.

    The published network reads maps that were resized to one size and concatenated. Here the first convolution and
    that of the shortcut, both 1x1 without bias, run before the resize where the maps are smaller than the result: they
    commute with bilinear interpolation, and the numbers are the same. One level is read after the other, so that what
    is held in inference does not grow with their number.

    Args:
        layers: Channels of each layer's maps.
        levels: Noise levels, as in the keys of the features.
        projection_dim: Channels of the descriptors; a multiple of 4.
        num_norm_groups: Groups of the group norms; divides projection_dim / 4.
        temperature: The mixing weights are divided by it before the softmax.
        learn_scale: Learn the logarithm of the scale of cosines in contrastive losses, key `logit_scale`; else it is
            the constant ln(1 / 0.07) and has no key.
        dropout: Dropout of the values that are read.
        size: (h, w) of the descriptors; None takes the largest height and width among the maps of a level.
        checkpoint: Keep no activations of a level in training, and compute them again in the backward pass.

    Attributes:
        logit_scale: () fp32.

    Raises:
        ConfigError: No layers or no levels, or numbers that do not go together.
    """

    reads_mapping: ClassVar[bool] = True
    gives: ClassVar[str] = "descriptors"

    def __init__(
        self,
        layers: Mapping[str, int],
        levels: Sequence[str],
        projection_dim: int = 384,
        num_norm_groups: int = 32,
        temperature: float = 1.0,
        learn_scale: bool = False,
        dropout: float = 0.0,
        size: Sequence[int] | None = None,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.layers = {name: int(channels) for name, channels in layers.items()}
        self.levels = list(levels)
        _check_arguments(self.layers, self.levels, projection_dim, num_norm_groups, temperature, dropout, size)
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.temperature, self.dropout, self.checkpoint = temperature, dropout, checkpoint
        # Of one block each, which the "0" in the keys counts.
        self.bottleneck_layers = nn.ModuleList(
            nn.Sequential(_Bottleneck(channels, projection_dim, num_norm_groups)) for channels in self.layers.values()
        )
        self.mixing_weights = nn.Parameter(torch.ones(len(self.levels) * len(self.layers)))
        scale = torch.tensor(LOGIT_SCALE)
        if learn_scale:
            self.logit_scale = nn.Parameter(scale)
        else:
            self.register_buffer("logit_scale", scale, persistent=False)

    def forward(self, features: Maps | torch.Tensor) -> torch.Tensor:
        """Returns descriptors (B, projection_dim, h, w).

        Args:
            features: {(layer, level): map (B, C, h_l, w_l)}, such as `Features`, of any floating type and on any
                device; entries beyond the network's are not read. Or what the published network takes: maps of one
                size, concatenated to (B, levels * sum of channels, h, w), level after level.

        Raises:
            UnknownNameError: A map is missing.
            ConfigError: A map has another number of channels, or batches differ.
        """
        if isinstance(features, torch.Tensor):
            features = self._split(features)
        return self.stream((level, self._maps(features, level)) for level in self.levels)

    def stream(self, parts: Iterable[tuple[str, Mapping[str, torch.Tensor]]]) -> torch.Tensor:
        """Returns descriptors (B, projection_dim, h, w) of levels that are handed over one at a time.

        Without gradients no more than one level's maps are held, if the iterable keeps none itself.

        Args:
            parts: (level, {layer: map}), each level once, in any order.

        Raises:
            ConfigError: A level is missing or comes twice, or as for `forward`.
            UnknownNameError: A level or layer is unknown or missing.
        """
        total, came = None, []
        for level, maps in parts:
            came.append(level)
            total = self.accumulate(total, level, maps)
            del maps  # before the next ones are made
        if sorted(came) != sorted(self.levels):
            raise ConfigError(f"the network reads the levels {', '.join(self.levels)}, each once; got {came}")
        return total

    def accumulate(self, total: torch.Tensor | None, level: str, maps: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Adds one level's share of the descriptors.

        Args:
            total: The sum over the levels so far, None for the first; changed in place where there are no gradients.
            level: Which.
            maps: {layer: map (B, C, h_l, w_l)} of this level.

        Returns:
            (B, projection_dim, h, w); the descriptors, once every level was added.

        Raises:
            UnknownNameError: The level is unknown, or a layer is missing.
            ConfigError: A map has another number of channels, or batches differ.
        """
        if level not in self.levels:
            raise UnknownNameError("level", level, self.levels)
        read = [self._checked(maps, layer, level) for layer in self.layers]
        batches = {len(one) for one in read} | (set() if total is None else {len(total)})
        if len(batches) > 1:
            raise ConfigError(f"the maps of {level} are of batches of {sorted(batches)}; give the same images")
        if total is not None:
            size = tuple(total.shape[-2:])
        else:
            size = self.size or tuple(max(one.shape[axis] for one in read) for axis in (-2, -1))
        shares = self.shares()[self.levels.index(level)]
        if self.checkpoint and torch.is_grad_enabled():
            found = recompute(self._add, None, shares, size, *read, use_reentrant=False)
            return found if total is None else total + found
        return self._add(total, shares, size, *read)

    def shares(self) -> torch.Tensor:
        """Returns what each (level, layer) counts, (levels, layers); they sum to 1."""
        return (self.mixing_weights / self.temperature).softmax(0).view(len(self.levels), len(self.layers))

    def mixing(self) -> dict[str, Any]:
        """Returns the shares as JSON values: "layers", "levels" and "shares", one row a layer."""
        return {"layers": list(self.layers), "levels": self.levels, "shares": self.shares().detach().T.tolist()}

    def load_weights(self, weights: str | Path | State) -> None:
        """Loads weights of Hyperfeatures or GeoAware-SC, strictly.

        Args:
            weights: A state dict, or a file with one, bare or under "aggregation_network".

        Raises:
            CheckpointError: The file cannot be read, or the weights are for other layers, levels or sizes.
        """
        state = weights
        if not isinstance(state, Mapping):
            state = read_tensors(Path(weights))
            if isinstance(state, dict) and isinstance(state.get(HOLDER), dict):
                state = state[HOLDER]
            if not isinstance(state, dict) or not all(
                isinstance(key, str) and isinstance(one, torch.Tensor) for key, one in state.items()
            ):
                raise CheckpointError(f"{weights} holds no weights of an aggregation network")
        where = "the state dict" if isinstance(weights, Mapping) else weights
        state = {key: value for key, value in state.items() if key != UNUSED}
        self._check_weights(where, state)
        self.load_state_dict(state)

    def _check_weights(self, where: object, state: State) -> None:
        """Raises CheckpointError when a state dict is not for this network's layers, levels or sizes."""
        there = [state[key].shape[1] for key in _first_keys(state)]
        here = list(self.layers.items())
        if there and len(there) != len(here):
            raise CheckpointError(
                f"the weights in {where} are for {len(there)} layers of {', '.join(map(str, there))} channels, the "
                f"network reads {len(here)}: {_named(here)}; name the layers that they were trained on"
            )
        other = [f"{name} has {c}, there {d}" for (name, c), d in zip(here, there, strict=False) if c != d]
        if other:
            raise CheckpointError(
                f"the weights in {where} are for layers of other channels: {'; '.join(other)}; name the layers that "
                "they were trained on, in their order"
            )
        mixing = state.get("mixing_weights")
        if mixing is not None and mixing.numel() != self.mixing_weights.numel():
            raise CheckpointError(
                f"the weights in {where} mix {mixing.numel()} maps, the network {self.mixing_weights.numel()}: "
                f"{len(self.layers)} layers at {len(self.levels)} levels; name the levels that they were trained on"
            )
        own = self.state_dict()
        if "logit_scale" in state and "logit_scale" not in own:
            raise CheckpointError(f"the weights in {where} hold a learned logit_scale; build with learn_scale=True")
        resized = [
            f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ]
        check_keys(where, [key for key in own if key not in state], [key for key in state if key not in own], resized)

    def _add(
        self, total: torch.Tensor | None, shares: torch.Tensor, size: tuple[int, int], *maps: torch.Tensor
    ) -> torch.Tensor:
        """Adds the weighted bottlenecks of one level's maps, (B, projection_dim, *size)."""
        for share, block, found in zip(shares, self.bottleneck_layers, maps, strict=True):
            # One map at a time on the network's device and in its type; the sum stays in that type under autocast.
            found = F.dropout(found.to(self.mixing_weights), self.dropout, self.training)
            part = share * block[0](found, size).to(share)
            if total is None:
                total = part
            elif torch.is_grad_enabled():
                total = total + part
            else:
                total.add_(part)
        return total

    def _split(self, concatenated: torch.Tensor) -> Maps:
        """Returns the maps that the published network's input is made of, as views."""
        channels = list(self.layers.values()) * len(self.levels)
        if concatenated.ndim != 4 or concatenated.shape[1] != sum(channels):
            raise ConfigError(
                f"concatenated maps must be (B, {sum(channels)}, h, w), {len(self.levels)} levels of "
                f"{_named(self.layers.items())}; got {tuple(concatenated.shape)}"
            )
        pairs = [(layer, level) for level in self.levels for layer in self.layers]
        return dict(zip(pairs, concatenated.split(channels, dim=1), strict=True))

    def _maps(self, features: Maps, level: str) -> dict[str, torch.Tensor]:
        """Returns the maps of one level."""
        for layer in self.layers:
            if (layer, level) not in features:
                raise UnknownNameError("map", f"{layer}@{level}", [f"{a}@{b}" for a, b in features])
        return {layer: features[layer, level] for layer in self.layers}

    def _checked(self, maps: Mapping[str, torch.Tensor], layer: str, level: str) -> torch.Tensor:
        if layer not in maps:
            raise UnknownNameError("map", f"{layer}@{level}", [f"{name}@{level}" for name in maps])
        found = maps[layer]
        if found.ndim != 4 or found.shape[1] != self.layers[layer]:
            raise ConfigError(
                f"the map {layer}@{level} is {tuple(found.shape)}, the network reads (B, {self.layers[layer]}, h, w); "
                "extract it as the network was trained, with pool=none or k and without tokens"
            )
        return found


class AggregationHead(Head):
    """Class scores from the descriptors of an aggregation network: their mean over the cells, and a linear map.

    State-dict keys: those of `AggregationNetwork` under `network.`, and `fc`.

    Args:
        layers: As for `AggregationNetwork`.
        levels: As there.
        classes: Number of classes.
        projection_dim: As there.
        num_norm_groups: As there.
        temperature: As there.
        dropout: Dropout of the values that are read, and of the mean before the linear map.
        size: As there.
        checkpoint: As there.
    """

    reads_mapping: ClassVar[bool] = True

    def __init__(
        self,
        layers: Mapping[str, int],
        levels: Sequence[str],
        classes: int,
        projection_dim: int = 384,
        num_norm_groups: int = 32,
        temperature: float = 1.0,
        dropout: float = 0.0,
        size: Sequence[int] | None = None,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.network = AggregationNetwork(
            layers,
            levels,
            projection_dim,
            num_norm_groups,
            temperature,
            dropout=dropout,
            size=size,
            checkpoint=checkpoint,
        )
        self.fc = nn.Linear(projection_dim, classes)

    def forward(self, features: Maps | torch.Tensor) -> torch.Tensor:
        """Returns scores (B, classes); arguments as for `AggregationNetwork`."""
        mean = self.network(features).mean((2, 3))
        return self.fc(F.dropout(mean, self.network.dropout, self.training))


class _Conv(nn.Conv2d):
    """A convolution without bias that holds its group norm, as the published keys have it."""

    def __init__(self, channels: int, width: int, side: int, groups: int):
        super().__init__(channels, width, side, padding=side // 2, bias=False)
        self.norm = nn.GroupNorm(groups, width)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Returns the normed result, resized to `size` before the norm."""
        x = super().forward(x)
        return self.norm(x if size is None else _resized(x, size))


class _Bottleneck(nn.Module):
    """A bottleneck residual block with group norms (He et al., 2016, as in detectron2's `BottleneckBlock`)."""

    def __init__(self, channels: int, width: int, groups: int):
        super().__init__()
        # Where the width stays there is no convolution on the shortcut, and no key.
        self.shortcut = _Conv(channels, width, 1, groups) if channels != width else None
        self.conv1 = _Conv(channels, width // 4, 1, groups)
        self.conv2 = _Conv(width // 4, width // 4, 3, groups)
        self.conv3 = _Conv(width // 4, width, 1, groups)

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Returns (B, width, *size) for a map (B, channels, h, w)."""
        if math.prod(x.shape[-2:]) > math.prod(size):
            x = _resized(x, size)  # the 1x1 convolutions commute with it: they run where there are fewer cells
        branch = F.relu(self.conv2(F.relu(self.conv1(x, size))))
        beside = _resized(x, size) if self.shortcut is None else self.shortcut(x, size)
        return F.relu(self.conv3(branch) + beside)


def _resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def _first_keys(state: State) -> list[str]:
    """Returns the keys of the first convolution of each layer, in the order of the layers."""
    first = (f"bottleneck_layers.{index}.0.conv1.weight" for index in range(len(state)))
    return [key for key in first if key in state]


def _named(layers: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({channels})" for name, channels in layers)


def _check_arguments(
    layers: dict[str, int],
    levels: list[str],
    width: int,
    groups: int,
    temperature: float,
    dropout: float,
    size: Sequence[int] | None,
) -> None:
    if not layers or not levels or len(set(levels)) < len(levels):
        raise ConfigError(f"an aggregation network needs layers and levels, each once; got {list(layers)} at {levels}")
    if any(channels < 1 for channels in layers.values()):
        raise ConfigError(f"layers must have channels; got {_named(layers.items())}")
    if width < 4 or width % 4 or groups < 1 or width // 4 % groups:
        raise ConfigError(
            f"projection_dim must be a multiple of 4 and num_norm_groups divide projection_dim / 4; got {width} and "
            f"{groups}"
        )
    if not temperature > 0 or not 0 <= dropout < 1:
        raise ConfigError(f"temperature must be above 0 and dropout in [0, 1); got {temperature} and {dropout}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ConfigError(f"size must be (h, w), each at least 1; got {tuple(size)}")
