"""What describes each place of an image: maps of a frozen network, read once for each image of a set of pairs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from diffrep.backbones import Backbone
from diffrep.config import DataConfig, ExtractConfig, digest, to_plain
from diffrep.config.correspond import DescriptorConfig
from diffrep.config.protocol import Protocol
from diffrep.correspond.matching import Side, prepare
from diffrep.data.images import ImageSet, Reader
from diffrep.data.pairs import PairSet, frames, pair_images
from diffrep.errors import ConfigError, UnknownNameError
from diffrep.extract.job import ExtractJob, open_backbone, read_cond
from diffrep.extract.plan import Plan
from diffrep.heads import load_head
from diffrep.heads.aggregation import AggregationNetwork
from diffrep.store import FeatureStore

# Bytes of prepared maps that are kept; others are read from the mapped files again.
MEMORY = 2 << 30


@dataclass(frozen=True)
class Cell:
    """Which (layer, level) make one descriptor.

    Attributes:
        name: In tables.
        parts: What is read.
    """

    name: str
    parts: tuple[tuple[str, str], ...]


class Descriptor:
    """Descriptors of all images of a set of pairs.

    Args:
        name: In tables.
        config: What describes a place.
        pairs: The images.
        home: Folder that the stores go to; features that are there already are kept.
        data: What the stores call the images.
        unit_size: Images of one unit of extraction.
        workers: Processes that decode images.
        live: Read the backbone whenever maps are asked for, and store nothing.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.

    Raises:
        ConfigError: The aggregation network reads what the request does not hold.
    """

    def __init__(
        self,
        name: str,
        config: DescriptorConfig,
        pairs: PairSet,
        home: Path,
        data: str,
        unit_size: int = 100,
        workers: int = 0,
        live: bool = False,
        backbone: Backbone | None = None,
    ):
        self.name, self.config, self.pairs, self.home = name, config, pairs, home
        self.data, self.unit_size, self.workers, self.live = data, unit_size, workers, live
        self.backbone = backbone or open_backbone(config.backbone)
        self.size = config.size or self.backbone.image_size
        self.frames = frames(pairs, self.size, config.fit)
        self.network = None if config.aggregation is None else open_aggregation(config.aggregation)
        self._jobs: dict[bool, ExtractJob] = {}
        self._stores: dict[bool, FeatureStore] = {}

    @cached_property
    def cells(self) -> list[Cell]:
        """The descriptors that are judged."""
        plan = self.plan()
        every = [(layer, level) for layer in plan.addresses for level in plan.levels.levels]
        if self.network is not None:
            wanted = [(layer, level) for level in self.network.levels for layer in self.network.layers]
            missing = [pair for pair in wanted if pair not in every]
            if missing:
                names = ["@".join(pair) for pair in every]
                raise UnknownNameError("map that the aggregation network reads,", "@".join(missing[0]), names)
            return [Cell(self.name, tuple(wanted))]
        if self.config.join or len(every) == 1:
            return [Cell(self.name, tuple(every))]
        return [Cell(f"{self.name}, {layer} at {level}", ((layer, level),)) for layer, level in every]

    def plan(self) -> Plan:
        """Returns the work for one image."""
        return self._job(False).plan()

    def extract(self, mirrored: bool = False) -> FeatureStore:
        """Reads what is missing of the images, or of their mirror images, and returns the store."""
        if mirrored not in self._stores:
            self._stores[mirrored] = self._job(mirrored).run()
        return self._stores[mirrored]

    def features(
        self, parts: tuple[tuple[str, str], ...], images: list[int], mirrored: bool = False
    ) -> dict[tuple[str, str], torch.Tensor]:
        """Returns the maps (B, C, h, w) of some images by (layer, level), on the backbone's device."""
        rows, device = np.array(images), self.backbone.device
        if not self.live:
            store = self.extract(mirrored)
            return {pair: store.take(*pair, rows).to(device) for pair in parts}
        source = self.images(mirrored)
        pixels = torch.stack([source[image] for image in images])
        return self.read(parts, pixels, [source.id(image) for image in images])

    def read(
        self, parts: tuple[tuple[str, str], ...], pixels: torch.Tensor, ids: list[str]
    ) -> dict[tuple[str, str], torch.Tensor]:
        """Reads the backbone, as `features` does, on images (B, C, H, W) in [0, 1] of the canvas's size."""
        found = self._job(False).extractor(pixels, ids, self._cond)
        return {pair: found[pair].to(self.backbone.device) for pair in parts}

    def map(self, cell: Cell, image: int, mirrored: bool = False) -> torch.Tensor:
        """Returns the descriptors of an image (C, h, w) in fp32, on the backbone's device."""
        found = self.features(cell.parts, [image], mirrored)
        if self.network is not None:
            with torch.no_grad():
                return self.network.to(self.backbone.device)(found)[0].float()
        maps = [one.float() for one in found.values()]
        return maps[0][0] if len(maps) == 1 else join(maps)[0]

    def sides(self, cell: Cell, protocol: Protocol) -> Sides:
        """Returns the images prepared for a protocol."""
        return Sides(self, cell, protocol)

    def images(self, mirrored: bool = False) -> ImageSet:
        """Returns the images on their canvas, or their mirror images."""
        images = pair_images(self.pairs, self.backbone.image_channels, self.size, self.config.fit)
        return mirror_images(images) if mirrored else images

    @cached_property
    def _cond(self) -> Any:
        return read_cond(self.config.cond)

    def _job(self, mirrored: bool) -> ExtractJob:
        if mirrored not in self._jobs:
            self._jobs[mirrored] = self._new_job(self.images(mirrored))
        return self._jobs[mirrored]

    def _new_job(self, images: ImageSet) -> ExtractJob:
        # Another network, request or set of images is another store, so that a run folder serves many.
        parts = [to_plain(self.config.request), self.size, self.config.fit, self.config.cond, images.fingerprint()]
        weights = "" if self.backbone.device.type == "meta" else self.backbone.weights_hash
        config = ExtractConfig(
            backbone=self.config.backbone,
            data=DataConfig(path=self.data, size=self.size),
            request=self.config.request,
            out=self.home / digest([*parts, weights]),
            cond=self.config.cond,
            batch_size=self.config.batch_size,
            unit_size=self.unit_size,
            workers=self.workers,
        )
        return ExtractJob(config, self.backbone, images)


