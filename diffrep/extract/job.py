"""Extraction of a whole data set into a feature store: resumable, on one process or many."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from torch.utils.data import DataLoader, Dataset

from diffrep import dist
from diffrep.backbones import Backbone, load_backbone
from diffrep.backbones.checkpoint import read_tensors
from diffrep.backbones.conditioning import Condition
from diffrep.config import BackboneConfig, ExtractConfig, to_plain, to_yaml
from diffrep.data import ImageSet, open_images
from diffrep.errors import ConfigError, DataError
from diffrep.extract.extractor import Extractor
from diffrep.extract.plan import Plan
from diffrep.noise import read_levels
from diffrep.store import NUMERICS, FeatureStore, StoreWriter, Unit, list_units
from diffrep.store.layout import write_whole
from diffrep.store.writer import unit_exists

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

    def __init__(self, config: ExtractConfig, backbone: Backbone | None = None, images: ImageSet | None = None):
        if config.request.noise == "generation":
            raise ConfigError(
                "request.noise=generation makes its own images, and a store holds features of a data set's; use "
                "Backbone.extract(None, request, ids=...) in Python, or noise=inversion"
            )
        dist.state()  # first: it gives each process its own GPU, where device "auto" then loads the network
        self.config = config
        self.backbone = backbone or open_backbone(config.backbone)
        self.images = images or open_images(config.data, self.backbone.image_channels)
        self.cond = read_cond(config.cond)
        self.extractor = Extractor(self.backbone, config.request, config.batch_size)

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
        readable = _Readable(self.images)
        first = next(
            (image for _, image, problem in map(readable.__getitem__, range(len(self.images))) if problem is None),
            None,
        )
        if first is None:
            raise DataError(f"no image of {self.config.data.path} can be read")
        return tuple(first.shape[-2:])

    def text(self) -> str:
        """Returns what the job would do, in lines."""
        splits = ", ".join(f"{name} {len(rows):,}" for name, rows in self.images.splits.items())
        units = f"{len(list_units(self.images.splits, self.config.unit_size)):,} of {self.config.unit_size:,} samples"
        return f"splits    {splits}\nunits     {units}\n{self.plan().text(len(self.images))}"

    def expected_time(self) -> str:
        """Measures one batch on random images and returns the time that the missing part would take, in words."""
        if self.backbone.device.type == "meta":
            return "not measured: the backbone is on the meta device, without weights"
        height, width = self._size
        plan, config = self.plan(), self.config
        count = max(1, config.batch_size // plan.rows)
        images = torch.rand(count, self.backbone.image_channels, height, width)
        self.extractor(images, cond=self.cond)  # first calls are slow, compiled ones by a minute
        began = time.perf_counter()
        self.extractor(images, cond=self.cond)
        units = list_units(self.images.splits, self.config.unit_size)
        missing = sum(len(unit.rows) for unit in units if not unit_exists(Path(config.out), unit.number))
        seconds = (time.perf_counter() - began) / count * missing
        return f"about {timedelta(seconds=round(seconds))} on {self.backbone.device}, from one batch"

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
            "unit_size": self.config.unit_size,
            "versions": {name: version(name) for name in PACKAGES},
        }

    def run(self) -> FeatureStore:
        """Extracts what is missing and returns the finished store.

        Every process takes a share of the missing units; nothing is gathered.

        Raises:
            StoreError: The folder holds another store, or cannot be written.
            DataError: An image cannot be read and `on_error` is "stop"; finished units stay.
        """
        state = dist.state()
        meta = self.meta()
        with state.main_process_first():
            writer = StoreWriter(self.config.out, meta)
            if state.is_main_process:
                write_whole(Path(self.config.out) / "config.yaml", to_yaml(self.config).encode())
        missing = writer.missing()
        state.wait_for_everyone()
        mine = missing[state.process_index :: state.num_processes]
        done = len(self.images) - sum(len(unit.rows) for unit in missing)
        bar = tqdm(
            total=len(self.images), initial=done, desc=dist.label("extract"), unit="image", main_process_only=True
        )
        batches = self.batches(mine)
        for unit in mine:
            self.extract_unit(writer, unit, batches, bar, state.num_processes)
        bar.close()
        state.wait_for_everyone()
        if state.is_main_process:
            writer.finish()
        state.wait_for_everyone()
        return FeatureStore(self.config.out)

    def extract_unit(
        self, writer: StoreWriter, unit: Unit, batches: Iterator[_Batch], bar: tqdm, processes: int
    ) -> None:
        """Extracts the next batches into one unit of a store.

        Args:
            writer: The store.
            unit: Which samples.
            batches: Gives the unit's batches, and no more of them are taken.
            bar: Moved on by what all processes did meanwhile, about.
            processes: How many those are.
        """
        parts: dict[str, list[torch.Tensor]] = {
            f"{la}@{le}": [] for la in self.plan().shapes for le in self.plan().draws
        }
        ids: list[str] = []
        rows: list[int] = []
        skipped: list[dict[str, str]] = []
        for batch in islice(batches, len(_cut(unit, self.config.batch_size))):
            for row, problem in batch.problems:
                if self.config.on_error == "stop":
                    raise DataError(f"{problem}; finished units stay. Mend it and run again, or use on_error=skip")
                skipped.append({"id": self.images.id(row), "reason": problem})
            if batch.sizes not in ([], [self._size]):
                sizes = sorted({*batch.sizes, self._size})
                raise ConfigError(f"the images differ in size, such as {sizes[:2]}; set data.size")
            if batch.images is not None:
                names = [self.images.id(row) for row in batch.rows]
                for (layer, level), tensor in self.extractor(batch.images, ids=names, cond=self.cond).items():
                    parts[f"{layer}@{level}"].append(tensor)
                ids += names
                rows += batch.rows
            bar.update((len(batch.rows) + len(batch.problems)) * processes)
        labels = [self.images.label(row) for row in rows] if self.images.labelled else None
        tensors = {name: torch.cat(part) for name, part in parts.items() if part}
        writer.write(unit, tensors, ids, rows, labels, skipped)

    def batches(self, units: list[Unit]) -> Iterator[_Batch]:
        """Reads the images of units, in batches."""
        # One loader for all units, so that its workers start once; batches never cross a unit.
        cuts = [rows for unit in units for rows in _cut(unit, self.config.batch_size)]
        workers = self.config.workers
        return iter(DataLoader(_Readable(self.images), batch_sampler=cuts, num_workers=workers, collate_fn=_collate))


def run_extract(config: ExtractConfig) -> FeatureStore:
    """Extracts a data set into the store `config.out`, or what is missing of it, and returns the store."""
    return ExtractJob(config).run()


def open_backbone(config: BackboneConfig) -> Backbone:
    """Loads the backbone that a config names."""
    return load_backbone(**config.model_dump())


class _Readable(Dataset):
    """Images that come with their row and, where reading failed, the reason in place of an image.

    The reason travels as a value because an exception from a data-loader worker arrives wrapped in its traceback.
    """

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | None, str | None]:
        try:
            return row, self.images[row], None
        except DataError as error:
            return row, None, str(error)


@dataclass(frozen=True)
class _Batch:
    """What a loader gives: rows that could be read, their images (B, C, H, W), and the others with the reason.

    `sizes` lists the image sizes; with more than one there is no common tensor and `images` is None.
    """

    rows: list[int]
    images: torch.Tensor | None
    sizes: list[tuple[int, int]]
    problems: list[tuple[int, str]]


def _cut(unit: Unit, size: int) -> list[list[int]]:
    rows = list(unit.rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _collate(samples: list[tuple[int, torch.Tensor | None, str | None]]) -> _Batch:
    good = [(row, image) for row, image, problem in samples if problem is None]
    sizes = sorted({tuple(image.shape[-2:]) for _, image in good})
    images = torch.stack([image for _, image in good]) if len(sizes) == 1 else None
    return _Batch([row for row, _ in good], images, sizes, [(row, problem) for row, _, problem in samples if problem])


def read_cond(cond: str | int | None) -> int | str | dict[str, torch.Tensor] | torch.Tensor | None:
    """Returns a label or a prompt as it is, and the tensors of a file, by name when it holds several."""
    if not (isinstance(cond, str) and cond.endswith(".safetensors")):
        return cond
    tensors = read_tensors(Path(cond))
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors
