"""DifFeed: a second pass of the frozen U-Net that its own decoder's features are fed back into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.backbones import Backbone
from diffrep.backbones.adm import ADMUNet
from diffrep.backbones.conditioning import Cond
from diffrep.config import LevelSpec
from diffrep.errors import ConfigError, LayerError
from diffrep.heads.head import Head, class_name, head_class
from diffrep.noise import image_digest, mix, sample_noise
from diffrep.taps import Recorder
from diffrep.taps.outputs import image_reader

# Noised input and native time of each level.
Inputs = Mapping[str, tuple[torch.Tensor, float | torch.Tensor]]


class FeedbackNetwork(nn.Module):
    """A frozen network that is run twice, with small layers between the passes, and a head on the second pass.

    diffssl's DifFeed (Mukhopadhyay et al., 2024). Pass 1, without gradients, reads the sources. A feedback layer for
    each (1x1 convolution without bias, batch norm, ReLU), resized bilinearly, is added to the output of its target in
    pass 2 of the same noised input; skip connections carry the sum. The head reads pass 2, and its gradients flow
    through the frozen network into the feedback layers. All noise levels share them. Both passes end after the
    deepest layer that they need.

    The backbone is no submodule: only `feedback.*` and `head.*`, with the published keys, are trained, moved and
    saved; the network stays frozen and in eval mode whatever mode this module is in, and its hooks are gone after
    each pass.

    Args:
        backbone: The frozen network.
        head: Reads the maps of pass 2: a mapping of them by (name, level), such as `DifFormer`, or one tensor, which
            is the map when there is but one, and else all maps flattened and concatenated, level after level within
            layer after layer.
        read: Addresses that the head reads, or the head's name for each, {name: address}.
        pairs: (source, target) addresses; None takes `default_pairs`.

    Raises:
        LayerError: An address does not exist or gives no map, or a target is named twice.
        ConfigError: There are no pairs, or the network is no U-Net for which they are known.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        read: Sequence[str] | Mapping[str, str],
        pairs: Sequence[tuple[str, str]] | None = None,
    ):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.read = read_names(backbone, read)
        pairs = default_pairs(backbone) if pairs is None else pairs
        self.pairs = [(_one(backbone, source), _one(backbone, target)) for source, target in pairs]
        shapes = {layer.name: layer.shape for layer in backbone.layers()}
        _check_pairs(self.pairs, shapes)
        self.feedback = _feedback_layers([(shapes[source][0], shapes[target][0]) for source, target in self.pairs])
        self.to(backbone.device)
        addresses = backbone.addresses(self.read.values())
        self._recorder = Recorder(backbone.network, [addresses[name] for name in self.read.values()], detach=False)

    @property
    def trained(self) -> FeedbackHead:
        """The feedback layers and the head, without the network: what is saved. It shares its weights with this.

        Raises:
            ConfigError: The head was made of other things than plain JSON values.
        """
        channels = [(layer[0].in_channels, layer[0].out_channels) for layer in self.feedback]
        found = FeedbackHead(class_name(type(self.head)), self.head.arguments, self.read, self.pairs, channels)
        found.feedback, found.head = self.feedback, self.head
        return found.train(self.training)

    def forward(self, inputs: Inputs, cond: Cond = None) -> torch.Tensor:
        """Returns scores (B, classes).

        Args:
            inputs: For each level, by its canonical key, the noised input (B, C, h, w) and the native time, a scalar
                or (B,).
            cond: Condition, for the whole batch or one for each row.
        """
        maps = {
            (name, level): tensor
            for level, (x, time) in inputs.items()
            for name, tensor in self.maps(x, time, cond).items()
        }
        if self.head.reads_mapping:
            return self.head(maps)
        if len(maps) == 1:
            return self.head(next(iter(maps.values())))
        return self.head(torch.cat([maps[name, level].flatten(1) for name in self.read for level in inputs], dim=1))

    def maps(self, x: torch.Tensor, time: float | torch.Tensor, cond: Cond = None) -> dict[str, torch.Tensor]:
        """Runs both passes at one level and returns the maps (B, C, h, w) of the second, fp32, by the head's names.

        Raises:
            ConfigError: The input does not fit the network.
            LayerError: A layer did not run, or a target comes after all that is read.
        """
        backbone = self.backbone
        sources = backbone.capture(x, time, dict.fromkeys(source for source, _ in self.pairs), cond)
        added = {
            target: layer(sources[source].float())
            for (source, target), layer in zip(self.pairs, self.feedback, strict=True)
        }
        rows = {name: row.expand(len(x), *row.shape[1:]) for name, row in backbone.condition(cond, len(x)).items()}
        time = torch.as_tensor(time, device=backbone.device)
        time = (time.float() if time.is_floating_point() else time).reshape(-1).expand(len(x))
        x = x.to(backbone.device, backbone.input_dtype)
        with self._adding(added, x.shape[-2:]) as reached, self._recorder, backbone.attention or nullcontext():
            found = self._recorder.run(lambda: backbone.call(backbone.network, x, time, rows))
        late = [target for target in added if target not in reached]
        if late:
            raise LayerError(
                f"feedback into {', '.join(late)} comes after all that the head reads, "
                f"{', '.join(self.read.values())}, and could not learn; read a later layer or give other pairs"
            )
        found = {str(address): tensor for address, tensor in found.items()}
        return {name: self._as_map(found[path], path, x.shape[-2:]) for name, path in self.read.items()}

    @contextmanager
    def _adding(self, added: dict[str, torch.Tensor], size: torch.Size) -> Iterator[set[str]]:
        """Adds maps to the outputs of modules for one pass, and tells which of the modules ran."""
        handles, reached = [], set()
        try:
            for path, tensor in added.items():
                module = self.backbone.network.get_submodule(path)
                handles.append(module.register_forward_hook(self._adder(module, path, tensor, size, reached)))
            yield reached
        finally:
            for handle in handles:
                handle.remove()

    def _adder(
        self, module: nn.Module, path: str, added: torch.Tensor, size: torch.Size, reached: set[str]
    ) -> Callable[[nn.Module, Any, Any], Any]:
        image = image_reader(module, path)

        def add(_: nn.Module, __: Any, output: Any) -> Any:
            reached.add(path)
            stream = image(output)
            total = stream + self._fitted(added, stream, path, size).to(stream.dtype)
            if output is stream:
                return total
            # Down blocks of diffusers give their output twice, as it is and as the last of the skip connections.
            return _replaced(output, stream, total)

        return add

    def _fitted(self, added: torch.Tensor, stream: torch.Tensor, path: str, size: torch.Size) -> torch.Tensor:
        """Brings a map (B, C, h, w) to the size of a stream of maps or tokens."""
        grid = stream.shape[-2:] if stream.ndim == 4 else self._grid(stream, path, size)
        if added.shape[-2:] != grid:
            added = F.interpolate(added, size=tuple(grid), mode="bilinear", align_corners=False)
        return added if stream.ndim == 4 else added.flatten(2).transpose(1, 2)

    def _as_map(self, feature: torch.Tensor, path: str, size: torch.Size) -> torch.Tensor:
        if feature.ndim == 3:
            feature = feature.transpose(1, 2).unflatten(2, self._grid(feature, path, size))
        return feature.float()

    def _grid(self, tokens: torch.Tensor, path: str, size: torch.Size) -> tuple[int, int]:
        grid = self.backbone.grid(tokens.shape[1], *size)
        if grid is None:
            raise LayerError(f"layer {path!r} gives {tuple(tokens.shape)}, which is no map of a {tuple(size)} input")
        return grid


