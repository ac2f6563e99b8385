"""The units of a store as columns, so that a million of them take little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from diffrep.errors import StoreError
from diffrep.store.finished import REQUESTS, pick_finished
from diffrep.store.index import FolderIndex, UnitInfo, parse_folder, parse_index, parse_unit
from diffrep.store.inside import read_inside
from diffrep.store.layout import CHECKSUM, INDEX, META, Units, checksum, folder_index, folder_name, info_name
from diffrep.store.place import Place

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class UnitTable:
    """Units that are there, in order.

    Attributes:
        numbers: Of the units (n,) int64.
        samples: Samples of each (n,) int64.
        bytes: Size of each tensors' file (n,) int64.
        skipped: Samples of each that could not be read (n,) int64.
        checksums: Of the tensors' files (n, 16) uint8.
    """

    numbers: np.ndarray
    samples: np.ndarray
    bytes: np.ndarray
    skipped: np.ndarray
    checksums: np.ndarray

    def checksum(self, at: int) -> str:
        """Returns the checksum of the unit at a position, as its JSON has it."""
        return CHECKSUM + self.checksums[at].tobytes().hex()

    def __getitem__(self, which: np.ndarray) -> UnitTable:
        return UnitTable(*(column[which] for column in self._columns()))

    def __len__(self) -> int:
        return len(self.numbers)

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.numbers, self.samples, self.bytes, self.skipped, self.checksums

    @classmethod
    def of_folder(cls, index: FolderIndex) -> UnitTable:
        """Returns the units of a folder that has all of its own."""
        return cls(np.array(index.units), index.samples, index.bytes, index.skipped, _raw(index.checksum))

    @classmethod
    def of_units(cls, infos: list[UnitInfo]) -> UnitTable:
        """Returns single units."""
        rows = np.array([(one.unit, one.samples, one.bytes, len(one.skipped)) for one in infos], dtype=np.int64)
        return cls(*rows.reshape(-1, 4).T, _raw([one.checksum for one in infos]))

    @classmethod
    def joined(cls, parts: Iterable[UnitTable]) -> UnitTable:
        """Returns the units of several tables, one after the other."""
        found = [part._columns() for part in parts] or [cls.of_units([])._columns()]
        return cls(*map(np.concatenate, zip(*found, strict=True)))


def _raw(checksums: list[str]) -> np.ndarray:
    text = "".join(one.removeprefix(CHECKSUM) for one in checksums)
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(len(checksums), 16)


def read_table(place: Place, units: Units) -> UnitTable:
    """Reads all units of a finished store from the indexes of its folders.

    Raises:
        StoreError: An index is missing, damaged, or disagrees with index.json.
    """
    index = parse_index(read_inside(place, INDEX), place.where(INDEX), units)
    if checksum(read_inside(place, META)) != index["meta"]:
        raise StoreError(
            f"{place.where(META)} is not the one that {INDEX} was made from; bring that back, or run 'diffrep store "
            "repair' to take this one"
        )

    def read(folder: int) -> UnitTable:
        name, entry = folder_index(folder), index["folders"][folder]
        content = read_inside(place, name)
        if checksum(content) != entry["checksum"]:
            raise StoreError(
                f"{place.where(name)} is not the one that {INDEX} was made from; run 'diffrep store verify' to see "
                "what changed"
            )
        part = UnitTable.of_folder(parse_folder(content, place.where(name), folder, units))
        _compare(place, name, part, entry)
        return part

    table = _plausible(place, UnitTable.joined(several(place, read, range(units.folders))))
    _compare(place, INDEX, table, index)
    return table


def read_part(place: Place, units: Units) -> UnitTable:
    """Reads the units that are there of a store that need not be finished.

    Raises:
        StoreError: An index or a unit's JSON is damaged.
    """

    def read(folder: int) -> UnitTable:
        name = folder_index(folder)
        if place.size(name) is not None:
            return UnitTable.of_folder(parse_folder(read_inside(place, name), place.where(name), folder, units))
        numbers = pick_finished(place.list(folder_name(folder)), units.in_folder(folder))
        return UnitTable.of_units([read_info(place, number, units) for number in numbers])

    return _plausible(place, UnitTable.joined(several(place, read, range(units.folders))))


def read_info(place: Place, number: int, units: Units) -> UnitInfo:
    """Reads a unit's JSON.

    Raises:
        StoreError: It is missing, damaged, or tells of another unit.
    """
    name = info_name(number)
    return parse_unit(read_inside(place, name), place.where(name), number, units)


def several(place: Place, call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Calls a function that reads from a place with each item; of remote places with several at once."""
    if place.file(META) is not None:
        yield from map(call, items)
        return
    with ThreadPoolExecutor(REQUESTS) as pool:
        left = iter(items)
        while some := list(islice(left, REQUESTS)):
            yield from pool.map(call, some)


def _plausible(place: Place, table: UnitTable) -> UnitTable:
    """Raises where sizes cannot be: a sample takes eight bytes at least, and sums must not run over."""
    if (table.samples > table.bytes // 8).any() or table.bytes.sum(dtype=float) > 2**62:
        raise StoreError(f"the indexes of {place.target} tell of sizes that no files have; run 'diffrep store verify'")
    return table


def _compare(place: Place, name: str, table: UnitTable, told: dict[str, Any]) -> None:
    for key in ("samples", "bytes", "skipped"):
        total = int(getattr(table, key).sum())
        if key in told and total != told[key]:
            raise StoreError(
                f"{INDEX} in {place.target} tells of {told[key]} {key} of {name}, whose units have {total}; run "
                "'diffrep store verify' to see what changed"
            )
