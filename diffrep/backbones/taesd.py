"""The tiny autoencoders of madebyollin/taesd (MIT), read from their own files: TAESD, TAESD3, TAEF1, TAEF2."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from diffrep.errors import CheckpointError, ConfigError

WIDTH = 64


class _Block(nn.Module):
    """Three convolutions beside a skip; with `pooled`, a bottleneck of global contrast comes first (TAEF2)."""

    def __init__(self, pooled: bool = False):
        super().__init__()
        self.conv = nn.Sequential(_conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH))
        self.pool = (
            nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
            if pooled
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    """Keeps latents within 3 standard units, smoothly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class TAESD(nn.Module):
    """Encoder and decoder with 8 x reduction. Keys are `encoder.{i}...` and `decoder.{i}...`.

    Args:
        latent_channels: 4 for TAESD and TAESDXL, 16 for TAESD3 and TAEF1, 32 for TAEF2.
        pooled: Whether the blocks at the lowest resolution have the pooled branch of TAEF2.
    """

    def __init__(self, latent_channels: int, pooled: bool = False):
        super().__init__()
        self.latent_channels = latent_channels

        def down() -> nn.Module:
            return _conv(WIDTH, WIDTH, stride=2, bias=False)

        def up() -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), _conv(WIDTH, WIDTH, bias=False)]

        def three(pooled: bool = False) -> list[nn.Module]:
            return [_Block(pooled) for _ in range(3)]

        self.encoder = nn.Sequential(
            *[_conv(3, WIDTH), _Block(), down(), *three(), down(), *three(), down(), *three(pooled)],
            _conv(WIDTH, latent_channels),
        )
        self.decoder = nn.Sequential(
            *[_Clamp(), _conv(latent_channels, WIDTH), nn.ReLU(), *three(pooled), *up(), *three(), *up(), *three()],
            *[*up(), _Block(), _conv(WIDTH, 3)],
        )

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] to latents (B, latent_channels, H/8, W/8)."""
        return self.encoder(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to images."""
        return self.decoder(latents)


def find_taesd(place: Path) -> tuple[Path, Path] | None:
    """Returns the files `NAME_encoder.*` and `NAME_decoder.*` of a folder, or None when it holds no such pair.

    Args:
        place: The folder, or one of its encoders.

    Raises:
        ConfigError: The folder holds several pairs.
    """
    files = [*place.glob("*_encoder.pth"), *place.glob("*_encoder.safetensors")] if place.is_dir() else [place]
    pairs = [(file, file.with_name(file.name.replace("_encoder.", "_decoder."))) for file in sorted(files)]
    found = [(encoder, decoder) for encoder, decoder in pairs if decoder != encoder and decoder.is_file()]
    if len(found) > 1:
        names = ", ".join(encoder.name for encoder, _ in found)
        raise ConfigError(f"{place} holds several autoencoders; name the encoder's file as codec: {names}")
    return found[0] if found else None


def taesd_from(encoder: dict[str, torch.Tensor], decoder: dict[str, torch.Tensor]) -> TAESD:
    """Builds the autoencoder that a pair of state dicts belongs to, on the device of torch's default.

    Raises:
        CheckpointError: The keys are not those of a TAESD.
    """
    parts = [(f"encoder.{k}", v) for k, v in encoder.items()] + [(f"decoder.{k}", v) for k, v in decoder.items()]
    state = dict(parts)
    try:
        latents = state["decoder.1.weight"].shape[1]
        network = TAESD(latents, pooled=any(".pool." in key for key in state))
        network.load_state_dict({key: value.float() for key, value in state.items()})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"these are not the weights of a TAESD autoencoder: {error}") from error
    return network


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=bias)
