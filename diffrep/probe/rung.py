"""Extraction for a search: several requests on the same new images in one go, and all that is there as one store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm

from diffrep import dist
from diffrep.backbones import Backbone, Posterior
from diffrep.config import ExtractConfig, FeatureRequest, to_yaml
from diffrep.data import ImageSet
from diffrep.extract import Extractor
from diffrep.extract.job import ExtractJob
from diffrep.extract.unit import UnitFeatures
from diffrep.probe.race import Cell
from diffrep.store import FeatureStore, StoreWriter
from diffrep.store.layout import write_whole


def extract_together(
    config: ExtractConfig, backbone: Backbone, images: ImageSet, requests: dict[str, FeatureRequest], folder: Path
) -> list[FeatureStore]:
    """Extracts several requests from the same images into stores `folder`/name, or what is missing of them.

    Each image is read and encoded once for all requests. Processes share the units.

    Args:
        config: Backbone, data, condition and batches; its request and folder are not used.
        backbone: The loaded backbone.
        images: The images.
        requests: What is wanted, by the name of its store.
        folder: Where the stores are.

    Raises:
        StoreError: A store of another request, other images or another backbone is there.
        DataError: An image cannot be read and `on_error` is "stop"; finished units stay.
        DiffrepError: A feature is NaN or infinite.
    """
    state = dist.state()
    encoded: dict[int, Posterior] = {}
    jobs, writers = [], []
    for name, request in requests.items():
        own = config.model_copy(update={"request": request, "out": str(folder / name)})
        job = ExtractJob(own, backbone, images)
        job.extractor = _SharedEncoding(backbone, request, config.batch_size, encoded)
        meta = job.meta()
        with state.main_process_first():
            writers.append(StoreWriter(own.out, meta))
            if state.is_main_process:
                write_whole(Path(own.out) / "config.yaml", to_yaml(own).encode())
        jobs.append(job)
    missing = [{unit.number for unit in writer.missing()} for writer in writers]
    state.wait_for_everyone()
    todo = [unit for unit in writers[0].units if any(unit.number in numbers for numbers in missing)]
    mine = todo[state.process_index :: state.num_processes]
    left = sum(len(unit.rows) for unit in todo for numbers in missing if unit.number in numbers)
    bar = tqdm(
        total=len(images) * len(jobs),
        initial=len(images) * len(jobs) - left,
        desc=dist.label("extract"),
        unit="image",
        main_process_only=True,
        leave=False,
    )
    filling: list[UnitFeatures] = []
    for unit, batch in jobs[0].feed()(mine):
        wanted = [place for place, numbers in enumerate(missing) if unit.number in numbers]
        filling = filling or [UnitFeatures(unit, len(unit.rows)) for _ in wanted]
        if batch is None:
            for place, features in zip(wanted, filling, strict=True):
                features.write(writers[place])
            filling = []
            continue
        for place, features in zip(wanted, filling, strict=True):
            features.add(batch, jobs[place].read(batch))
        encoded.clear()
        bar.update(batch.samples * len(wanted) * state.num_processes)
    bar.close()
    state.wait_for_everyone()
    if state.is_main_process:
        for writer in writers:
            writer.finish()
    state.wait_for_everyone()
    return [FeatureStore(writer.place.target) for writer in writers]


class _SharedEncoding(Extractor):
    """An extractor that encodes a batch only if none that shares `encoded` has done it.

    `encoded` is keyed by the identity of the batch, so the batches must be held as long as it is not cleared.
    """

    def __init__(
        self, backbone: Backbone, request: FeatureRequest, batch_size: int, encoded: dict[int, Posterior]
    ) -> None:
        super().__init__(backbone, request, batch_size)
        self.encoded = encoded

    def encode(self, images: torch.Tensor) -> Posterior:
        if id(images) not in self.encoded:
            self.encoded[id(images)] = super().encode(images)
        return self.encoded[id(images)]


class JointStore:
    """Cells of several stores, each of other samples, read as one `FeatureStore` of all these samples would be.

    Samples that were skipped as unreadable are left out.

    Args:
        parts: The stores of each rung: one product of layers and levels each, all of the rung's new samples. The first
            rung's one store holds the whole grid.
        images: All images of the search.
        cells: The cells, which every rung has.
        path: Where the stores are.

    Attributes:
        places: Position of each sample among the images, ascending (N,).
        ids: Their ids.
        labels: Their labels, (N,) or (N, L) int64.
        classes: Class names, or None.
        layers: Layers of the cells.
        levels: Levels of the cells, by canonical key.
        meta: As in the grid's store, with these layers.
    """

    def __init__(self, parts: list[list[FeatureStore]], images: ImageSet, cells: list[Cell], path: Path):
        self.path, self.classes, self._parts = path, images.classes, parts
        # Ids are unique in a split.
        known = {(split, images.id(row)): row for split, rows in images.splits.items() for row in rows}
        together = [
            known[split, store.ids[at]] for store, *_ in parts for split in store.splits for at in store.rows(split)
        ]
        self._order = torch.tensor(together).argsort()
        self.places = np.array(together, dtype=np.int64)[self._order.numpy()]
        self.ids = [images.id(int(row)) for row in self.places]
        self.labels = np.array([images.label(int(row)) for row in self.places], dtype=np.int64)
        self._splits = images.splits
        grid = parts[0][0]
        layers, levels = ({cell[part] for cell in cells} for part in (0, 1))
        self.layers = [name for name in grid.layers if name in layers]
        self.levels = {key: level for key, level in grid.levels.items() if key in levels}
        self.meta: dict[str, Any] = grid.meta | {"layers": {name: grid.meta["layers"][name] for name in self.layers}}

    def rows(self, split: str) -> np.ndarray:
        """Returns the positions of a split's samples, int64."""
        return self.positions(np.array(self._splits[split]))

    def positions(self, places: np.ndarray) -> np.ndarray:
        """Returns where samples, given by their positions among the images, stand in here; int64, ascending."""
        return np.flatnonzero(np.isin(self.places, places))

    def tensor(self, layer: str, level: str) -> torch.Tensor:
        """Returns the features of a cell of all samples, (N, ...)."""
        found = [
            next(store for store in stores if layer in store.layers and level in store.levels).tensor(layer, level)
            for stores in self._parts
        ]
        return torch.cat(found)[self._order]

    def __len__(self) -> int:
        return len(self.places)
