"""What a run is trained on, a batch at a time: images, or latents and targets of a store."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from diffrep.backbones.encoders import open_encoder
from diffrep.backbones.prepare import FLIP
from diffrep.config import EncoderConfig, TrainConfig, digest
from diffrep.data import ImageSet, open_images
from diffrep.errors import ConfigError, StoreError, UnknownNameError
from diffrep.store import FeatureStore
from diffrep.store.layout import changes
from diffrep.store.writer import BESIDE_THE_POINT, VERSIONS, flatten
from diffrep.train.imported import IMPORTED
from diffrep.train.order import Picks

TARGETS = "targets."


class TrainingSet(Dataset, ABC):
    """Samples of a run. Indexing with (rows, mirrored) gives a whole batch, for a loader with `batch_size=None`.

    A batch is a dict of "image" (B, C, H, W) fp32 in [0, 1], "latents" (B, C, h, w) or "moments" (B, 2C, h, w) fp32;
    "targets.NAME" (B, D, h, w) in the stored element type; and "label" (B,) int64 where each sample has one.

    Attributes:
        kind: "image", "latents" or "moments".
        shape: (C, H, W) of that.
        ids: Sample ids.
        labels: (N,) int64, or None.
        classes: Number of classes, or None.
        target_channels: Width D of each of the targets, by name.
        mirror: Whether mirrored samples can be had.
        images: The images, where the run is trained on them.
        store: The store, where it is trained on one.
        target_store: Where the targets are; that store, or a second one.
    """

    kind: str
    shape: tuple[int, int, int]
    ids: list[str]
    labels: np.ndarray | None
    classes: int | None
    target_channels: dict[str, int]
    mirror: bool
    images: ImageSet | None = None
    store: FeatureStore | None = None
    target_store: FeatureStore | None = None

    @property
    def labelled(self) -> bool:
        """Whether each sample has one label."""
        return self.labels is not None

    @abstractmethod
    def tensors(self, rows: np.ndarray, mirrored: np.ndarray) -> dict[str, torch.Tensor]:
        """Returns all of a batch but its labels.

        Args:
            rows: Places of the samples (B,) int64, in any order.
            mirrored: Which of them are wanted as mirror images, (B,) bool.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns plain values that change when other samples, or others of their numbers, are read."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, picks: Picks) -> dict[str, torch.Tensor]:
        rows, mirrored = np.asarray(picks[0], dtype=np.int64), np.asarray(picks[1], dtype=bool)
        found = self.tensors(rows, mirrored)
        return found if self.labels is None else found | {"label": torch.from_numpy(self.labels[rows])}


class ImageTraining(TrainingSet):
    """Images, mirrored when they are read.

    Args:
        images: The images.

    Raises:
        ConfigError: A label is no class.
    """

    kind, mirror = "image", True

    def __init__(self, images: ImageSet):
        self.images = images
        size = images.transform.size
        self.shape = tuple(images[0].shape) if size is None else (images.transform.channels, size, size)
        used = [(reader, len(images.splits[name])) for name, reader in images.readers.items()]
        self.ids = [one for reader, count in used for one in reader.ids[:count]]
        single = images.labelled and not images.multilabel
        self.labels = np.concatenate([reader.labels[:count] for reader, count in used]) if single else None
        self.classes = _count(self.labels, images.classes)
        self.target_channels = {}

    def tensors(self, rows: np.ndarray, mirrored: np.ndarray) -> dict[str, torch.Tensor]:
        """Reads images.

        Raises:
            DataError: One cannot be read.
            ConfigError: They differ in size.
        """
        read = [self.images[row] for row in rows.tolist()]
        sizes = sorted({tuple(image.shape[1:]) for image in read})
        if len(sizes) > 1:
            raise ConfigError(f"the images differ in size, such as {sizes[:2]}; set data.size")
        pixels = torch.stack(read)
        return {"image": torch.where(torch.from_numpy(mirrored)[:, None, None, None], pixels.flip(-1), pixels)}

    def describe(self) -> dict[str, Any]:
        """Returns what identifies files and transform."""
        transform = self.images.transform
        return {
            "kind": self.kind,
            "samples": len(self),
            "fingerprint": self.images.fingerprint(),
            "transform": {"channels": transform.channels, "size": transform.size, "fit": transform.fit},
        }


