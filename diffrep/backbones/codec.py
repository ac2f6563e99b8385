"""Images to the network's input space and its Gaussian posterior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffrep.errors import ConfigError


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over the network's inputs, already shifted and scaled.

    Attributes:
        mean: (B, C, h, w).
        std: (B, C, h, w), or None when encoding is deterministic.
    """

    mean: torch.Tensor
    std: torch.Tensor | None = None


class Codec(ABC):
    """What stands between images in [0, 1] and the network.

    Attributes:
        image_channels: Channels of the images.
        latent_channels: Channels of the network's input.
        downscale: Image pixels per cell of the network's input, along one side.
        random: Whether the posterior has a spread.
    """

    image_channels: int
    latent_channels: int
    downscale: int
    random: bool

    @abstractmethod
    def encode(self, images: torch.Tensor) -> Posterior:
        """Encodes images (B, image_channels, H, W) in [0, 1]; gradients are the caller's affair."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values that identify the codec; they go into a store's meta.json."""

    def module(self) -> nn.Module | None:
        """Returns the codec's network, or None."""
        return None


class IdentityCodec(Codec):
    """The network takes pixels: [0, 1] becomes [-1, 1]."""

    downscale = 1
    random = False

    def __init__(self, channels: int):
        self.image_channels = self.latent_channels = channels

    def encode(self, images: torch.Tensor) -> Posterior:
        """Rescales the images."""
        return Posterior(images * 2 - 1)

    def describe(self) -> dict[str, Any]:
        """Returns the kind."""
        return {"kind": "identity"}


class VAECodec(Codec):
    """An autoencoder of diffusers: `AutoencoderKL` (a posterior) or `AutoencoderTiny` (none).

    Latents are (z - shift_factor) * scaling_factor with the factors of its config.

    Raises:
        ConfigError: The class gives neither a posterior nor latents.
    """

    def __init__(self, vae: nn.Module):
        self.vae = vae
        config = vae.config
        self.image_channels = config.in_channels
        self.latent_channels = config.latent_channels
        self.kind = type(vae).__name__
        self.random = self.kind == "AutoencoderKL"
        if self.kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise ConfigError(f"codec class {self.kind} is not supported; use AutoencoderKL or AutoencoderTiny")
        depth = len(config.block_out_channels if self.random else config.encoder_block_out_channels)
        self.downscale = 2 ** (depth - 1)
        self.scale = config.scaling_factor
        self.shift = config.get("shift_factor") or 0.0

    def encode(self, images: torch.Tensor) -> Posterior:
        """Runs the encoder."""
        encoded = self.vae.encode((images * 2 - 1).to(self.vae.dtype))
        if not self.random:
            return Posterior((encoded.latents - self.shift) * self.scale)
        posterior = encoded.latent_dist
        return Posterior((posterior.mean - self.shift) * self.scale, posterior.std * self.scale)

    def describe(self) -> dict[str, Any]:
        """Returns class, factors and size."""
        return {"kind": self.kind, "scale": self.scale, "shift": self.shift, "downscale": self.downscale}

    def module(self) -> nn.Module:
        """Returns the autoencoder."""
        return self.vae
