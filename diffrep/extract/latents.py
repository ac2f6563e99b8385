"""Latents that were made once, in place of images that are decoded and encoded again for each request."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from diffrep.backbones import Backbone, Posterior
from diffrep.backbones.codec import IdentityCodec
from diffrep.backbones.prepare import ImagesCodec, PrepareBackbone
from diffrep.config import BackboneConfig, ExtractConfig, FeatureRequest
from diffrep.data import ImageSet
from diffrep.errors import ConfigError, StoreError
from diffrep.extract.feed import Batch
from diffrep.store import NUMERICS, FeatureStore, Unit, open_place
from diffrep.store.layout import INDEX, changes, units_of
from diffrep.store.table import read_info, read_table
from diffrep.store.writer import flatten

LEVEL = "clean"


class LatentFeed:
    """Latents of a set of images, from a store that `diffrep extract` made of the same images.

    Args:
        images: The images, none of which is decoded.
        store: A store of family "prepare", with the layer `latents` or `moments`, see `diffrep.backbones.prepare`.
        size: Images of a batch; a unit's last one may be smaller.
        sampled: Give the posterior's standard deviation too, which takes `moments`.
        prefetch: Batches that a thread reads ahead.
        pin: Put batches into page-locked memory, from where copies to a GPU need not be waited for.

    Raises:
        StoreError: The store lacks the layer.
    """

    def __init__(
        self,
        images: ImageSet,
        store: FeatureStore,
        size: int,
        sampled: bool = False,
        prefetch: int = 2,
        pin: bool = False,
    ):
        kinds = [kind for kind in (() if sampled else ("latents",)) + ("moments",) if kind in store.layers]
        if not kinds or LEVEL not in store.levels:
            wanted = "moments, which posterior=sample takes," if sampled else "latents"
            raise StoreError(
                f"{store.path} has no {wanted} at level {LEVEL!r}, but {', '.join(store.layers)}; give latents "
                "another place, where they are made"
            )
        self.images, self.store, self.size = images, store, size
        self.kind, self.sampled, self.prefetch, self.pin = kinds[0], sampled, prefetch, pin
        self._units = units_of(store.meta)
        table = read_table(store.place, self._units)
        self._starts = np.cumsum(table.samples) - table.samples  # of every unit
        self._info = lru_cache(4)(self._read_info)
        self._pixels = self._image_size()

    def __call__(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Batch | None]]:
        """Gives the batches of each unit in order, and None after its last one.

        Raises:
            StoreError: A file of the store is damaged, or it does not hold a sample.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="diffrep-latents")
        ahead: deque[tuple[Unit, Future[Batch] | None]] = deque()
        try:
            for unit, rows in self._cuts(units):
                ahead.append((unit, None if rows is None else pool.submit(self._batch, rows)))
                if len(ahead) > self.prefetch:
                    yield self._next(ahead)
            while ahead:
                yield self._next(ahead)
        finally:
            pool.shutdown(cancel_futures=True)

    def _cuts(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, range | None]]:
        for unit in units:
            for start in range(0, len(unit.rows), self.size):
                yield unit, unit.rows[start : start + self.size]
            yield unit, None

    def _next(self, ahead: deque[tuple[Unit, Future[Batch] | None]]) -> tuple[Unit, Batch | None]:
        unit, batch = ahead.popleft()
        return unit, None if batch is None else batch.result()

    def _batch(self, rows: range) -> Batch:
        found: list[tuple[int, str, int]] = []
        problems = []
        for row in rows:
            sample = self.images.id(row)
            start, places, reasons = self._info(self._number(row))
            if sample in places:
                found.append((row, sample, start + places[sample]))
            elif sample in reasons:
                problems.append((sample, reasons[sample]))
            else:
                raise StoreError(f"{self.store.path} does not hold the sample {sample!r}; give latents another place")
        kept = [row for row, _, _ in found]
        labels = [self.images.label(row) for row in kept] if self.images.labelled else None
        posterior = self._posterior(np.array([position for _, _, position in found])) if found else None
        sizes = [self._pixels] if found else []
        return Batch(kept, [sample for _, sample, _ in found], labels, None, posterior, sizes, problems)

    def _posterior(self, positions: np.ndarray) -> Posterior:
        values = self.store.take(self.kind, LEVEL, positions)
        mean, std = values.chunk(2, dim=1) if self.kind == "moments" else (values, None)
        parts = (mean, std if self.sampled else None)
        return Posterior(*(part.pin_memory() if self.pin and part is not None else part for part in parts))

    def _number(self, row: int) -> int:
        """Returns the store's unit of a sample; its units need not be those of the features."""
        for split, rows in self._units.splits.items():
            if row in rows:
                return self._units.numbers_of(split)[(row - rows.start) // self._units.unit_size]
        raise StoreError(f"{self.store.path} has no sample {row}; give latents another place")

    def _read_info(self, number: int) -> tuple[int, dict[str, int], dict[str, str]]:
        """Returns the position of a unit's first sample, the places of all behind it, and why others are missing."""
        info = read_info(self.store.place, number, self._units)
        places = {sample: place for place, sample in enumerate(info.ids)}
        return int(self._starts[number]), places, {one["id"]: one["reason"] for one in info.skipped}

    def _image_size(self) -> tuple[int, int]:
        size = self.images.transform.size
        if size is not None:
            return size, size
        # The latents do not tell, since encoders round; but they have one size, and so had the images.
        first = self.store.ids_of(np.array([0]))[0]
        row = next(row for row in range(len(self.images)) if self.images.id(row) == first)
        return tuple(self.images[row].shape[-2:])


def open_latents(
    path: str | Path, config: ExtractConfig, backbone: Backbone, images: ImageSet, size: int | None = None
) -> LatentFeed:
    """Opens a store of latents, and makes or finishes it first where it is not there.

    It is made by the backbone's own codec, in batches of the same size, so that features come out the same to the bit
    where units and batches are cut as they were. Processes share the work as that of any extraction.

    Args:
        path: The store.
        config: The extraction that needs the latents.
        backbone: Whose latents they are.
        images: The images.
        size: Images of a batch; None takes the config's, or 64 where that is "auto".

    Raises:
        ConfigError: The backbone has no codec, or the images are streamed.
        StoreError: The store holds latents of other images, or of another codec; every difference is named.
        DataError: An image cannot be read and `on_error` is "stop".
    """
    check_latents(backbone, images)
    sampled = config.request.posterior == "sample" and backbone.codec.random
    made = PrepareBackbone.of_codec(backbone.codec, sampled, backbone.device, backbone.name)
    if open_place(path).size(INDEX) is None:
        store = _make(path, config, made, images, "moments" if sampled else "latents")
    else:
        store = FeatureStore(path)
    _compare(store, made, images)
    if size is None:
        size = 64 if config.batch_size == "auto" else config.batch_size
    return LatentFeed(images, store, size, sampled, config.prefetch, pin=backbone.device.type == "cuda")


def check_latents(backbone: Backbone, images: Any) -> None:
    """Raises ConfigError where there are no latents to keep: the backbone has no codec, or the images are streamed."""
    if not isinstance(images, ImageSet):
        raise ConfigError("latents are kept of sets that are listed; leave latents out, or data.stream")
    if isinstance(backbone.codec, (IdentityCodec, ImagesCodec)):
        raise ConfigError(f"{backbone.name} takes the images as they are and has no codec; leave latents out")


def _make(
    path: str | Path, config: ExtractConfig, backbone: PrepareBackbone, images: ImageSet, kind: str
) -> FeatureStore:
    from diffrep.extract.job import ExtractJob  # which reads latents in its turn

    beside = Path(config.backbone.source) / "vae"
    source = config.backbone.codec or (str(beside) if beside.is_dir() else config.backbone.source)
    told = BackboneConfig(source=source, family="prepare", config={"moments": kind == "moments"})
    request = FeatureRequest(kind, LEVEL, noise="none", dtype="float32")
    changed = {"backbone": told, "request": request, "out": str(path), "latents": None, "cond": None}
    return ExtractJob(config.model_copy(update=changed), backbone, images).run()


def _compare(store: FeatureStore, backbone: PrepareBackbone, images: ImageSet) -> None:
    """Raises where a store was not made of these images by this codec."""
    described, transform = backbone.describe(), images.transform
    codec = {name: described[name] for name in ("codec", "codec_weights", "codec_dtype")}
    wanted = {
        "numerics": NUMERICS,
        "backbone": codec,
        "data": {"fingerprint": images.fingerprint()},
        "transform": {"channels": transform.channels, "size": transform.size, "fit": transform.fit},
        "request": {"dtype": "float32", "pool": "none", "tokens": False},
    }
    wanted = flatten(json.loads(json.dumps(wanted)))
    stored = flatten(store.meta)
    differ = changes({key: stored.get(key) for key in wanted}, wanted)
    if differ:
        raise StoreError(
            f"{store.path} holds other latents than are wanted; give latents another place, where they are made. They "
            "differ in\n  " + "\n  ".join(differ)
        )
