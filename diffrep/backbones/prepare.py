"""What a training set is made of, in one pass over the images: latents and targets, and those of mirrored images."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffrep.backbones import folders
from diffrep.backbones.codec import Codec, IdentityCodec, Posterior
from diffrep.backbones.encoders import TargetEncoder, open_encoder
from diffrep.backbones.fingerprint import hash_of_weights
from diffrep.backbones.module import ModuleBackbone
from diffrep.backbones.sources import find
from diffrep.config import validate
from diffrep.config.align import PrepareConfig
from diffrep.errors import ConfigError
from diffrep.noise import FlowSchedule

FLIP = "_flip"
# Side that a dry run without images is made at, at least.
EXAMPLE_SIDE = 128


class ImagesCodec(Codec):
    """Hands the images on as they are, in [0, 1]: the network behind it has codecs of its own.

    Args:
        channels: Of the images.
    """

    downscale = 1
    random = False

    def __init__(self, channels: int):
        self.image_channels = self.latent_channels = channels

    def encode(self, images: torch.Tensor) -> Posterior:
        """Returns the images."""
        return Posterior(images)

    def describe(self) -> dict[str, Any]:
        """Returns the kind."""
        return {"kind": "images"}


class Preparation(nn.Module):
    """A codec and target encoders side by side, with a named tap for what each gives.

    Taps, in the order in which they run: `latents` (the posterior's mode) or `moments` (mean and standard deviation,
    one above the other), and `targets.NAME` for each encoder; with flips each is followed by the same of the mirrored
    image, `latents_flip`, `moments_flip`, `targets.NAME_flip`.

    Args:
        codec: Images to latents.
        encoders: Target encoders by name.
        moments: Give the posterior's moments in place of its mode.
        flip: Give everything of the mirrored image too.
    """

    def __init__(self, codec: Codec, encoders: Mapping[str, TargetEncoder], moments: bool, flip: bool):
        super().__init__()
        self.kind = "moments" if moments else "latents"
        self.endings = ("", FLIP) if flip else ("",)
        self.autoencoder = codec.module()
        self.encoders = nn.ModuleDict({name: encoder.network for name, encoder in encoders.items()})
        # Around the modules above, or around those of a copy of this one, when they are called.
        self.codec = codec.with_module(nn.Identity())
        self.readers = {name: encoder.with_network(nn.Identity()) for name, encoder in encoders.items()}
        self.taps = [self.kind + ending for ending in self.endings]
        for tap in self.taps:
            self.add_module(tap, nn.Identity())
        names = [name + ending for name in encoders for ending in self.endings]
        self.targets = nn.ModuleDict({name: nn.Identity() for name in names})
        self.taps += [f"targets.{name}" for name in names]
        self.scale = nn.Parameter(torch.ones(()))  # a network has a device

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Runs everything on images (B, C, H, W) in [0, 1]; returns them."""
        codec = self.codec if self.autoencoder is None else self.codec.with_module(self.autoencoder)
        for ending in self.endings:
            posterior = codec.encode(images.flip(-1) if ending else images)
            parts = (posterior.mean, posterior.std) if self.kind == "moments" else (posterior.mean,)
            self.get_submodule(self.kind + ending)(torch.cat(parts, dim=1))
        for name, reader in self.readers.items():
            encoder = reader.with_network(self.encoders[name])
            for ending in self.endings:
                self.targets[name + ending](encoder(images.flip(-1) if ending else images))
        return images