class Sides:
    """Prepared maps by image: as many as `MEMORY` holds are kept, those used last."""

    def __init__(self, descriptor: Descriptor, cell: Cell, protocol: Protocol):
        self.descriptor, self.cell, self.protocol = descriptor, cell, protocol
        self._kept: OrderedDict[tuple[int, bool], Side] = OrderedDict()
        self._bytes = 0

    def __call__(self, image: int, mirrored: bool = False) -> Side:
        """Returns an image's map, or its mirror image's."""
        key = (image, mirrored)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        features = self.descriptor.map(self.cell, image, mirrored)
        side = prepare(features, self.descriptor.frames[image], self.protocol)
        self._kept[key] = side
        self._bytes += side.features.nbytes
        while self._bytes > MEMORY and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.features.nbytes
        return side


class _MirrorReader:
    """Another reader's images, mirrored; noise follows the id, so a mirror image has its own."""

    def __init__(self, reader: Reader):
        self.reader, self.labels = reader, reader.labels
        self.ids = [f"{name}#mirrored" for name in reader.ids]

    def image(self, index: int) -> Image.Image:
        """Reads one image."""
        return ImageOps.mirror(self.reader.image(index))

    def fingerprint(self) -> list[object]:
        """Returns what identifies the whole."""
        return [*self.reader.fingerprint(), "mirrored"]


def mirror_images(images: ImageSet) -> ImageSet:
    """Returns the mirror images of a set, "#mirrored" behind their ids."""
    readers = {name: _MirrorReader(reader) for name, reader in images.readers.items()}
    return ImageSet(readers, images.transform, images.classes)


def join(maps: list[torch.Tensor]) -> torch.Tensor:
    """Puts maps (B, C_l, h_l, w_l) side by side, each of unit length at every place, at the size of the largest.

    Returns:
        (B, sum of C_l, h, w).
    """
    size = [max(one.shape[axis] for one in maps) for axis in (-2, -1)]
    resized = [F.interpolate(one, size, mode="bilinear") if list(one.shape[-2:]) != size else one for one in maps]
    return torch.cat([F.normalize(one, dim=1) for one in resized], dim=1)


def open_aggregation(folder: str) -> AggregationNetwork:
    """Opens a trained aggregation network.

    Raises:
        CheckpointError: There is none.
        ConfigError: The head is another one.
    """
    head = load_head(folder)
    if not isinstance(head, AggregationNetwork):
        raise ConfigError(f"{folder} holds a {type(head).__name__}; aggregation takes an AggregationNetwork")
    return head