class FeedbackHead(Head):
    """The trained part of DifFeed: feedback layers, and the head on the second pass of a frozen network.

    The network is no part of it; `attach` puts it on one. State-dict keys are those of `FeedbackNetwork`.

    Args:
        head: Class of the head, such as "DifFormer".
        arguments: Its constructor arguments.
        read: Address that the head reads for each of its names.
        pairs: (source, target) addresses of the feedback.
        channels: (source's, target's) channels of each pair.

    Raises:
        UnknownNameError: There is no such head.
        ConfigError: Its arguments are not known.
    """

    live: ClassVar[bool] = True

    def __init__(
        self,
        head: str,
        arguments: dict[str, Any],
        read: Mapping[str, str],
        pairs: Sequence[Sequence[str]],
        channels: Sequence[Sequence[int]],
    ):
        super().__init__()
        if not arguments:
            raise ConfigError(f"the head {head} was not made of plain JSON values and cannot be saved")
        self.head = head_class(head)(**arguments)
        self.feedback = _feedback_layers(channels)
        self.read, self.pairs = dict(read), [tuple(pair) for pair in pairs]

    def attach(self, backbone: Backbone) -> FeedbackNetwork:
        """Returns the network with these layers, which are moved to its device and shared.

        Raises:
            LayerError: The network has not these layers.
            ConfigError: They have other channels there.
        """
        network = FeedbackNetwork(backbone, self.head, self.read, self.pairs)
        for (source, target), there, here in zip(self.pairs, network.feedback, self.feedback, strict=True):
            if there[0].weight.shape != here[0].weight.shape:
                raise ConfigError(
                    f"feedback from {source} to {target} takes {here[0].in_channels} to {here[0].out_channels} "
                    f"channels, and {backbone.name} has {there[0].in_channels} and {there[0].out_channels}; load the "
                    "network that it was trained on"
                )
        network.feedback = self.feedback.to(backbone.device)
        return network.train(self.training)

    def forward(self, *_: Any) -> torch.Tensor:
        """Cannot score by itself.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("these are the layers without the network: score with head.attach(backbone)")


@torch.no_grad()
def noised_inputs(
    backbone: Backbone,
    images: torch.Tensor,
    levels: Sequence[LevelSpec],
    ids: Sequence[str] | None = None,
    draw: int = 0,
    seed: int = 0,
    noise: Literal["gaussian", "none"] = "gaussian",
) -> dict[str, tuple[torch.Tensor, float]]:
    """Returns what a `FeedbackNetwork` takes: the noised input (B, C, h, w) and the native time of each level.

    Args:
        backbone: Its codec encodes the images.
        images: (B, image_channels, H, W) in [0, 1].
        levels: Noise levels.
        ids: A stable id for each image, which its noise depends on; None uses the SHA-256 of its values.
        draw: Index of the noise draw.
        seed: Seeds the noise, together with id, level and draw.
        noise: "gaussian" or "none", as in `FeatureRequest`.
    """
    if ids is None:
        ids = [image_digest(image) for image in images]
    clean = backbone.codec.encode(images.to(backbone.device)).mean.float()
    found = {}
    for level in [backbone.schedule.level(spec) for spec in levels]:
        x = clean
        if noise == "gaussian" and level.noise:
            eps = torch.stack([sample_noise(clean.shape[1:], seed, name, level.key, draw) for name in ids])
            shares = (torch.full((len(clean),), share).to(clean.device) for share in (level.signal, level.noise))
            x = mix(clean, eps.to(clean.device), *shares)
        found[level.key] = x, level.time
    return found


def default_pairs(backbone: Backbone) -> list[tuple[str, str]]:
    """Returns the (source, target) pairs of a U-Net.

    - guided-diffusion: from each level of the decoder its middle block, output block j of n, to the input block that
      it takes its skip from, n - 1 - j. With the blocks of the whole network counted through from 1 to N this is b to
      N + 1 - b, and in the published network of 37 blocks b = 21, 24, 27, 30, 33, 36 to 38 - b.
    - diffusers: each up block to the down block of the same depth, up_blocks.i to down_blocks.(n - 1 - i).

    Raises:
        ConfigError: The network is no such U-Net.
    """
    network = backbone.network
    if isinstance(network, ADMUNet):
        count, levels = len(network.output_blocks), network.multiple.bit_length()
        each = count // levels
        return [
            (f"output_blocks.{j}", f"input_blocks.{count - 1 - j}")
            for j in (level * each + each // 2 for level in range(levels))
        ]
    ups, downs = getattr(network, "up_blocks", None), getattr(network, "down_blocks", None)
    if isinstance(ups, nn.ModuleList) and isinstance(downs, nn.ModuleList):
        return [(f"up_blocks.{i}", f"down_blocks.{len(downs) - 1 - i}") for i in range(min(len(ups), len(downs)))]
    raise ConfigError(
        f"feedback runs from a U-Net's decoder to its encoder, and {type(network).__name__} is none that is known; "
        "give pairs=[[SOURCE, TARGET], ...], such as a late block and an early one ('diffrep layers' lists them)"
    )


def read_names(backbone: Backbone, read: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Returns the head's name for each layer it reads, with the layer's address; aliases are expanded.

    Raises:
        LayerError: An address does not exist, or a name stands for several.
    """
    if isinstance(read, Mapping):
        return {name: _one(backbone, address) for name, address in read.items()}
    return {address: address for address in backbone.addresses(read)}


def _feedback_layers(channels: Sequence[Sequence[int]]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Conv2d(source, target, 1, bias=False), nn.BatchNorm2d(target), nn.ReLU())
        for source, target in channels
    )


def _replaced(output: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if isinstance(output, tuple):
        return tuple(_replaced(member, old, new) for member in output)
    return new if output is old else output


def _one(backbone: Backbone, layer: str) -> str:
    found = list(backbone.addresses([layer]))
    if len(found) != 1:
        raise LayerError(f"layer {layer!r} stands for {len(found)} layers; name one")
    return found[0]


def _check_pairs(pairs: list[tuple[str, str]], maps: dict[str, tuple[int, int, int]]) -> None:
    if not pairs:
        raise ConfigError(
            "no pairs: a network without feedback is a frozen one, whose features 'diffrep probe' judges"
        )
    targets = [target for _, target in pairs]
    if len(set(targets)) < len(targets):
        raise LayerError(f"a target is named twice: {', '.join(targets)}")
    for layer in [layer for pair in pairs for layer in pair]:
        if layer not in maps:
            raise LayerError(f"feedback needs the output of a layer that is a map, and {layer!r} is none")
