"""Extraction of a whole data set into a feature store: resumable, on one process or many."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffrep import dist
from diffrep.backbones import Backbone, load_backbone
from diffrep.backbones.checkpoint import read_tensors
from diffrep.backbones.conditioning import Condition
from diffrep.config import BackboneConfig, ExtractConfig, to_plain, to_yaml
from diffrep.data import ImageSet, ShardSet, open_data
from diffrep.errors import ConfigError, DataError
from diffrep.extract.extractor import Extractor
from diffrep.extract.features import Features
from diffrep.extract.feed import Batch, Feed, ImageFeed
from diffrep.extract.latents import check_latents, open_latents
from diffrep.extract.plan import Plan
from diffrep.extract.sizing import find_batch_size
from diffrep.extract.stream import StreamFeed
from diffrep.extract.work import Work
from diffrep.noise import read_levels
from diffrep.store import NUMERICS, Claims, FeatureStore, StoreWriter, Unit, list_units, open_place

PACKAGES = ("diffrep", "torch", "diffusers", "numpy", "pillow")


class ExtractJob:
    """One extraction, ready to be printed or run.

    Args:
        config: What to extract.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.
        images: An opened data set in place of `config.data`, such as a part of it.

    Raises:
        ConfigError: Backbone, data and request do not go together.
    """

    def __init__(
        self, config: ExtractConfig, backbone: Backbone | None = None, images: ImageSet | ShardSet | None = None
    ):
        if config.request.noise == "generation":
            raise ConfigError(
                "request.noise=generation makes its own images, and a store holds features of a data set's; use "
                "Backbone.extract(None, request, ids=...) in Python, or noise=inversion"
            )
        dist.worker()  # first: it gives each process its own GPU, where device "auto" then loads the network
        self.config = config
        self.backbone = backbone or open_backbone(config.backbone)
        self.images = images or open_data(config.data, self.backbone.image_channels)
        self.cond = read_cond(config.cond)
        if config.latents is not None:
            check_latents(self.backbone, self.images)
        adaptive = config.batch_size == "auto"
        self.extractor = Extractor(
            self.backbone, config.request, 64 if adaptive else config.batch_size, pad=config.pad, adaptive=adaptive
        )

    def plan(self) -> Plan:
        """Returns the plan for the first image's size."""
        return self.extractor.plan(*self._size, self._condition)

    @cached_property
    def _condition(self) -> Condition:
        if self.backbone.device.type == "meta":  # a plan alone is wanted, and no prompt can be encoded
            return self.backbone.conditioner.example()
        condition = self.backbone.condition(self.cond, 1)
        self.backbone.conditioner.release()  # one prompt serves the whole job
        return condition

    @cached_property
    def _size(self) -> tuple[int, int]:
        if self.config.data.size:
            return self.config.data.size, self.config.data.size
        first = next((size for batch in self._look() for size in batch.sizes), None)
        if first is None:
            raise DataError(f"no image of {self.config.data.path} can be read")
        return first

    def _look(self) -> Iterator[Batch]:
        """Reads images one by one, from the first one on."""
        streamed = isinstance(self.images, ShardSet)
        feed = (StreamFeed if streamed else ImageFeed)(self.images, 1)
        units = list_units(self.images.splits, 1)
        return (batch for _, batch in feed(units) if batch is not None)

    @property
    def samples(self) -> int | None:
        """Number of samples; None where shards are streamed, which nobody has counted."""
        return None if isinstance(self.images, ShardSet) else len(self.images)

    @property
    def units(self) -> Sequence[Unit]:
        """The units of work."""
        return list_units(self.images.splits, 1 if self.samples is None else self.config.unit_size)

    def capacity(self, unit: Unit) -> int | None:
        """Returns how many samples a unit has; None where that is not known."""
        return None if self.samples is None else len(unit.rows)

    def text(self) -> str:
        """Returns what the job would do, in lines."""
        what = "" if self.samples is not None else " shards"
        splits = ", ".join(f"{name} {len(rows):,}{what}" for name, rows in self.images.splits.items())
        size = "one shard" if self.samples is None else f"{self.config.unit_size:,} samples"
        lines = f"splits    {splits}\nunits     {len(self.units):,} of {size}"
        return f"{lines}\n{self.plan().text(self.samples or 1)}"

    def expected_time(self) -> str:
        """Measures one batch on random images and returns the time that the missing part would take, in words."""
        if self.backbone.device.type == "meta":
            return "not measured: the backbone is on the meta device, without weights"
        height, width = self._size
        count = max(1, self.batch_size // self.plan().rows)
        images = torch.rand(count, self.backbone.image_channels, height, width)
        self.extractor(images, cond=self.cond)  # first calls are slow, compiled ones by a minute
        began = time.perf_counter()
        self.extractor(images, cond=self.cond)
        seconds = (time.perf_counter() - began) / count
        if self.samples is None:
            return f"{1 / seconds:.3g} images/s on {self.backbone.device}, from one batch"
        claims = Claims(open_place(self.config.out), self.units, self.config.lease)
        claims.refresh()
        missing = self.samples * (1 - claims.done / len(self.units))
        return f"about {timedelta(seconds=round(seconds * missing))} on {self.backbone.device}, from one batch"

    def meta(self) -> dict[str, Any]:
        """Returns the store's meta.json."""
        plan, request = self.plan(), to_plain(self.config.request)
        del request["guidance"]  # of generations only, which no store holds
        described = self.backbone.describe()
        rows = self._condition
        if rows:
            values = b"".join(name.encode() + rows[name].float().cpu().numpy().tobytes() for name in sorted(rows))
            described["cond"] = {"given": self.config.cond, "digest": hashlib.sha256(values).hexdigest()[:16]}
        levels, _ = read_levels(self.backbone.schedule, self.config.request.levels, self.config.request.noise)
        # Also the calls whose features are not kept: they shape those of the later ones.
        paths = {leg.trajectory.name: [level.time for level in leg.trajectory.levels] for leg in plan.legs}
        transform = self.images.transform
        optional = {"aliases": plan.aliases, "trajectories": paths}
        return {name: value for name, value in optional.items() if value} | {
            "numerics": NUMERICS,
            "backbone": described,
            "request": request,
            "layers": {name: {"shape": list(shape), "cost": plan.costs[name]} for name, shape in plan.shapes.items()},
            "levels": [[str(spec), level.key, level.time, level.signal, level.noise] for spec, level in levels],
            "costs": {
                "network_flops": plan.network_flops,
                "encode_flops": plan.encode_flops,
                "draws": plan.draws,
                # Whole forwards that come before a level's own.
                **({"before": {key: n for leg in plan.legs for key, n in leg.before.items()}} if plan.legs else {}),
            },
            "data": {"fingerprint": self.images.fingerprint(), "path": Path(self.config.data.path).name},
            "transform": {"channels": transform.channels, "size": transform.size, "fit": transform.fit},
            "splits": {name: [rows.start, rows.stop] for name, rows in self.images.splits.items()},
            "classes": self.images.classes,
            "unit_size": "shard" if self.samples is None else self.config.unit_size,
            "versions": {name: version(name) for name in PACKAGES},
        }

    def run(self) -> FeatureStore:
        """Extracts what is missing and returns the finished store.

        Any number of processes may do so at a time, whoever started them: each takes units that no other has claimed,
        and all wait for the last one. Nothing is gathered.

        Raises:
            StoreError: The folder holds another store, or cannot be written.
            DataError: An image cannot be read and `on_error` is "stop"; finished units stay.
            Stopped: SIGTERM or SIGUSR1 came; finished units stay.
        """
        with dist.StopSignal() as stop:
            writer = StoreWriter(self.config.out, self.meta())
            first = dist.worker().rank == 0 and not writer.indexed()  # one that is finished may be read-only by now
            if first or writer.place.size("config.yaml") is None:
                writer.place.write("config.yaml", [to_yaml(self.config).encode()])
            Work(self, writer, stop).run()
        return FeatureStore(self.config.out)

    def feed(self) -> Feed:
        """Returns what reads the units' samples, once the batch size is known."""
        config, size, images = self.config, self.batch_size, self.images
        if config.latents is not None:
            return open_latents(config.latents, config, self.backbone, images, size)
        pin = self.backbone.device.type == "cuda"
        kind = StreamFeed if isinstance(images, ShardSet) else ImageFeed
        return kind(images, size, config.workers, config.prefetch, pin)

    @cached_property
    def batch_size(self) -> int:
        """Rows of one forward; measured where the config says "auto"."""
        if self.config.batch_size == "auto":
            encode = self.config.latents is None
            self.extractor.batch_size = find_batch_size(self.extractor, *self._size, self.cond, encode)
        return self.extractor.batch_size

    def read(self, batch: Batch) -> Features | None:
        """Reads the features of a batch; None when none of its samples could be read.

        Raises:
            DataError: A sample could not be read and `on_error` is "stop".
            ConfigError: The images differ in size.
        """
        if batch.problems and self.config.on_error == "stop":
            sample, reason = batch.problems[0]
            problem = reason if reason.startswith(sample) else f"{sample}: {reason}"
            raise DataError(f"{problem}; finished units stay. Mend it and run again, or use on_error=skip")
        if batch.sizes not in ([], [self._size]):
            sizes = sorted({*batch.sizes, self._size})
            raise ConfigError(f"the images differ in size, such as {sizes[:2]}; set data.size")
        if not batch.ids:
            return None
        return self.extractor(batch.images, ids=batch.ids, cond=self.cond, posterior=batch.posterior)


def run_extract(config: ExtractConfig) -> FeatureStore:
    """Extracts a data set into the store `config.out`, or what is missing of it, and returns the store."""
    return ExtractJob(config).run()


def open_backbone(config: BackboneConfig) -> Backbone:
    """Loads the backbone that a config names."""
    return load_backbone(**config.model_dump())


def read_cond(cond: str | int | None) -> int | str | dict[str, torch.Tensor] | torch.Tensor | None:
    """Returns a label or a prompt as it is, and the tensors of a file, by name when it holds several."""
    if not (isinstance(cond, str) and cond.endswith(".safetensors")):
        return cond
    tensors = read_tensors(Path(cond))
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors
