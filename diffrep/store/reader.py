"""Reading a feature store: arrays of a (layer, level), samples as a torch data set, or batches of a huge one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from diffrep.config import LevelSpec
from diffrep.errors import StoreError, UnknownNameError
from diffrep.store.batches import Batch, iterate
from diffrep.store.files import UnitFiles
from diffrep.store.interop import for_numpy
from diffrep.store.layout import INDEX, units_of
from diffrep.store.meta import read_levels, read_meta, read_shapes
from diffrep.store.place import LocalPlace, open_place
from diffrep.store.table import read_part, read_table, several

if TYPE_CHECKING:
    import datasets


class FeatureStore(Dataset):
    """A finished store.

    `store[layer, level]` is the tensor of all samples; `store[i]` is one sample, a dict of "id", "label" and the
    features by "layer@level". Files are mapped, and of those on another machine byte ranges are read, so only what is
    asked for is read.

    Args:
        path: Folder of the store, or its URL, such as "s3://bucket/store".
        partial: Read the units that are there of a store that is not finished.

    Attributes:
        path: The folder; of a URL as it was given.
        place: Where the files are.
        name: Last part of the path or URL.
        meta: What the features are (meta.json).
        layers: Addresses.
        levels: The levels, by canonical key.
        classes: Class names, or None.

    Raises:
        StoreError: There is no store, it is not finished, or an index is damaged.
    """

    def __init__(self, path: str | Path, partial: bool = False):
        self.place = open_place(path)
        self.path = self.place.path if isinstance(self.place, LocalPlace) else path
        self.name = self.place.name
        self.meta = read_meta(self.place)
        units = units_of(self.meta)
        finished = self.place.size(INDEX) is not None
        if not finished and not partial:
            raise StoreError(f"the store {path} is not finished; run the same 'diffrep extract' again to go on")
        table = (read_table if finished else read_part)(self.place, units)
        table = table[np.flatnonzero(table.samples)]
        if not len(table):
            raise StoreError(
                f"the store {path} holds no samples: every image was skipped, see skipped.jsonl"
                if finished
                else f"no unit of the store {path} is there yet; run the same 'diffrep extract' to go on"
            )
        self._levels = read_levels(self.place, self.meta)
        self.levels = self._levels.levels
        shapes = read_shapes(self.place, self.meta)
        self.layers: list[str] = list(shapes)
        self._shapes = {f"{layer}@{level}": shape for layer, shape in shapes.items() for level in self.levels}
        self._aliases: dict[str, str] = self.meta.get("aliases", {})
        self.classes: list[str] | None = self.meta.get("classes")
        self._files = UnitFiles(self.place, units, table, self._shapes)
        ranges = {split: self._files.between(units.numbers_of(split)) for split in units.splits}
        self._ranges = {split: found for split, found in ranges.items() if found}

    @cached_property
    def ids(self) -> list[str]:
        """Sample ids, read when they are first asked for; `ids_of` reads some."""
        return list(chain.from_iterable(several(self.place, self._files.read_ids, range(len(self._files)))))

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Labels (N,) int64, (N, L) of 0 and 1 where a sample has several, or None; read when first asked for."""
        return self._files.whole("label", range(len(self._files))).numpy() if self.labelled else None

    @property
    def labelled(self) -> bool:
        """Whether the samples have labels."""
        return "label" in self._files.open(0).slots

    @cached_property
    def digest(self) -> str:
        """16 hex digits that change when a feature does, wherever the store lies: of the files' checksums."""
        return hashlib.sha256(self._files.table.checksums.tobytes()).hexdigest()[:16]

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have samples."""
        return list(self._ranges)

    def rows(self, split: str) -> np.ndarray:
        """Returns the positions of a split's samples, int64.

        Raises:
            UnknownNameError: The store has no such split.
        """
        units = self._units(split)
        return np.arange(self._files.starts[units[0]], self._files.ends[units[-1]])

    def tensor(self, layer: str, level: LevelSpec, split: str | None = None) -> torch.Tensor:
        """Returns the features of all samples, or of one split, (N, ...) in the stored dtype.

        Raises:
            UnknownNameError: The store has no such layer, level or split.
            StoreError: A file is missing or damaged.
        """
        return self._files.whole(self._name(layer, level), self._units(split))

    def take(self, layer: str, level: LevelSpec, rows: np.ndarray) -> torch.Tensor:
        """Returns the features of some samples, (n, ...) in the stored dtype, reading no others.

        Args:
            layer: Address.
            level: Level.
            rows: Positions (n,) int64 in the store, in any order.

        Raises:
            UnknownNameError: The store has no such layer or level.
            IndexError: A position is not in the store.
            StoreError: A file is missing or damaged.
        """
        return self._files.take(self._name(layer, level), rows)

    def ids_of(self, rows: np.ndarray) -> list[str]:
        """Returns the ids of some samples at positions (n,), reading those of their units alone.

        Raises:
            IndexError: A position is not in the store.
        """
        return self._files.ids_of(rows)

    def labels_of(self, rows: np.ndarray) -> torch.Tensor | None:
        """Returns the labels of some samples at positions (n,), (n,) or (n, L) int64; None where there are none.

        Raises:
            IndexError: A position is not in the store.
        """
        return self._files.take("label", rows) if self.labelled else None

    def batches(
        self,
        layer: str,
        level: LevelSpec,
        split: str | None = None,
        size: int = 256,
        shuffle: int | None = None,
        window: int = 4,
    ) -> Iterator[Batch]:
        """Reads all samples, or those of a split, once, unit after unit: a store of any size in little memory.

        Args:
            layer: Address.
            level: Level.
            split: Split; None takes all.
            size: Samples of a batch; the last one may have fewer.
            shuffle: Seed of the order, in which units are shuffled, and then the samples of `window` units at a time;
                another one for each epoch. None keeps the order of the store.
            window: Units whose samples are shuffled together. Of a store on another machine so many are held.

        Returns:
            An iterator over (positions in the store (n,), features (n, ...), labels (n,) or (n, L) or None).

        Raises:
            UnknownNameError: The store has no such layer, level or split.
            ValueError: Size or window are less than 1.
            StoreError: A file is missing or damaged; as it is reached.
        """
        if size < 1 or window < 1:
            raise ValueError(f"size and window are 1 or more, got {size} and {window}")
        names = [self._name(layer, level), *(["label"] if self.labelled else [])]
        return iterate(self._files, names, self._units(split), size, shuffle, window)

    def numpy(self, layer: str, level: LevelSpec, split: str | None = None) -> np.ndarray:
        """Returns the same as a numpy array; bfloat16 and float8, which numpy lacks, come as float32."""
        return for_numpy(self.tensor(layer, level, split)).numpy()

    def verify(self) -> list[int]:
        """Reads every file and returns the numbers of the units that are damaged or missing."""
        from diffrep.store.check import verify

        report = verify(self.place)
        return sorted({*report.damaged, *report.missing, *report.disagree})

    def __len__(self) -> int:
        return int(self._files.ends[-1])

    def __getitem__(self, key: int | tuple[str, LevelSpec]) -> Any:
        if isinstance(key, tuple):
            return self.tensor(*key)
        unit, place = self._files.locate(key)
        sample: dict[str, Any] = {name: self._files.row(name, unit, place) for name in self._shapes}
        sample["id"] = self._files.ids(unit)[place]
        if self.labelled:
            sample["label"] = self._files.label(unit, place)
        return sample

    def dataset(self, layer: str, level: LevelSpec, split: str) -> LayerDataset:
        """Returns (feature, label) pairs of one (layer, level) and split, read as they are asked for."""
        return LayerDataset(self, self._name(layer, level), self.rows(split))

    def __repr__(self) -> str:
        return (
            f"FeatureStore({str(self.path)!r}): {len(self):,} samples, splits {self.splits}, "
            f"{len(self.layers)} layers x {len(self.levels)} levels"
        )

    def key(self, layer: str, level: LevelSpec) -> tuple[str, str]:
        """Returns the layer and the canonical key of the level.

        Raises:
            UnknownNameError: The store has no such layer or level.
        """
        layer = self._aliases.get(layer, layer)
        if layer not in self.layers:
            raise UnknownNameError("layer", layer, self.layers, f"The store is {self.path}")
        return layer, self._levels.key(level)

    def to_dataset(
        self, layer: str | None = None, level: LevelSpec | None = None, split: str | None = None
    ) -> datasets.Dataset:
        """Returns the features as a Hugging Face data set: columns "id", "label" and one "layer@level" each.

        It is written row by row to the library's cache (`HF_DATASETS_CACHE`) and mapped from there, so it need not fit
        into memory. Single labels with known names are a ClassLabel; several labels are a list of 0 and 1, or with
        known names of ClassLabels. bfloat16 and float8, which Arrow lacks, become float32.

        Args:
            layer: Address; None takes all layers.
            level: Level; None takes all levels.
            split: Split; None takes all samples.

        Raises:
            BackendUnavailable: The `datasets` package is not installed.
            UnknownNameError: The store has no such layer, level or split.
        """
        from diffrep.store.interop import to_dataset

        layers = self.layers if layer is None else [layer]
        levels = self.levels if level is None else [level]
        names = [self._name(la, le) for la in layers for le in levels]
        return to_dataset(self, names, np.arange(len(self)) if split is None else self.rows(split))

    def _units(self, split: str | None) -> range:
        """Returns the places of a split's units among those with samples."""
        if split is not None and split not in self._ranges:
            raise UnknownNameError("split", split, self.splits)
        return range(len(self._files)) if split is None else self._ranges[split]

    def _name(self, layer: str, level: LevelSpec) -> str:
        return "@".join(self.key(layer, level))


class LayerDataset(Dataset):
    """(feature, label) pairs of one (layer, level), over some rows of a store; several labels are a tensor (L,)."""

    def __init__(self, store: FeatureStore, name: str, rows: np.ndarray):
        self.store, self.name, self.rows = store, name, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int | torch.Tensor]:
        files = self.store._files
        unit, place = files.locate(int(self.rows[index]))
        return files.row(self.name, unit, place), files.label(unit, place)