class PrepareBackbone(ModuleBackbone):
    """Images to all that a network and its alignment are trained on, read like a backbone at level "clean".

    Args:
        codec: Images to latents.
        encoders: Target encoders by name.
        moments: Give the posterior's moments in place of its mode.
        flip: Give everything of the mirrored image too.
        device: Where everything is.
        dtype: Element type of the weights.
        name: Stored with the features.
    """

    def __init__(
        self,
        codec: Codec,
        encoders: Mapping[str, TargetEncoder],
        moments: bool,
        flip: bool,
        device: torch.device,
        dtype: torch.dtype,
        name: str,
    ):
        network = Preparation(codec, encoders, moments, flip)
        network.scale = nn.Parameter(torch.ones((), device=device, dtype=dtype))
        unit = math.lcm(codec.downscale, *(encoder.multiple for encoder in encoders.values()))
        super().__init__(
            network,
            FlowSchedule(),
            in_channels=codec.image_channels,
            sample_size=unit * math.ceil(EXAMPLE_SIDE / unit),
            codec=ImagesCodec(codec.image_channels),
            call=lambda module, x, time, cond: module(x),
            blocks=network.taps,
            name=name,
        )
        self.latent_codec, self.target_encoders = codec, dict(encoders)

    @classmethod
    def of_codec(cls, codec: Codec, moments: bool, device: torch.device, name: str) -> PrepareBackbone:
        """Returns what gives the latents, or the moments, of a codec that is loaded already, and nothing else."""
        return cls(codec, {}, moments, False, device, _dtype(codec), name)

    @property
    def input_dtype(self) -> torch.dtype:
        """Images stay fp32, whatever the weights are."""
        return torch.float32

    def describe(self) -> dict[str, Any]:
        """Returns plain values that identify codec, encoders and what is done with the images."""
        autoencoder = self.latent_codec.module()
        return super().describe() | {
            "codec": self.latent_codec.describe(),
            # Of the autoencoder alone: latents may serve whoever has the same, whatever else is in the store.
            "codec_weights": None if autoencoder is None else hash_of_weights(autoencoder),
            "codec_dtype": str(_dtype(self.latent_codec)).removeprefix("torch."),
            "encoders": {name: encoder.describe() for name, encoder in self.target_encoders.items()},
            "moments": self.network.kind == "moments",
            "flip": FLIP in self.network.endings,
        }


def _dtype(codec: Codec) -> torch.dtype:
    weights = () if codec.module() is None else codec.module().parameters()
    return next((weight.dtype for weight in weights), torch.float32)


def open_prepare(
    source: str | Path,
    config: Any,
    revision: str | None,
    init_seed: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> PrepareBackbone:
    """Opens a preparation of training data; `diffrep extract` reads all of it with `layers: [blocks]`, level "clean".

    What is configured is computed, up to the last layer that is asked for: targets alone come cheapest of "pixels".

    Args:
        source: "pixels" (latents are pixels in [-1, 1]), or an autoencoder's folder, file or hub id.
        config: None, or a dict of the keys of `diffrep.config.align.PrepareConfig`.
        revision: Hub revision of an autoencoder.
        init_seed: None; there is nothing here to be trained.
        device: Where it goes.
        dtype: Element type of the weights.

    Raises:
        ConfigError: A key or value is wrong, no preset is known of an encoder, or a codec has no moments.
        CheckpointError: Weights are missing or do not fit.
        LayerError: An encoder has no such layer.
    """
    if init_seed is not None:
        raise ConfigError("init_seed: family 'prepare' trains nothing, so it has no untrained counterpart")
    if not isinstance(config, (Mapping, type(None))):
        known = ", ".join(PrepareConfig.model_fields)
        raise ConfigError(f"config of family 'prepare' is a dict of {known}; got {config!r}")
    wanted = validate(PrepareConfig, dict(config or {}), "config of family 'prepare'")
    for name in wanted.encoders:
        check_name("encoders", name)
    codec = _codec(source, wanted.channels, revision, device, dtype)
    if wanted.moments and not codec.random:
        raise ConfigError(
            f"moments: {source} gives one latent for each image, without a spread; leave moments out, and take "
            "the layer 'latents'"
        )
    encoders = {name: open_encoder(one, device, dtype) for name, one in wanted.encoders.items()}
    return PrepareBackbone(codec, encoders, wanted.moments, wanted.flip, device, dtype, Path(str(source)).name)


def _codec(
    source: str | Path, channels: int | None, revision: str | None, device: torch.device, dtype: torch.dtype
) -> Codec:
    if str(source) == "pixels":
        return IdentityCodec(channels or 3)
    codec = folders.load_codec(find(source, revision, with_weights=device.type != "meta"), device, dtype)
    if channels not in (None, codec.image_channels):
        raise ConfigError(f"channels: the autoencoder takes images of {codec.image_channels}; leave it out")
    return codec


def check_name(what: str, name: str) -> None:
    """Checks the name of targets or of an alignment term, which becomes part of layers, files and modules.

    Args:
        what: The key whose names are meant.
        name: The name.

    Raises:
        ConfigError: It cannot be one.
    """
    # A ModuleDict refuses what is an attribute of its own.
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name.endswith(FLIP) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"{what}: {name!r} cannot be a name here; take letters, digits, _ and -, from a letter on, no word of "
            f"Python's dicts or torch's modules, and no ending {FLIP}"
        )
