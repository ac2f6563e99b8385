"""Reading a feature store: arrays of a (layer, level), or samples as a torch data set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from diffrep.config import LevelSpec
from diffrep.errors import StoreError, UnknownNameError
from diffrep.noise import Level, LevelTable
from diffrep.store.interop import for_numpy
from diffrep.store.layout import INDEX, META, info_file, read_json, tensor_file

if TYPE_CHECKING:
    import datasets


class FeatureStore(Dataset):
    """A finished store.

    `store[layer, level]` is the tensor of all samples; `store[i]` is one sample, a dict of "id", "label" and the
    features by "layer@level". Files are mapped, so only the bytes that are asked for are read.

    Args:
        path: Folder of the store.

    Attributes:
        meta: What the features are (meta.json).
        layers: Addresses.
        levels: The levels, by canonical key.
        ids: Sample ids.
        labels: Labels (N,) int64, (N, L) of 0 and 1 where a sample has several, or None.
        classes: Class names, or None.

    Raises:
        StoreError: There is no store, it is not finished, or a file is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / META).exists():
            raise StoreError(f"no feature store in {str(path)!r}; 'diffrep extract' makes one")
        self.meta = read_json(self.path / META)
        if not (self.path / INDEX).exists():
            raise StoreError(f"the store {self.path} is not finished; run the same 'diffrep extract' again to go on")
        infos = [read_json(info_file(self.path, unit["unit"])) for unit in read_json(self.path / INDEX)["units"]]
        self._infos = [info for info in infos if info["samples"]]
        if not self._infos:
            raise StoreError(f"the store {self.path} holds no samples: every image was skipped, see skipped.jsonl")
        self._ends = np.cumsum([info["samples"] for info in self._infos])
        self._opened: dict[int, Any] = {}
        self._mapped: dict[tuple[int, str], torch.Tensor] = {}
        self._table = LevelTable((spec, Level(*values)) for spec, *values in self.meta["levels"])
        self.layers: list[str] = list(self.meta["layers"])
        self._aliases: dict[str, str] = self.meta.get("aliases", {})
        self.levels = self._table.levels
        self.classes: list[str] | None = self.meta["classes"]
        self.ids = [sample_id for info in self._infos for sample_id in info["ids"]]
        self._split_of = np.repeat([info["split"] for info in self._infos], [info["samples"] for info in self._infos])
        self.labels = None
        if "label" in self._open(0).keys():  # noqa: SIM118 - a file handle, not a dict
            self.labels = torch.cat([self._tensor(unit, "label") for unit in range(len(self._infos))]).numpy()

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(dict.fromkeys(self._split_of.tolist()))

    def rows(self, split: str) -> np.ndarray:
        """Returns the positions of a split's samples, int64.

        Raises:
            UnknownNameError: The store has no such split.
        """
        if split not in self.splits:
            raise UnknownNameError("split", split, self.splits)
        return np.flatnonzero(self._split_of == split)

    def tensor(self, layer: str, level: LevelSpec, split: str | None = None) -> torch.Tensor:
        """Returns the features of all samples, or of one split, (N, ...) in the stored dtype.

        Raises:
            UnknownNameError: The store has no such layer, level or split.
        """
        name = self._name(layer, level)
        if split is not None:
            self.rows(split)
        units = [i for i, info in enumerate(self._infos) if split in (None, info["split"])]
        return torch.cat([self._tensor(unit, name) for unit in units])

    def take(self, layer: str, level: LevelSpec, rows: np.ndarray) -> torch.Tensor:
        """Returns the features of some samples, (n, ...) in the stored dtype, reading no others.

        Args:
            layer: Address.
            level: Level.
            rows: Positions (n,) int64 in the store, best in ascending order.

        Raises:
            UnknownNameError: The store has no such layer or level.
            IndexError: A position is not in the store.
        """
        name = self._name(layer, level)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"samples {rows.min()} to {rows.max()} of {len(self)}")
        units = np.searchsorted(self._ends, rows, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        found = None
        for unit in np.unique(units):
            mine = np.flatnonzero(units == unit)
            part = self._tensor(int(unit), name).index_select(0, torch.from_numpy(rows[mine] - starts[unit]))
            if len(mine) == len(rows):
                return part
            if found is None:
                found = part.new_empty(len(rows), *part.shape[1:])
            found[torch.from_numpy(mine)] = part
        return self._tensor(0, name)[:0] if found is None else found

    def numpy(self, layer: str, level: LevelSpec, split: str | None = None) -> np.ndarray:
        """Returns the same as a numpy array; bfloat16 and float8, which numpy lacks, come as float32."""
        return for_numpy(self.tensor(layer, level, split)).numpy()

    def verify(self) -> list[int]:
        """Reads every file and returns the numbers of the units whose checksum is wrong."""
        damaged = []
        for info in self._infos:
            content = tensor_file(self.path, info["unit"]).read_bytes()
            if hashlib.sha256(content).hexdigest() != info["sha256"]:
                damaged.append(info["unit"])
        return damaged

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: int | tuple[str, LevelSpec]) -> Any:
        if isinstance(key, tuple):
            return self.tensor(*key)
        unit, row = self._locate(key)
        names = [f"{layer}@{level}" for layer in self.layers for level in self.levels]
        sample: dict[str, Any] = {name: self._tensor(unit, name)[row] for name in names}
        sample["id"] = self._infos[unit]["ids"][row]
        if self.labels is not None:
            sample["label"] = self._label(key)
        return sample

    def dataset(self, layer: str, level: LevelSpec, split: str) -> LayerDataset:
        """Returns (feature, label) pairs of one (layer, level) and split, read as they are asked for."""
        return LayerDataset(self, self._name(layer, level), self.rows(split))

    def __repr__(self) -> str:
        return (
            f"FeatureStore({str(self.path)!r}): {len(self):,} samples, splits {self.splits}, "
            f"{len(self.layers)} layers x {len(self.levels)} levels"
        )

    def __getstate__(self) -> dict[str, Any]:
        # File handles stay in the process that opened them; data-loader workers open their own.
        return {**self.__dict__, "_opened": {}, "_mapped": {}}

    def key(self, layer: str, level: LevelSpec) -> tuple[str, str]:
        """Returns the layer and the canonical key of the level.

        Raises:
            UnknownNameError: The store has no such layer or level.
        """
        layer = self._aliases.get(layer, layer)
        if layer not in self.layers:
            raise UnknownNameError("layer", layer, self.layers, f"The store is {self.path}")
        return layer, self._table.key(level)

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

    def _label(self, row: int) -> int | torch.Tensor:
        label = self.labels[row]
        return torch.from_numpy(label) if label.ndim else int(label)

    def _name(self, layer: str, level: LevelSpec) -> str:
        return "@".join(self.key(layer, level))

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        unit = int(np.searchsorted(self._ends, index, side="right"))
        return unit, index - (int(self._ends[unit - 1]) if unit else 0)

    def _open(self, unit: int) -> Any:
        if unit not in self._opened:
            file = tensor_file(self.path, self._infos[unit]["unit"])
            try:
                self._opened[unit] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise StoreError(f"cannot read {file}: {error}; delete its .json and extract again") from error
        return self._opened[unit]

    def _tensor(self, unit: int, name: str) -> torch.Tensor:
        if (unit, name) not in self._mapped:
            self._mapped[unit, name] = self._open(unit).get_tensor(name)
        return self._mapped[unit, name]


class LayerDataset(Dataset):
    """(feature, label) pairs of one (layer, level), over some rows of a store; several labels are a tensor (L,)."""

    def __init__(self, store: FeatureStore, name: str, rows: np.ndarray):
        self.store, self.name, self.rows = store, name, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int | torch.Tensor]:
        row = int(self.rows[index])
        unit, place = self.store._locate(row)
        return self.store._tensor(unit, self.name)[place], self.store._label(row)