class StoreTraining(TrainingSet):
    """Latents or moments of a store's split, and targets, of it or of a second store of the same images.

    Args:
        store: As `diffrep extract` makes it of family "prepare" or "latents".
        split: Its split.
        targets: Names of the targets.
        target_store: Where those are; None takes `store`.

    Raises:
        UnknownNameError: There is no such split, or there are no such targets.
        ConfigError: The store holds no latents, or not as maps, or with noise; a label is no class.
        StoreError: The second store holds other images.
    """

    def __init__(
        self, store: FeatureStore, split: str, targets: tuple[str, ...] = (), target_store: FeatureStore | None = None
    ):
        self.store, self.split = store, split
        self.target_store = target_store or store
        kinds = [kind for kind in ("moments", "latents") if kind in store.layers]
        if not kinds:
            raise ConfigError(
                f"the store {store.path} has neither latents nor moments, but {', '.join(store.layers)}; extract them "
                "with backbone.family=prepare"
            )
        self.kind = kinds[0]
        if store.meta["request"]["dtype"] == "float8_e4m3fn":
            raise ConfigError(
                f"the {self.kind} in {store.path} are float8_e4m3fn, too coarse to train on; extract them as float16, "
                "and the targets into a store of their own, named in targets"
            )
        for name in targets:
            find_targets(self.target_store, name)
        if target_store is not None:
            _check_same_images(store, target_store)
        self._layers = [(store, self.kind)] + [(self.target_store, TARGETS + name) for name in targets]
        self.shape, *shapes = (_map_shape(*layer) for layer in self._layers)
        self.target_channels = {name: shape[0] for name, shape in zip(targets, shapes, strict=True)}
        self._rows = store.rows(split)
        self.ids = [store.ids[row] for row in self._rows]
        single = store.labels is not None and store.labels.ndim == 1
        self.labels = store.labels[self._rows] if single else None
        self.classes = _count(self.labels, store.classes)
        # Latents of the identity are pixels, which can be mirrored as they are.
        self._pixels = store.meta["backbone"]["codec"]["kind"] == "identity"

    @property
    def mirror(self) -> bool:
        """Whether mirrored samples can be had."""
        return all(self._has_mirror(*layer) for layer in self._layers)

    def check_mirror(self) -> None:
        """Raises where mirrored samples cannot be had.

        Raises:
            ConfigError: Naming the layers that are missing.
        """
        lacking = [(store, layer) for store, layer in self._layers if not self._has_mirror(store, layer)]
        if lacking:
            layers = ", ".join(layer + FLIP for _, layer in lacking)
            raise ConfigError(
                f"flip needs the layers {layers}, which {lacking[0][0].path} lacks; extract with "
                "backbone.config.flip=true, or train with flip=false"
            )

    def tensors(self, rows: np.ndarray, mirrored: np.ndarray) -> dict[str, torch.Tensor]:
        """Reads latents or moments, and targets."""
        places = self._rows[rows]
        found = {layer: self._read(store, layer, places, mirrored) for store, layer in self._layers}
        return found | {self.kind: found[self.kind].float()}

    def describe(self) -> dict[str, Any]:
        """Returns digests of what the stores say of themselves, and of the ids."""
        described = {
            "kind": self.kind,
            "samples": len(self),
            "split": self.split,
            "ids": hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:16],
            "store": _digest_of(self.store),
        }
        return described | ({"targets": _digest_of(self.target_store)} if self.target_store is not self.store else {})

    def _has_mirror(self, store: FeatureStore, layer: str) -> bool:
        return layer + FLIP in store.layers or (layer == self.kind and self._pixels)

    def _read(self, store: FeatureStore, layer: str, places: np.ndarray, mirrored: np.ndarray) -> torch.Tensor:
        if not mirrored.any():
            return take(store, layer, places)
        self.check_mirror()
        twin = layer + FLIP
        there = twin in store.layers
        flipped = take(store, twin, places[mirrored]) if there else take(store, layer, places[mirrored]).flip(-1)
        found = flipped.new_empty(len(places), *flipped.shape[1:])
        found[torch.from_numpy(mirrored)] = flipped
        found[torch.from_numpy(~mirrored)] = take(store, layer, places[~mirrored])
        return found


def open_training(config: TrainConfig, channels: int) -> TrainingSet:
    """Opens what a run is trained on.

    Args:
        config: The run: its data, or its store, split and the targets that its terms name.
        channels: Channels of the images, 1 or 3; a store has what it has.

    Raises:
        ConfigError: Data and settings do not go together; a mirrored sample is wanted and cannot be had.
        UnknownNameError: A split, or targets of that name, do not exist.
        DataError: The images cannot be read.
        StoreError: A store is missing, unfinished or damaged, or holds targets of other images.
    """
    if config.store is None:
        return ImageTraining(open_images(config.data, channels))
    names = dict.fromkeys(term.stored for term in config.align.values() if term.stored is not None)
    second = None if config.targets is None else FeatureStore(config.targets)
    found = StoreTraining(FeatureStore(config.store), config.store_split, tuple(names), second)
    if config.flip:
        found.check_mirror()
    return found


