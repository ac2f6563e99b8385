"""What a diffusion backbone is compared with: pretrained encoders, an autoencoder's latents, and raw pixels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.backbones import folders
from diffrep.backbones.backbone import Backbone
from diffrep.backbones.checkpoint import State, check_state, read_state
from diffrep.backbones.codec import Codec, Posterior
from diffrep.backbones.module import ModuleBackbone
from diffrep.backbones.sources import find
from diffrep.errors import CheckpointError, ConfigError, UnknownNameError
from diffrep.noise import FlowSchedule
from diffrep.taps import Address

REFERENCES = ("timm", "latents", "pixels")


class NormalizedCodec(Codec):
    """Images as an encoder of images takes them: (image - mean) / std, channel by channel.

    Args:
        mean: One value for each channel, of images in [0, 1].
        std: Likewise.
    """

    downscale = 1
    random = False

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_channels = self.latent_channels = len(self.mean)

    def encode(self, images: torch.Tensor) -> Posterior:
        """Normalises the images."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return Posterior((images - mean) / std)

    def describe(self) -> dict[str, Any]:
        """Returns the values."""
        return {"kind": "normalized", "mean": list(self.mean), "std": list(self.std)}


class TimmBackbone(ModuleBackbone):
    """An encoder of timm. Its layers are read at level "clean"; it is told no time.

    Class and register tokens are dropped from token sequences, so that the rest is a map.
    """

    def __init__(self, network: nn.Module, name: str):
        config = network.pretrained_cfg
        channels, side, _ = config["input_size"]
        patches = getattr(network, "patch_embed", None)
        if patches is not None and patches.img_size is not None:  # what it was built for, whatever it was trained on
            side = patches.img_size[0]
        super().__init__(
            network,
            FlowSchedule(),
            in_channels=channels,
            sample_size=side,
            codec=NormalizedCodec(config["mean"], config["std"]),
            call=lambda module, x, time, cond: module.forward_features(x),
            patch_size=None if patches is None else patches.patch_size[0],
            name=name,
        )
        self.prefix = getattr(network, "num_prefix_tokens", 0)

    def _map_shape(self, shape: tuple[int, ...], height: int, width: int) -> tuple[int, int, int] | None:
        if len(shape) == 3:
            shape = (shape[0], shape[1] - self.prefix, shape[2])
        return super()._map_shape(shape, height, width)

    def _as_map(self, address: Address, feature: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        shape = self._map_shape(tuple(feature.shape), *size)
        if feature.ndim == 4 or shape is None:
            return super()._as_map(address, feature, size)
        return feature[:, self.prefix :].transpose(1, 2).reshape(len(feature), *shape)


class Latents(nn.Module):
    """Gives back what it is given: the layer "latents" is the network's input."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Identity()
        self.scale = nn.Parameter(torch.ones(()))  # a network has a device

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Returns x (B, C, h, w)."""
        return self.latents(x * self.scale)


class PixelPatches(nn.Module):
    """The layer "patches" is, at each pixel, the patch around it: (B, channels * side * side, H, W).

    Args:
        channels: Of the images.
        side: Of the patch, odd; edge pixels repeat beyond the border.
    """

    def __init__(self, channels: int = 3, side: int = 7):
        super().__init__()
        if side < 1 or side % 2 == 0:
            raise ConfigError(f"side={side}: a patch around a pixel has an odd side")
        self.arguments = {"channels": channels, "side": side}
        self.side = side
        self.patches = nn.Identity()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Returns the patches of x (B, channels, H, W)."""
        padded = F.pad(x * self.scale, [self.side // 2] * 4, mode="replicate")
        return self.patches(F.unfold(padded, self.side).unflatten(2, x.shape[-2:]))


def open_reference(
    source: str | Path,
    family: str,
    config: Any,
    revision: str | None,
    init_seed: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Backbone:
    """Opens something that is no diffusion network in the form of one, so that it is read and judged like one.

    Args:
        source: For "timm" a file of weights, a model's name or a hub id; for "latents" an autoencoder's folder, file
            or hub id; for "pixels" the word "pixels".
        family: "timm", "latents" or "pixels".
        config: For "timm" the model's name, or its arguments with the name under "model"; needed with a file of
            weights. For "pixels" None or {"channels": 1 or 3, "side": odd}.
        revision: Hub revision of an autoencoder.
        init_seed: Random weights from this seed in place of the trained ones.
        device: Where it goes.
        dtype: Element type of its weights.

    Raises:
        UnknownNameError: timm has no such model.
        CheckpointError: Weights are missing or do not fit.
        ConfigError: The arguments do not belong to the family.
    """
    if family == "timm":
        network = _timm(source, config, init_seed, device)
        return TimmBackbone(folders.cast(network, device, dtype), Path(str(source)).name)
    if init_seed is not None:
        raise ConfigError(f"init_seed: family {family!r} has no weights that could be drawn")
    if family == "pixels":
        if str(source) != "pixels" or not isinstance(config, (Mapping, type(None))):
            raise ConfigError(f"family 'pixels' takes the source 'pixels' and config channels, side; got {source!r}")
        network = PixelPatches(**dict(config or {}))
        size, codec, blocks = 32, None, ["patches"]
        channels = network.arguments["channels"]
    else:
        if config is not None:
            raise ConfigError("family 'latents' takes no config; an autoencoder's folder names its own class")
        place = find(source, revision, with_weights=device.type != "meta")
        codec = folders.load_codec(place, device, dtype)
        network, size, channels, blocks = Latents(), 32, codec.latent_channels, ["latents"]
    network = folders.cast(network, device, dtype)
    name = Path(str(source)).name
    return ModuleBackbone(
        network, FlowSchedule(), in_channels=channels, sample_size=size, codec=codec, blocks=blocks, name=name
    )


def _timm(source: str | Path, config: Any, init_seed: int | None, device: torch.device) -> nn.Module:
    """Builds a model of timm and fills it from a file, from the hub, or from timm's own download."""
    import timm  # takes a second, and few need it

    place = Path(source).expanduser()
    file = place if place.suffix in (".pt", ".pth", ".safetensors") else None
    if file is not None and config is None:
        raise ConfigError(f"{source} is a file of weights; give the timm model it belongs to as config")
    given = dict(config) if isinstance(config, Mapping) else {"model": config or str(source)}
    if "model" not in given:
        raise ConfigError("config of a timm model needs its name under 'model'")
    name = given.pop("model")
    if "/" in name and ":" not in name:
        name = f"hf-hub:{name}"
    elif ":" not in name and not timm.is_model(name.split(".")[0]):
        raise UnknownNameError("timm model", name, timm.list_models())
    if file is not None and not file.is_file():
        raise CheckpointError(f"no such file: {file}")
    fetch = file is None and init_seed is None and device.type != "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(init_seed or 0)
        try:
            network = timm.create_model(name, pretrained=fetch, **given)
        except Exception as error:  # timm's own, network and keyword errors have no common base
            reason = " ".join(str(error).split())
            raise CheckpointError(f"timm cannot make {name!r}: {reason}") from error
    network.arguments = {"model": name, **given}
    if file is not None and init_seed is None and device.type != "meta":
        state = _renamed(read_state(file), network)
        check_state(file, network, state, "timm")
        network.load_state_dict(state)
    return network


def _renamed(state: State, network: nn.Module) -> State:
    """Gives the keys of EfficientNet-PyTorch (Melas-Kyriazi), `_blocks.3._depthwise_conv.weight`, the names of timm.

    Both list the same tensors in the same order.
    """
    if not any(re.match(r"_blocks\.\d+\._depthwise_conv", key) for key in state):
        return state
    own = network.state_dict()
    if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in own.values()]:
        raise CheckpointError(
            "these are weights of EfficientNet-PyTorch, and not of this timm model; its counterpart is that of the "
            "same size whose name begins with tf_, such as tf_efficientnet_lite0"
        )
    return dict(zip(own, state.values(), strict=True))
