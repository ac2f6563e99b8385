"""Writing a feature store, unit by unit, from any number of processes."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from diffrep.errors import StoreError
from diffrep.store.layout import (
    INDEX,
    META,
    Unit,
    changes,
    info_file,
    list_units,
    read_json,
    tensor_file,
    write_json,
    write_whole,
)

# Recorded, and warned about when they change; not part of what a store is.
VERSIONS = "versions"
# What a folder or a condition is called, and what a layer costs, do not change a feature.
BESIDE_THE_POINT = r"backbone\.name|backbone\.cond\.given|data\.path|layers\..*\.cost|costs\..*"


class StoreWriter:
    """A store being filled.

    Args:
        path: Folder of the store; created when missing.
        meta: What the features are, as plain JSON values. `meta["splits"]` maps each split to [first, last + 1] and
            `meta["unit_size"]` is the number of samples of a unit.

    Raises:
        StoreError: The folder holds a store of another request; every key that differs is named.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any]):
        self.path = Path(path)
        self.meta = json.loads(json.dumps(meta))
        splits = {name: range(*bounds) for name, bounds in self.meta["splits"].items()}
        self.units = list_units(splits, self.meta["unit_size"])
        if (self.path / META).exists():
            self._compare(read_json(self.path / META))
        elif self.path.exists() and any(self.path.iterdir()):
            raise StoreError(f"{self.path} is not empty and holds no feature store; give another out")
        else:
            write_json(self.path / META, self.meta)

    def missing(self) -> list[Unit]:
        """Returns the units that are not there yet."""
        return [unit for unit in self.units if not unit_exists(self.path, unit.number)]

    def write(
        self,
        unit: Unit,
        tensors: dict[str, torch.Tensor],
        ids: list[str],
        rows: list[int],
        labels: list[int] | list[list[int]] | None,
        skipped: list[dict[str, str]],
    ) -> None:
        """Writes a unit: first its tensors, then the JSON that makes it count.

        Raises:
            StoreError: It cannot be written.
        """
        content = dict(tensors, row=torch.tensor(rows, dtype=torch.int64))
        if labels is not None:
            content["label"] = torch.tensor(labels, dtype=torch.int64)
        packed = save({name: tensor.contiguous() for name, tensor in content.items()})
        write_whole(tensor_file(self.path, unit.number), packed)
        info = {
            "unit": unit.number,
            "split": unit.split,
            "samples": len(ids),
            "bytes": len(packed),
            "sha256": hashlib.sha256(packed).hexdigest(),
            "ids": ids,
            "skipped": skipped,
        }
        write_json(info_file(self.path, unit.number), info)

    def finish(self) -> None:
        """Writes index.json and skipped.jsonl from the units.

        Raises:
            StoreError: A unit is missing.
        """
        missing = self.missing()
        if missing:
            raise StoreError(f"{len(missing)} of {len(self.units)} units are missing in {self.path}")
        infos = [read_json(info_file(self.path, unit.number)) for unit in self.units]
        skipped = [entry for info in infos for entry in info["skipped"]]
        if skipped:
            lines = "".join(json.dumps(entry) + "\n" for entry in skipped)
            write_whole(self.path / "skipped.jsonl", lines.encode())
        short = [{key: info[key] for key in ("unit", "split", "samples", "bytes", "sha256")} for info in infos]
        write_json(self.path / INDEX, {"samples": sum(i["samples"] for i in infos), "units": short})

    def _compare(self, stored: dict[str, Any]) -> None:
        old, new = flatten(stored), flatten(self.meta)
        keys = [key for key in old.keys() | new.keys() if not re.fullmatch(BESIDE_THE_POINT, key)]
        differ = sorted(key for key in keys if old.get(key) != new.get(key))
        versions = [key for key in differ if key.split(".")[0] == VERSIONS]
        if versions:
            others = ", ".join(f"{key.partition('.')[2]} {old.get(key)} -> {new.get(key)}" for key in versions)
            warnings.warn(f"{self.path} was begun with other package versions: {others}", stacklevel=3)
        rest = [key for key in differ if key not in versions]
        real = changes({key: old.get(key) for key in rest}, {key: new.get(key) for key in rest})
        if real:
            raise StoreError(
                f"{self.path} was made by another request; give another out, or the same settings. It differs in\n  "
                + "\n  ".join(real)
            )


def unit_exists(store: Path, number: int) -> bool:
    """Tells whether a unit was written whole: its JSON is there and the tensors' file has the size it names."""
    info = info_file(store, number)
    if not info.exists():
        return False
    tensors = tensor_file(store, number)
    return tensors.exists() and tensors.stat().st_size == read_json(info)["bytes"]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to dotted keys; lists stay values."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(flatten(inner, f"{prefix}.{key}" if prefix else key))
    return found