def find_targets(store: FeatureStore, name: str, what: str = "targets") -> str:
    """Returns the layer of targets.

    Args:
        store: Of family "prepare".
        name: Of the targets; those of mirrored images go with them and are not asked for.
        what: The key that names them.

    Raises:
        UnknownNameError: The store has no such targets.
    """
    layers = [layer for layer in store.layers if layer.startswith(TARGETS) and not layer.endswith(FLIP)]
    if TARGETS + name not in layers:
        known = [layer.removeprefix(TARGETS) for layer in layers]
        raise UnknownNameError(what, name, known, f"The store is {store.path}")
    return TARGETS + name


def check_targets(store: FeatureStore, name: str, config: EncoderConfig) -> None:
    """Raises where stored targets were made by another encoder, or of images that were shown to it otherwise.

    Args:
        store: Of family "prepare".
        name: Of the targets.
        config: The encoder they should come from; it is opened on the CPU, in the element type of the store's.

    Raises:
        UnknownNameError: The store has no such targets.
        ConfigError: They were made otherwise; every key that differs is named.
    """
    recorded = store.meta["backbone"].get("encoders", {})
    if name not in recorded:
        raise UnknownNameError("targets", name, recorded, f"The store is {store.path}")
    # A digest of weights is one of their element type too.
    dtype = getattr(torch, store.meta["backbone"]["dtype"])
    wanted = open_encoder(config, torch.device("cpu"), dtype).describe()
    differ = changes(flatten(recorded[name]), flatten(wanted))
    if differ:
        raise ConfigError(
            f"the cached targets {name!r} in {store.path} were made by another encoder or with other preprocessing; "
            f"extract them again, or name the encoder that made them. It differs in\n  " + "\n  ".join(differ)
        )


def take(store: FeatureStore, layer: str, rows: np.ndarray) -> torch.Tensor:
    """Returns samples (B, ...) of a layer at the level without noise, in the order of `rows`.

    Raises:
        ConfigError: The store has no such level.
    """
    order = np.argsort(rows, kind="stable")
    return store.take(layer, _level(store), rows[order])[torch.from_numpy(np.argsort(order))]


def _count(labels: np.ndarray | None, names: list[str] | None) -> int | None:
    if labels is None:
        return None
    known = len(names) if names else int(labels.max()) + 1
    outside = labels[(labels < 0) | (labels >= known)]
    if len(outside):
        raise ConfigError(
            f"{len(outside)} of {len(labels)} labels are no classes, such as {outside[0]}; classes here are 0 to "
            f"{known - 1}. Take these samples out, or the labels of all"
        )
    return known


def _check_same_images(store: FeatureStore, targets: FeatureStore) -> None:
    # Of latents that other programs have made nothing is known but the names.
    imported = store.meta["backbone"]["network"] == IMPORTED
    what = {} if imported else {"images": "data.fingerprint", "fit": "transform.fit"}
    ours, theirs = ({name: flatten(one.meta).get(key) for name, key in what.items()} for one in (store, targets))
    ours["ids"], theirs["ids"] = (digest(one.ids) for one in (store, targets))
    differ = changes(theirs, ours)
    if differ:
        raise StoreError(
            f"the targets in {targets.path} are not of the images in {store.path}: {'; '.join(differ)}; extract both "
            "with the same data"
        )


def _map_shape(store: FeatureStore, layer: str) -> tuple[int, int, int]:
    shape = tuple(store.meta["layers"][layer]["shape"])
    if len(shape) != 3:
        raise ConfigError(f"{layer} in {store.path} is {shape} for each sample, no map; extract it with pool=none")
    _level(store)
    return shape


def _level(store: FeatureStore) -> str:
    """Returns the level that has no noise."""
    clean = [key for key, level in store.levels.items() if not level.noise]
    if not clean:
        raise ConfigError(
            f"{store.path} holds features at {', '.join(store.levels)}, with noise; extract at level clean"
        )
    return clean[0]


def _digest_of(store: FeatureStore) -> str:
    """Returns a digest of what decides on a store's numbers."""
    plain = flatten({key: value for key, value in store.meta.items() if key != VERSIONS})
    return digest({key: value for key, value in plain.items() if not re.fullmatch(BESIDE_THE_POINT, key)})
