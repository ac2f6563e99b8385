"""Descriptors of images that are at hand, without a store."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffrep.backbones import Backbone, load_backbone
from diffrep.backbones.conditioning import Cond
from diffrep.config import FeatureRequest
from diffrep.config.correspond import DescriptorConfig
from diffrep.correspond.descriptor import join, open_aggregation
from diffrep.errors import ConfigError
from diffrep.extract import Extractor
from diffrep.extract.job import read_cond
from diffrep.heads.aggregation import AggregationNetwork


@dataclass(frozen=True)
class Matcher:
    """What is compared.

    Attributes:
        name: In tables.
        backbone: The frozen network.
        request: Layers and levels.
        cond: Condition of all images.
        join: One descriptor of all layers and levels, else one for each.
        network: Reads the maps in place of that.
        batch_size: Rows of one forward.
    """

    name: str
    backbone: Backbone
    request: FeatureRequest
    cond: Cond = None
    join: bool = False
    network: AggregationNetwork | None = None
    batch_size: int = 64

    def maps(self, images: torch.Tensor, ids: list[str]) -> dict[str, torch.Tensor]:
        """Returns descriptors (B, C, h, w) by name."""
        found = dict(Extractor(self.backbone, self.request, self.batch_size)(images, ids, self.cond).items())
        flat = [f"{layer} at {level}" for (layer, level), one in found.items() if one.ndim != 4]
        if flat:
            raise ConfigError(f"{flat[0]} is no map; name layers that give maps (C, H, W)")
        if self.network is not None:
            with torch.no_grad():
                return {self.name: self.network(found).float()}
        if self.join or len(found) == 1:
            return {self.name: join([one.float() for one in found.values()])}
        return {f"{self.name}, {layer} at {level}": one.float() for (layer, level), one in found.items()}


def matcher_of(config: DescriptorConfig, backbone: Backbone, joined: bool | None = None) -> Matcher:
    """Returns what a config describes places with.

    Args:
        config: Request, condition, and what becomes of several maps.
        backbone: The loaded backbone.
        joined: In place of `config.join`.
    """
    network = None if config.aggregation is None else open_aggregation(config.aggregation)
    joined = config.join if joined is None else joined
    cond = read_cond(config.cond)
    return Matcher(backbone.name, backbone, config.request, cond, joined, network, config.batch_size)


def pixel_matcher(side: int = 7, channels: int = 3) -> Matcher:
    """Returns what a backbone is compared with: the raw pixels around each pixel, as a descriptor.

    Args:
        side: Of the patch, odd.
        channels: Of the images.
    """
    settings = {"side": side, "channels": channels}
    backbone = load_backbone("pixels", family="pixels", config=settings, device="cpu")
    return Matcher(f"raw pixels, {side} x {side}", backbone, FeatureRequest("patches", "clean"))
