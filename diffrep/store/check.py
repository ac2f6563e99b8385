"""Whether a store is whole: what is missing, damaged, told otherwise by an index, there twice, or left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from diffrep.errors import StoreError
from diffrep.store.finished import REQUESTS, pick_finished
from diffrep.store.header import damaged
from diffrep.store.index import FolderIndex, UnitInfo, number_of, parse_folder, parse_index, parse_unit
from diffrep.store.inside import check_inside, read_inside
from diffrep.store.layout import (
    CHECKSUM,
    CLAIMS,
    FORMAT,
    INDEX,
    META,
    SHARD,
    UNITS,
    checksum,
    folder_index,
    folder_name,
    ids_checksum,
    info_name,
    tensor_name,
    units_of,
)
from diffrep.store.meta import read_levels, read_meta, read_shapes
from diffrep.store.place import Place, is_temporary, open_place
from diffrep.store.tensors import open_unit

# Bytes that are read and hashed at once.
CHUNK = 1 << 22


@dataclass
class Report:
    """What is wrong with a store.

    Attributes:
        target: Path or URL.
        units: Number of all units.
        finished: Whether index.json is there.
        index_only: Whether sizes alone were compared.
        damaged: Units that cannot be read as what their checksum and JSON say, by number, with the reason.
        missing: Units that are not there.
        disagree: Units that are whole and other than the index of their folder says.
        indexes: Indexes that are missing, damaged or at odds, by name, with the reason.
        duplicates: Ids that come twice in a split, as (split, id, units).
        stray: Temporary files.
        unknown: Files in the place of units that belong to none.
        claims: Names of the claims.
    """

    target: str
    units: int
    finished: bool
    index_only: bool
    damaged: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    disagree: list[int] = field(default_factory=list)
    indexes: dict[str, str] = field(default_factory=dict)
    duplicates: list[tuple[str, str, list[int]]] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether the store is finished and nothing is wrong with it."""
        return self.finished and not any(getattr(self, one.name) for one in fields(self)[4:])

    def text(self) -> str:
        """Returns the report in lines; of long lists the beginning."""
        told = {
            "damaged": [f"unit {number}: {reason}" for number, reason in _first(self.damaged.items())],
            "missing": [f"units {', '.join(map(str, _first(self.missing, 20)))}"],
            "disagree": [f"units {', '.join(map(str, _first(self.disagree, 20)))} are not those of their index"],
            "indexes": [f"{name}: {reason}" for name, reason in _first(self.indexes.items())],
            "duplicates": [
                f"id {ident!r} of split {split!r} in units {', '.join(map(str, numbers))}"
                for split, ident, numbers in _first(self.duplicates)
            ],
            "stray": [f"temporary file {name!r}" for name in _first(self.stray)],
            "unknown": [f"file {name!r} of no unit" for name in _first(self.unknown)],
            "claims": [f"claim {name!r}" for name in _first(self.claims)],
        }
        looked = "sizes compared" if self.index_only else "every byte read"
        state = "clean" if self.clean else "not clean" if self.finished else "not finished"
        lines = [f"{self.target}: {state}; {self.units:,} units, {looked}"]
        for name, words in told.items():
            count = len(getattr(self, name))
            if count:
                lines += [f"  {name:<11}{count:,}", *(f"    {line}" for line in words)]
                lines += ["    ..."] * (count > 20 or (len(words) > 1 and count > len(words)))
        return "\n".join(lines)


def verify(target: str | Path | Place, index_only: bool = False, threads: int | None = None) -> Report:
    """Compares a store's files with what its JSON and its indexes say.

    Args:
        target: Folder or URL of the store, finished or not.
        index_only: Compare which files are there and their sizes with the indexes, and open no others. This finds
            neither changed bytes nor ids that come twice.
        threads: How many read at once; None takes the processors, and for places on other machines 16.

    Raises:
        StoreError: There is no store, meta.json is damaged, or another version wrote it.
    """
    place = target if isinstance(target, Place) else open_place(target)
    return _Check(place, index_only, threads).run()


