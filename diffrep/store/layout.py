"""The files of a feature store and what stands in them.

    store/meta.json  index.json  skipped.jsonl
    store/units/0000/0000123.safetensors  0000123.json  index.json      (1,000 units a folder)
    store/claims/0000123                                                (while processes are at work)

A unit is a fixed range of samples of one split, or the samples of one input shard. Its tensors' file holds a tensor
"{layer}@{level}" (n, ...) for each pair, `row` (int64, the sample's place in the data set or the shard) and, for
labelled data, `label` (int64); the "ids" of its header is a checksum of the names in the JSON. The JSON makes the unit
count; it holds

    {"unit", "split", "samples", "bytes", "checksum": "xxh3-128:<hex>" of the tensors' file, "skipped": [{"id",
     "reason"}], "ids": [...]}

When all units of a folder are there, its index.json holds their columns, so that nobody need list or open them:

    {"units": [first, last + 1], "split": [...], "samples": [...], "bytes": [...], "checksum": [...],
     "skipped": [count, ...]}

meta.json says what the features are. The store's index.json is written when all units are there:

    {"format": 2, "meta": checksum of meta.json, "samples", "units", "skipped", "bytes", "folders": [{"folder",
     "units", "samples", "bytes", "checksum" of its index.json}]}
"""

from __future__ import annotations

import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import xxhash

from diffrep.errors import StoreError

# Goes up when a change makes the same request give other numbers; old stores then refuse to be extended.
NUMERICS = 1
# Of the files, not of the numbers in them.
FORMAT = 2
META, INDEX, SKIPPED = "meta.json", "index.json", "skipped.jsonl"
UNITS, CLAIMS = "units", "claims"
PER_FOLDER = 1000
# More are a mistake, or a store that was made to fill the memory of whoever opens it.
MOST_UNITS = 10**9
CHECKSUM = "xxh3-128:"
# In place of a number of samples: each input shard is a unit.
SHARD = "shard"


@dataclass(frozen=True)
class Unit:
    """A range of samples.

    Attributes:
        number: Position among all units.
        split: Split of all its samples.
        rows: Places in the data set.
    """

    number: int
    split: str
    rows: range


class Units(Sequence[Unit]):
    """The units of splits, in order; each is made when it is asked for, so that a million cost nothing.

    Args:
        splits: The range of each split.
        unit_size: Samples of a unit; the last one of a split may have fewer.
    """

    def __init__(self, splits: dict[str, range], unit_size: int):
        self.splits = {split: rows for split, rows in splits.items() if len(rows)}
        self.unit_size = unit_size
        self._names = list(self.splits)
        self._starts = [0]
        for rows in self.splits.values():
            self._starts.append(self._starts[-1] - -len(rows) // unit_size)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, number: int) -> Unit: ...

    @overload
    def __getitem__(self, number: slice) -> list[Unit]: ...

    def __getitem__(self, number: int | slice) -> Unit | list[Unit]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        split = self.split_of(number)
        rows = self.splits[split]
        start = rows.start + (number - self._starts[self._names.index(split)]) * self.unit_size
        return Unit(number, split, range(start, min(start + self.unit_size, rows.stop)))

    def split_of(self, number: int) -> str:
        """Returns the split of a unit; none is made."""
        return self._names[bisect_right(self._starts, number) - 1]

    def numbers_of(self, split: str) -> range:
        """Returns the numbers of the units of a split that has any."""
        place = self._names.index(split)
        return range(self._starts[place], self._starts[place + 1])

    @property
    def folders(self) -> int:
        """Number of folders that hold them."""
        return -(-len(self) // PER_FOLDER)

    def in_folder(self, folder: int) -> range:
        """Returns the numbers of the units of a folder."""
        return range(folder * PER_FOLDER, min((folder + 1) * PER_FOLDER, len(self)))


def list_units(splits: dict[str, range], unit_size: int) -> Units:
    """Cuts each split into units."""
    return Units(splits, unit_size)


def units_of(meta: dict[str, Any]) -> Units:
    """Returns the units that a store's meta.json tells of.

    Raises:
        StoreError: It tells none.
    """
    try:
        size = 1 if meta["unit_size"] == SHARD else meta["unit_size"]
        splits = {name: range(*bounds) for name, bounds in meta["splits"].items()}
        if not (type(size) is int and size > 0 and all(rows.start >= 0 for rows in splits.values())):
            raise ValueError
        units = Units(splits, size)
        if len(units) > MOST_UNITS:
            raise ValueError
        return units
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        given = {key: meta.get(key) for key in ("splits", "unit_size")} if isinstance(meta, dict) else meta
        raise StoreError(
            f"meta.json needs splits such as {{'train': [0, 50000]}} and a unit_size of 1 or more, or {SHARD!r}; "
            f"it has {given}"
        ) from None


def folder_name(folder: int) -> str:
    """Returns the name of a folder of units, "units/0000"."""
    return f"{UNITS}/{folder:04d}"


def folder_index(folder: int) -> str:
    """Returns the name of the index of a folder of units."""
    return f"{folder_name(folder)}/{INDEX}"


def tensor_name(number: int) -> str:
    """Returns the name of a unit's tensors, "units/0000/0000123.safetensors"."""
    return f"{folder_name(number // PER_FOLDER)}/{number:07d}.safetensors"


def info_name(number: int) -> str:
    """Returns the name of a unit's JSON; the unit exists when this file does."""
    return f"{folder_name(number // PER_FOLDER)}/{number:07d}.json"


def claim_name(number: int) -> str:
    """Returns the name of the claim of a unit, "claims/0000123"."""
    return f"{CLAIMS}/{number:07d}"


def tensor_file(store: Path, number: int) -> Path:
    """Returns the path of a unit's tensors in a local store."""
    return store / tensor_name(number)


def info_file(store: Path, number: int) -> Path:
    """Returns the path of a unit's JSON in a local store."""
    return store / info_name(number)


def checksum(content: bytes) -> str:
    """Returns what is noted of a file to find damage: its XXH3 of 128 bits; it does not tell forgeries."""
    return CHECKSUM + xxhash.xxh3_128_hexdigest(content)


def ids_checksum(ids: list[str], skipped: list[dict[str, str]]) -> str:
    """Returns what the header of a unit's tensors holds of the names in its JSON, so that these go together."""
    return names_checksum(json.dumps(ids), json.dumps(skipped))


def names_checksum(ids: str, skipped: str) -> str:
    """Returns the same for what is JSON already."""
    return checksum(f"[{ids}, {skipped}]".encode())


def to_json(value: Any) -> bytes:
    """Returns JSON as it stands in the files."""
    return (json.dumps(value, indent=1) + "\n").encode()


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that is seen whole or not at all.

    It has a temporary name until the block ends; then come fsync, rename and fsync of the folder.

    Raises:
        StoreError: The file cannot be written; nothing of it stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; finished units stay, run again to go on"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is seen whole or not at all; see `open_whole`."""
    with open_whole(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_whole(path, to_json(value))


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Tells in what a folder's stored settings differ from those of now: "KEY: OLD there, NEW now", by key.

    A key that is missing counts as None.
    """
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return [f"{key}: {before.get(key)} there, {now.get(key)} now" for key in differ]
