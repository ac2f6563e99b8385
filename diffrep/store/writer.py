"""Writing a feature store, unit by unit, from any number of processes."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffrep.errors import StoreError
from diffrep.store.finished import Finished
from diffrep.store.folders import Folders
from diffrep.store.index import parse, read_unit
from diffrep.store.layout import (
    CLAIMS,
    FORMAT,
    INDEX,
    META,
    PER_FOLDER,
    SKIPPED,
    UNITS,
    Unit,
    changes,
    checksum,
    info_name,
    names_checksum,
    tensor_name,
    to_json,
    units_of,
)
from diffrep.store.packing import Packed
from diffrep.store.place import is_temporary, open_place

# Recorded, and warned about when they change; not part of what a store is.
VERSIONS = "versions"
# What a folder or a condition is called, and what a layer costs, do not change a feature.
BESIDE_THE_POINT = r"backbone\.name|backbone\.cond\.given|data\.path|layers\..*\.cost|costs\..*"


class StoreWriter:
    """A store being filled.

    Args:
        target: Folder of the store, or an fsspec URL; created when missing.
        meta: What the features are, as plain JSON values. `meta["splits"]` maps each split to [first, last + 1] and
            `meta["unit_size"]` is the number of samples of a unit; "shard" where the splits are ranges of input
            shards, of which each is a unit.

    Attributes:
        place: Where the store lies.
        meta: As given.
        units: All its units.

    Raises:
        StoreError: The folder holds a store of another request, where every key that differs is named; or it holds
            something else, or cannot be written.
    """

    def __init__(self, target: str | Path, meta: dict[str, Any]):
        self.place = open_place(target)
        self.meta = json.loads(json.dumps(meta))
        self.units = units_of(self.meta)
        self._folders = Folders(self.place, self.units)
        self.place.make()
        if self._holds_meta() or not self.place.create(META, to_json(self.meta), whole=True):
            self._compare(self._stored_meta())
        self.place.make(UNITS)

    def missing(self) -> list[Unit]:
        """Returns the units that are not there yet."""
        finished = Finished(self.place, self.units)
        finished.look()
        return [self.units[number] for number in finished.missing().tolist()]

    def write(
        self,
        unit: Unit,
        tensors: dict[str, torch.Tensor],
        ids: list[str],
        rows: list[int],
        labels: list[int] | list[list[int]] | None,
        skipped: list[dict[str, str]],
        token: str = "",
        still: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Writes a unit: first its tensors, then the JSON that makes it count.

        Args:
            unit: Which one.
            tensors: "layer@level" features (n, ...), of samples that could be read; contiguous ones are not copied.
            ids: Their ids.
            rows: Their places in the data set or the shard.
            labels: Their labels, n numbers or n lists of L; None without.
            skipped: "id" and "reason" of those that could not be read.
            token: Names this process in temporary files, so that another one can remove them.
            still: Asked before each of the two files is seen: whether this process still has the unit.

        Returns:
            Whether this process published it; if not, another one has the unit or has finished it.

        Raises:
            StoreError: It cannot be written; nothing of it stays.
        """
        content = dict(tensors, row=_numbers(rows))
        if labels is not None:
            content["label"] = _numbers(labels)
        names = json.dumps(ids), json.dumps(skipped)
        packed = Packed(content, {"ids": names_checksum(*names)})
        try:
            if not self.place.write(tensor_name(unit.number), packed.parts(), token, still):
                return False
            about = {"unit": unit.number, "split": unit.split, "samples": len(ids), "bytes": packed.size}
            info = _info(about | {"checksum": packed.checksum}, *names)
            if not self.place.write(info_name(unit.number), [info], token, still):
                return False
        except StoreError as error:
            # Its temporary file was swept away by the process that took the unit over, or by the end of the job.
            swept = isinstance(error.__cause__, FileNotFoundError)
            if swept and (not still() or self.place.size(info_name(unit.number)) is not None):
                return False
            raise
        self._folders.wrote(unit.number, len(ids), packed.size, packed.checksum, len(skipped))
        return True

    def close_folder(self, unit: Unit) -> bool:
        """Writes the index of a unit's folder when all its units are there; tells whether it did.

        It does not look after every unit; what stays open is left to `finish`.
        """
        return self._folders.close(unit.number // PER_FOLDER)

    def indexed(self) -> bool:
        """Tells whether the store is finished and nothing of the work on it is left."""
        return self.place.size(INDEX) is not None and CLAIMS not in self.place.folders()

    def finish(self) -> None:
        """Writes index.json and skipped.jsonl, and removes claims and temporary files; harmless when two do it.

        Raises:
            StoreError: A unit is missing, or the place cannot be written.
        """
        try:
            if self.place.size(INDEX) is None:
                self._write_index()
        except StoreError as error:
            # Another process that finishes the store swept a temporary file away.
            if not isinstance(error.__cause__, FileNotFoundError) or self.place.size(INDEX) is None:
                raise
        for name in filter(is_temporary, self.place.list()):
            self.place.remove(name)
        self.place.remove_folder(CLAIMS)

    def _write_index(self) -> None:
        folders, missing = self._folders.finish()
        if missing:
            raise StoreError(
                f"{missing:,} of {len(self.units):,} units are missing in {self.place.target}; extract again, or let "
                "'diffrep store repair' see what was deleted"
            )
        totals = {key: sum(folder[key] for folder in folders) for key in ("samples", "units", "skipped", "bytes")}
        if totals["skipped"]:
            self.place.write(SKIPPED, self._skipped(folders))
        else:
            self.place.remove(SKIPPED)
        listed = [{key: folder[key] for key in folder if key != "skipped"} for folder in folders]
        meta = checksum(self.place.read(META))
        self.place.write(INDEX, [to_json({"format": FORMAT, "meta": meta, **totals, "folders": listed})])

    def _skipped(self, folders: list[dict[str, Any]]) -> Iterator[bytes]:
        for folder in folders:
            if folder["skipped"]:
                for number in self._folders.with_skipped(folder["folder"]):
                    info = read_unit(self.place, number, self.units)
                    yield "".join(json.dumps(entry) + "\n" for entry in info.skipped).encode()

    def _holds_meta(self) -> bool:
        names = self.place.list() + self.place.folders()
        if META in names:
            return True
        others = [name for name in names if not is_temporary(name)]
        # Unless another process has made it since then.
        if others and self.place.size(META) is None:
            raise StoreError(f"{self.place.target} is not empty and holds no feature store; give another out")
        return False

    def _stored_meta(self) -> Any:
        for _ in range(20):
            content = self.place.read(META)
            if content:
                break
            time.sleep(0.1)  # made by another process that has not written it yet
        return parse(content, self.place.where(META))

    def _compare(self, stored: dict[str, Any]) -> None:
        old, new = flatten(stored), flatten(self.meta)
        keys = [key for key in old.keys() | new.keys() if not re.fullmatch(BESIDE_THE_POINT, key)]
        differ = sorted(key for key in keys if old.get(key) != new.get(key))
        versions = [key for key in differ if key.split(".")[0] == VERSIONS]
        if versions:
            others = ", ".join(f"{key.partition('.')[2]} {old.get(key)} -> {new.get(key)}" for key in versions)
            warnings.warn(f"{self.place.target} was begun with other package versions: {others}", stacklevel=3)
        rest = [key for key in differ if key not in versions]
        real = changes({key: old.get(key) for key in rest}, {key: new.get(key) for key in rest})
        if real:
            raise StoreError(
                f"{self.place.target} was made by another request; give another out, or the same settings. It differs "
                "in\n  " + "\n  ".join(real)
            )


def _numbers(values: list[int] | list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))  # torch.tensor takes six times as long


def _info(about: dict[str, Any], ids: str, skipped: str) -> bytes:
    """Returns a unit's JSON; the last two are JSON already."""
    return f'{json.dumps(about)[:-1]}, "skipped": {skipped}, "ids": {ids}}}\n'.encode()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to dotted keys; lists stay values."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(flatten(inner, f"{prefix}.{key}" if prefix else key))
    return found