class _Check:
    """A verification under way."""

    def __init__(self, place: Place, index_only: bool, threads: int | None):
        self.place, self.index_only = place, index_only
        self.local = place.file(INDEX) is not None
        self.threads = threads or (min(8, os.cpu_count() or 1) if self.local else REQUESTS)
        meta = read_meta(place)
        self.units = units_of(meta)
        # Shards hold as many samples as they hold.
        self.counted = meta["unit_size"] != SHARD
        levels = read_levels(place, meta).levels
        self.shapes = {f"{la}@{le}": shape for la, shape in read_shapes(place, meta).items() for le in levels}
        self.report = Report(place.target, len(self.units), place.size(INDEX) is not None, index_only)
        self.ids: dict[int, np.ndarray] = {}
        self.totals = {"samples": 0, "skipped": 0, "bytes": 0}

    def run(self) -> Report:
        report = self.report
        told = self._index() if report.finished else None
        self._look_around()
        with ThreadPoolExecutor(self.threads) as pool:
            folders = range(self.units.folders)
            # A folder's listing is a request, and on this machine bound by the interpreter.
            for folder, sizes in zip(folders, _ahead(pool, self._sizes, folders, self.local), strict=True):
                self._check_folder(folder, sizes, told, pool)
        if told is not None and not report.indexes and self.totals != {key: told[key] for key in self.totals}:
            report.indexes[INDEX] = f"its sums are not those of the folders, {self.totals}"
        if not self.index_only:
            report.duplicates = self._duplicates()
        return report

    def _sizes(self, folder: int) -> dict[str, int]:
        return self.place.sizes(folder_name(folder))

    def _index(self) -> dict[str, Any] | None:
        try:
            content = read_inside(self.place, INDEX)
            _refuse_others(content, self.place)
            index = parse_index(content, self.place.where(INDEX), self.units)
            if index["meta"] != checksum(read_inside(self.place, META)):
                self.report.indexes[INDEX] = f"made from another {META}"
            return index
        except StoreError as error:
            if isinstance(error, _OtherVersion):
                raise
            self.report.indexes[INDEX] = str(error)
            return None

    def _look_around(self) -> None:
        report, place = self.report, self.place
        known = {folder_name(folder) for folder in range(self.units.folders)}
        report.unknown += [f"{UNITS}/{name}" for name in place.folders(UNITS) if f"{UNITS}/{name}" not in known]
        for folder in ("", UNITS, CLAIMS):
            names = place.list(folder)
            report.stray += [f"{folder}/{name}".lstrip("/") for name in names if is_temporary(name)]
            if folder == CLAIMS:
                report.claims += [f"{folder}/{name}" for name in names if not is_temporary(name)]

    def _check_folder(self, folder: int, sizes: dict[str, int], told: Any, pool: ThreadPoolExecutor) -> None:
        report, numbers, name = self.report, self.units.in_folder(folder), folder_name(folder)
        for number in numbers:
            if f"{number:07d}.json" in sizes and f"{number:07d}.safetensors" not in sizes:
                size = self.place.size(tensor_name(number))
                if size is None:
                    report.damaged[number] = "its JSON is there and its tensors are not"
                else:  # both were written while the folder was listed
                    sizes[f"{number:07d}.safetensors"] = size
        there = pick_finished(sizes, numbers)
        report.missing += sorted(set(numbers).difference(there, report.damaged))
        if len(sizes) > 2 * len(there) + (INDEX in sizes):
            for file in sorted(sizes):
                if is_temporary(file):
                    report.stray.append(f"{name}/{file}")
                elif file.endswith((".json", ".safetensors")) and file != INDEX and not self._belongs(file, folder):
                    report.unknown.append(f"{name}/{file}")
        index = self._folder_index(folder, INDEX in sizes, None if told is None else told["folders"][folder])
        if index is not None:
            if self.index_only:
                for number in there:
                    found = sizes[f"{number:07d}.safetensors"]
                    if found != index.bytes[number - numbers.start]:
                        self._judge_size(number, found)
            for key in self.totals:
                self.totals[key] += int(getattr(index, key).sum())
            if self.counted:
                self._count(index, folder_index(folder))
        if not self.index_only:
            for number, reason, agrees in pool.map(lambda one: self._check_unit(one, index), there):
                if reason is not None:
                    report.damaged[number] = reason
                elif not agrees:
                    report.disagree.append(number)

    def _belongs(self, file: str, folder: int) -> bool:
        number = number_of(file, folder, os.path.splitext(file)[1])
        return number is not None and number < len(self.units)

    def _folder_index(self, folder: int, there: bool, told: dict[str, Any] | None) -> FolderIndex | None:
        """Returns the index of a folder, or None where it is missing or damaged; notes what is wrong."""
        name = folder_index(folder)
        if not there:
            if self.report.finished:
                self.report.indexes[name] = "missing"
            return None
        try:
            content = read_inside(self.place, name)
            index = parse_folder(content, self.place.where(name), folder, self.units)
        except StoreError as error:
            self.report.indexes[name] = str(error)
            return None
        if told is not None and not (
            told["checksum"] == checksum(content)
            and told["samples"] == index.samples.sum()
            and told["bytes"] == index.bytes.sum()
        ):
            self.report.indexes[name] = f"not the one that {INDEX} tells of"
        return index

    def _judge_size(self, number: int, found: int) -> None:
        """Asks a unit's JSON which is wrong, its tensors or the index that tells of another size."""
        name = info_name(number)
        try:
            wanted = parse_unit(read_inside(self.place, name), self.place.where(name), number, self.units).bytes
        except StoreError as error:
            self.report.damaged[number] = str(error)
            return
        if found == wanted:
            self.report.disagree.append(number)
        else:
            self.report.damaged[number] = f"its tensors have {found} bytes in place of {wanted}"

    def _count(self, index: FolderIndex, name: str) -> None:
        sizes = np.array([len(self.units[number].rows) for number in index.units])
        for at in np.flatnonzero(index.samples + index.skipped != sizes)[:1]:
            self.report.indexes[name] = (
                f"unit {index.units[int(at)]} has {index.samples[at]} samples, {index.skipped[at]} skipped ones, and "
                f"its range {sizes[at]}"
            )

    def _check_unit(self, number: int, index: FolderIndex | None) -> tuple[int, str | None, bool]:
        """Reads a unit; returns its number, what is wrong with it, and whether the index tells the same."""
        name = info_name(number)
        content = b""
        try:
            content = read_inside(self.place, name)
            info = parse_unit(content, self.place.where(name), number, self.units)
            self._check_tensors(info)
        except StoreError as error:
            _refuse_others(content, self.place)
            return number, str(error), True
        self.ids[number] = np.array([_hash(ident) for ident in info.ids], dtype=np.uint64)
        if index is None:
            return number, None, True
        at = number - index.units.start
        told = index.samples[at], index.bytes[at], index.checksum[at], index.skipped[at]
        return number, None, told == (info.samples, info.bytes, info.checksum, len(info.skipped))

    def _check_tensors(self, info: UnitInfo) -> None:
        name = tensor_name(info.unit)
        where, unit = self.place.where(name), self.units[info.unit]
        file = open_unit(self.place, name, info.bytes)
        found = self._hash_file(name, info.bytes)
        if found != info.checksum:
            raise damaged(where, f"its checksum is {found} in place of {info.checksum}")
        file.check(info.samples, self.shapes)
        if file.metadata.get("ids") != ids_checksum(info.ids, info.skipped):
            raise damaged(self.place.where(info_name(info.unit)), "its names are not those that belong to the tensors")
        lacking = [one for one in ("row", *self.shapes) if one not in file.slots] if info.samples else []
        if lacking:
            raise damaged(where, f"it lacks {', '.join(lacking)}")
        if self.counted and info.samples + len(info.skipped) != len(unit.rows):
            raise damaged(
                where, f"{info.samples} samples and {len(info.skipped)} skipped ones are not {len(unit.rows)}"
            )
        rows = file.tensor("row") if info.samples else torch.zeros(0, dtype=torch.int64)
        first, end = (unit.rows.start, unit.rows.stop) if self.counted else (0, 2**62)
        if len(rows) and not (rows[0] >= first and rows[-1] < end and bool((rows[1:] > rows[:-1]).all())):
            raise damaged(where, f"its rows are not those of samples {first} to {end - 1}, each once")

    def _hash_file(self, name: str, size: int) -> str:
        digest = xxhash.xxh3_128()
        for content in self._chunks(name, size):
            digest.update(content)
        return CHECKSUM + digest.hexdigest()

    def _chunks(self, name: str, size: int) -> Iterator[bytes | memoryview]:
        path = check_inside(self.place, name)
        if path is None:
            yield from (self.place.read(name, start, start + CHUNK) for start in range(0, size, CHUNK))
            return
        buffer = memoryview(bytearray(min(CHUNK, size + 1)))
        try:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    yield buffer[:count]
        except OSError as error:
            raise damaged(str(path), error.strerror or str(error)) from error

    def _duplicates(self) -> list[tuple[str, str, list[int]]]:
        found = []
        for split in self.units.splits:
            numbers = [number for number in self.units.numbers_of(split) if number in self.ids]
            if not numbers:
                continue
            every = np.sort(np.concatenate([self.ids[number] for number in numbers]))
            twice = np.unique(every[1:][every[1:] == every[:-1]])
            if not len(twice):
                continue
            homes: dict[str, list[int]] = {}
            for number in numbers:
                if np.isin(self.ids[number], twice).any():
                    for ident in parse_unit(read_inside(self.place, info_name(number)), "", number).ids:
                        homes.setdefault(ident, []).append(number)
            found += [(split, ident, units) for ident, units in homes.items() if len(units) > 1]
        return found


class _OtherVersion(StoreError):
    """A store of another format, in which everything would look damaged."""


def _refuse_others(content: bytes, place: Place) -> None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return
    # A unit's JSON of the first format, or an index of another one.
    if isinstance(value, dict) and ("sha256" in value or ("unit" not in value and value.get("format") != FORMAT)):
        raise _OtherVersion(
            f"{place.target} was written by another version, whose format is not {FORMAT}; extract it again"
        )


def _hash(ident: str) -> int:
    return xxhash.xxh3_64_intdigest(ident.encode("utf-8", "surrogatepass"))


def _first(items: Iterable[Any], count: int = 20) -> list[Any]:
    return [item for item, _ in zip(items, range(count), strict=False)]


def _ahead(pool: ThreadPoolExecutor, call: Any, items: range, here: bool) -> Iterator[Any]:
    """Calls a function with each item, of places on other machines some ahead."""
    if here:
        yield from map(call, items)
        return
    for start in range(0, len(items), REQUESTS):
        yield from pool.map(call, items[start : start + REQUESTS])
