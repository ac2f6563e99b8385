"""Images to the network's input space and its Gaussian posterior."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffrep.backbones.taesd import TAESD
from diffrep.errors import ConfigError
from diffrep.taps import to_meta

VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


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

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents (B, latent_channels, h, w) to images in [0, 1].

        Raises:
            ConfigError: This codec has no decoder.
        """
        raise ConfigError(f"{type(self).__name__} has no decoder")

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values that identify the codec; they go into a store's meta.json."""

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns (h, w) of the latents of images of (height, width) pixels.

        Measured on the meta device: encoders round sides that their stride does not divide up or down.

        Raises:
            ConfigError: This codec cannot encode such images.
        """
        if self.module() is None:
            return height // self.downscale, width // self.downscale
        images = torch.zeros(1, self.image_channels, height, width, device="meta")
        meta = self.with_module(to_meta(self.module()))
        try:
            return tuple(meta.encode(images).mean.shape[-2:])
        except RuntimeError as error:
            raise ConfigError(
                f"{type(self.module()).__name__} cannot encode images of {height}x{width} pixels ({error}); give "
                f"sides that are divisible by {self.downscale}"
            ) from error

    def with_module(self, module: nn.Module) -> Codec:
        """Returns this codec around another copy of its network, such as one on the meta device."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, nn.Module):
                setattr(twin, name, module)
        return twin

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

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Rescales back."""
        return (latents / 2 + 0.5).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Returns the kind."""
        return {"kind": "identity"}


class VAECodec(Codec):
    """An autoencoder of diffusers: `AutoencoderKL` (a posterior), `AutoencoderTiny` or `AutoencoderDC` (none).

    Latents are (z - shift_factor) * scaling_factor with the factors of its config. An autoencoder whose config says
    `force_upcast` (SDXL's overflows in half precision) runs in fp32.

    Raises:
        ConfigError: The class is another, or its latents are standardised channel by channel.
    """

    def __init__(self, vae: nn.Module):
        self.kind = type(vae).__name__
        if self.kind not in VAE_CLASSES:
            raise ConfigError(f"codec class {self.kind} is not supported; use {', '.join(VAE_CLASSES)}")
        config = vae.config
        if config.get("latents_mean") is not None or config.get("latents_std") is not None:
            raise ConfigError(
                "an autoencoder with latents_mean and latents_std is not supported; pass a Codec of your own"
            )
        self.vae = vae.float() if config.get("force_upcast") and vae.dtype == torch.float16 else vae
        self.image_channels = config.in_channels
        self.latent_channels = config.latent_channels
        self.random = self.kind == "AutoencoderKL"
        widths = config.block_out_channels if self.random else config.encoder_block_out_channels
        self.downscale = 2 ** (len(widths) - 1)
        self.scale = config.scaling_factor
        self.shift = config.get("shift_factor") or 0.0

    def encode(self, images: torch.Tensor) -> Posterior:
        """Runs the encoder."""
        encoded = self.vae.encode((images * 2 - 1).to(self.vae.dtype))
        if self.random:
            posterior = encoded.latent_dist
            return Posterior((posterior.mean - self.shift) * self.scale, posterior.std * self.scale)
        latents = encoded.latents if self.kind == "AutoencoderTiny" else encoded.latent
        return Posterior((latents - self.shift) * self.scale)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images (B, image_channels, H, W) in [0, 1]."""
        decoded = self.vae.decode((latents / self.scale + self.shift).to(self.vae.dtype)).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Returns class, factors and size."""
        return {"kind": self.kind, "scale": self.scale, "shift": self.shift, "downscale": self.downscale}

    def module(self) -> nn.Module:
        """Returns the autoencoder."""
        return self.vae


class TAESDCodec(Codec):
    """A tiny autoencoder in the layout of its authors (`*_encoder.pth` and `*_decoder.pth`).

    Latents are what the encoder gives: these networks are trained on scaled latents.
    """

    random = False
    image_channels = 3
    downscale = 8

    def __init__(self, network: TAESD):
        self.network = network
        self.latent_channels = network.latent_channels

    def encode(self, images: torch.Tensor) -> Posterior:
        """Runs the encoder."""
        return Posterior(self.network.encode(images.to(self._dtype)))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images (B, 3, H, W) in [0, 1]."""
        return self.network.decode(latents.to(self._dtype)).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Returns kind and size."""
        return {"kind": "TAESD", "latent_channels": self.latent_channels, "downscale": self.downscale}

    def module(self) -> nn.Module:
        """Returns the autoencoder."""
        return self.network

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype
