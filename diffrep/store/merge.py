"""Stores with other layers or levels of the same samples, merged into one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffrep.errors import StoreError
from diffrep.store.header import damaged
from diffrep.store.index import UnitInfo
from diffrep.store.layout import Unit, checksum, ids_checksum, tensor_name
from diffrep.store.meta import read_shapes
from diffrep.store.reader import FeatureStore
from diffrep.store.table import read_info
from diffrep.store.tensors import MemoryUnit, load_unit
from diffrep.store.writer import BESIDE_THE_POINT, VERSIONS, StoreWriter, flatten

# What two requests of other layers or levels may differ in.
FREE = rf"request\.(layers|levels)|(layers|levels|costs|aliases|trajectories)(\..*)?|{BESIDE_THE_POINT}"


def merge_stores(paths: Sequence[str | Path], out: str | Path) -> FeatureStore:
    """Merges stores of the same samples that have other layers or levels.

    The result is what one extraction of all layers at all levels would have made, and extracting that finds it
    complete. It is written unit by unit, each read and checked as a whole; a merge that was interrupted goes on when
    it is called again.

    A sample that one of the stores skipped is skipped, with the reason given there. A (layer, level) that several
    stores have is taken from the first of them.

    Args:
        paths: The stores, folders or URLs, finished.
        out: The new store. Layers and levels keep the order in which the stores bring them.

    Returns:
        The new store.

    Raises:
        StoreError: A store is not finished or damaged, they differ in more than layers and levels (every key that
            does is named), a layer lacks one of the levels, or `out` is another store or cannot be written.
    """
    if len(paths) < 2:
        raise StoreError(f"a merge takes two stores or more, got {len(paths)}")
    stores = [FeatureStore(path) for path in paths]
    writer = StoreWriter(out, merge_meta({str(store.path): store.meta for store in stores}))
    merge = _Merge(stores, writer)
    for unit in tqdm(writer.missing(), "merge", unit="unit", disable=None):
        merge.write(unit)
    writer.finish()
    return FeatureStore(out)


def merge_meta(metas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the meta.json of a merged store.

    Args:
        metas: Those of the stores, by where they lie.

    Raises:
        StoreError: They cannot be merged.
    """
    (first, merged), *others = metas.items()
    for path, meta in others:
        _compare(first, merged, path, meta)
    found = dict(merged)
    for key in ("aliases", "layers", "trajectories"):
        entries = _joined(key, [(path, meta.get(key, {}).items()) for path, meta in metas.items()])
        if entries:
            found[key] = entries
    _joined("levels", [(path, [(key, rest) for _, key, *rest in meta["levels"]]) for path, meta in metas.items()])
    found["levels"] = _distinct(meta["levels"] for meta in metas.values())
    if "request" in merged:
        lists = {key: _distinct(meta["request"][key] for meta in metas.values()) for key in ("layers", "levels")}
        found["request"] = merged["request"] | lists
    if "costs" in merged:
        found["costs"] = dict(merged["costs"])
        for key in ("draws", "before"):
            if key in merged["costs"]:
                found["costs"][key] = {k: v for meta in metas.values() for k, v in meta["costs"][key].items()}
    _check_product(found, metas)
    return found


def _compare(first: str, one: dict[str, Any], path: str, other: dict[str, Any]) -> None:
    """Raises unless two stores differ in layers and levels alone; other package versions are warned about."""
    ours, theirs = flatten(one), flatten(other)
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    differ = [key for key in keys if not re.fullmatch(FREE, key)]
    told = [f"{key}: {ours.get(key)} in {first}, {theirs.get(key)} in {path}" for key in differ]
    versions = [line for line, key in zip(told, differ, strict=True) if key.split(".")[0] == VERSIONS]
    if versions:
        warnings.warn("the stores were made with other package versions: " + "; ".join(versions), stacklevel=4)
    real = [line for line in told if line not in versions]
    if real:
        raise StoreError(
            "stores are merged when they differ in layers and levels alone; these differ in\n  " + "\n  ".join(real)
        )


def _joined(what: str, entries: list[tuple[str, Iterable[tuple[str, Any]]]]) -> dict[str, Any]:
    """Joins what stores say by name; raises where two say other things of one name."""
    found: dict[str, Any] = {}
    home: dict[str, str] = {}
    for path, pairs in entries:
        for name, value in pairs:
            given = found.setdefault(name, value)
            if _but_cost(given) != _but_cost(value):
                raise StoreError(f"{what}: {name} is {given} in {home[name]} and {value} in {path}")
            home.setdefault(name, path)
    return found


def _but_cost(value: Any) -> Any:
    return {key: part for key, part in value.items() if key != "cost"} if isinstance(value, dict) else value


def _distinct(lists: Iterable[list[Any]]) -> list[Any]:
    found: list[Any] = []
    for values in lists:
        found += [value for value in values if value not in found]
    return found


def _names(meta: dict[str, Any]) -> list[str]:
    keys = dict.fromkeys(key for _, key, *_ in meta["levels"])
    return [f"{layer}@{key}" for layer in meta["layers"] for key in keys]


def _check_product(merged: dict[str, Any], metas: dict[str, dict[str, Any]]) -> None:
    there = {name for meta in metas.values() for name in _names(meta)}
    wanted = _names(merged)
    lacking = [name for name in wanted if name not in there]
    if lacking:
        shown = ", ".join(lacking[:8]) + (", ..." if len(lacking) > 8 else "")
        raise StoreError(
            f"a store has every layer at every level, and together these lack {len(lacking)} of {len(wanted)}: "
            f"{shown}; extract those too, and merge them first"
        )


class _Merge:
    """A merge under way.

    Args:
        stores: What is merged.
        writer: The new store.
    """

    def __init__(self, stores: list[FeatureStore], writer: StoreWriter):
        self.stores, self.writer = stores, writer
        self.names = _names(writer.meta)
        # Of the stores that have a tensor, the first.
        self.home = {name: place for place, store in reversed(list(enumerate(stores))) for name in _names(store.meta)}

    def write(self, unit: Unit) -> None:
        """Writes a unit.

        Raises:
            StoreError: A store's files of it are damaged, or the stores hold other samples.
        """
        infos = [read_info(store.place, unit.number, self.writer.units) for store in self.stores]
        files = [_read(store, info) for store, info in zip(self.stores, infos, strict=True)]
        rows = [file.tensor("row").tolist() for file in files]
        everywhere = set(rows[0]).intersection(*rows[1:])
        common = [row for row in rows[0] if row in everywhere]
        places = [{row: place for place, row in enumerate(mine)} for mine in rows]
        at = [[where[row] for row in common] for where in places]
        ids = self._same("the ids", unit, [[info.ids[i] for i in of] for info, of in zip(infos, at, strict=True)])
        tensors = {name: _some(files[self.home[name]], name, at[self.home[name]]) for name in self.names if ids}
        labels = None
        if all("label" in file.slots for file in files):
            given = [_some(file, "label", of).tolist() for file, of in zip(files, at, strict=True)]
            labels = self._same("the labels", unit, given)
        self.writer.write(unit, tensors, ids, common, labels, self._skipped(infos, set(ids)))

    def _same(self, what: str, unit: Unit, values: list[list[Any]]) -> list[Any]:
        for store, given in zip(self.stores, values, strict=True):
            if given != values[0]:
                raise StoreError(
                    f"{what} of unit {unit.number} differ between {self.stores[0].path} and {store.path}; they were "
                    "made of other data"
                )
        return values[0]

    def _skipped(self, infos: list[UnitInfo], kept: set[str]) -> list[dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for info in infos:
            for entry in info.skipped:
                found.setdefault(entry.get("id", ""), entry)
        for store, info in zip(self.stores, infos, strict=True):
            lacking = {name for other in infos for name in other.ids} - {*info.ids, *kept}
            for name in sorted(lacking):
                found.setdefault(name, {"id": name, "reason": f"not in the store {store.name}"})
        return list(found.values())


def _read(store: FeatureStore, info: UnitInfo) -> MemoryUnit:
    """Returns a unit's tensors after a look at every byte: damage would get a checksum of its own in the new store."""
    file = load_unit(store.place, tensor_name(info.unit), info.bytes)
    if checksum(file.memory) != info.checksum:
        raise damaged(file.where, "its checksum is not the one in its JSON")
    if file.metadata.get("ids") != ids_checksum(info.ids, info.skipped):
        raise damaged(file.where, "the ids in its JSON are those of other samples")
    shapes = read_shapes(store.place, store.meta)
    file.check(info.samples, {name: shapes[name.rpartition("@")[0]] for name in _names(store.meta)})
    return file


def _some(file: MemoryUnit, name: str, places: list[int]) -> torch.Tensor:
    whole = file.tensor(name)
    return whole if places == list(range(len(whole))) else whole[places]
