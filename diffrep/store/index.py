"""Reading what a store says of its units; the files may come from anybody, so each value is checked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffrep.errors import StoreError
from diffrep.store.layout import FORMAT, INDEX, PER_FOLDER, Units, folder_index, info_name
from diffrep.store.place import Place

CHECKSUMS = re.compile(r"xxh3-128:[0-9a-f]{32}")
MOST_BYTES = 2**62


@dataclass(frozen=True)
class UnitInfo:
    """A unit's JSON.

    Attributes:
        unit: Number.
        split: Split.
        samples: Number of samples.
        bytes: Size of the tensors' file.
        checksum: Of that file.
        skipped: Samples that could not be read, dicts of "id" and "reason".
        ids: Sample ids.
    """

    unit: int
    split: str
    samples: int
    bytes: int
    checksum: str
    skipped: list[dict[str, str]]
    ids: list[str]


@dataclass(frozen=True)
class FolderIndex:
    """The index of a folder that has all its units.

    Attributes:
        units: Their numbers.
        split: Their splits.
        samples: Numbers of samples (n,) int64.
        bytes: Sizes of the tensors' files (n,) int64.
        checksum: Of those files.
        skipped: Numbers of samples that could not be read (n,) int64.
    """

    units: range
    split: list[str]
    samples: np.ndarray
    bytes: np.ndarray
    checksum: list[str]
    skipped: np.ndarray


def parse(content: bytes, where: str) -> Any:
    """Returns what stands in JSON.

    Raises:
        StoreError: It is damaged; `where` names the file.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"cannot read {where}: {error}") from error


def parse_unit(content: bytes, where: str, number: int, units: Units | None = None) -> UnitInfo:
    """Returns what a unit's JSON says.

    Args:
        content: The file.
        where: Its name, for messages.
        number: The unit.
        units: The store's units, to compare the split and the number of samples with.

    Raises:
        StoreError: It is damaged, or tells of another unit.
    """
    value = parse(content, where)
    _expect(isinstance(value, dict), where, "an object")
    _expect(value.get("unit") == number and type(value["unit"]) is int, where, f"unit {number}")
    ids, skipped = value.get("ids"), value.get("skipped")
    _expect(isinstance(ids, list) and all(isinstance(one, str) for one in ids), where, "ids, a list of strings")
    _expect(_count(value.get("samples")) and value["samples"] == len(ids), where, "samples, the number of ids")
    _expect(_count(value.get("bytes")), where, "bytes, the size of the tensors' file")
    _expect(_is_checksum(value.get("checksum")), where, "checksum, 'xxh3-128:' and 32 hex digits")
    _expect(isinstance(value.get("split"), str), where, "split, a string")
    _expect(
        isinstance(skipped, list)
        and all(isinstance(one, dict) and all(isinstance(part, str) for part in one.values()) for one in skipped),
        where,
        "skipped, a list of objects of strings",
    )
    if units is not None:
        _expect(value["split"] == units.split_of(number), where, f"the split {units.split_of(number)!r}")
    return UnitInfo(number, value["split"], value["samples"], value["bytes"], value["checksum"], skipped, ids)


def parse_folder(content: bytes, where: str, folder: int, units: Units) -> FolderIndex:
    """Returns what the index of a folder says.

    Args:
        content: The file.
        where: Its name, for messages.
        folder: Number of the folder.
        units: The store's units.

    Raises:
        StoreError: It is damaged, or does not fit the store's units.
    """
    value, numbers = parse(content, where), units.in_folder(folder)
    _expect(isinstance(value, dict), where, "an object")
    bounds = [numbers.start, numbers.stop]
    _expect(value.get("units") == bounds, where, f"units {bounds}")
    for key in ("split", "samples", "bytes", "checksum", "skipped"):
        _expect(isinstance(value.get(key), list) and len(value[key]) == len(numbers), where, f"{key} of each unit")
    for key in ("samples", "bytes", "skipped"):
        _expect(all(map(_count, value[key])), where, f"{key}, numbers of 0 or more")
    _expect(all(map(_is_checksum, value["checksum"])), where, "checksums, 'xxh3-128:' and 32 hex digits")
    splits = [units.split_of(number) for number in numbers]
    _expect(value["split"] == splits, where, "the splits of meta.json")
    samples, sizes, skipped = (np.array(value[key], dtype=np.int64) for key in ("samples", "bytes", "skipped"))
    return FolderIndex(numbers, splits, samples, sizes, value["checksum"], skipped)


def parse_index(content: bytes, where: str, units: Units) -> dict[str, Any]:
    """Returns the store's index.json.

    Args:
        content: The file.
        where: Its name, for messages.
        units: The store's units.

    Raises:
        StoreError: It is damaged, of another format, or does not fit the store's units.
    """
    value = parse(content, where)
    _expect(isinstance(value, dict), where, "an object")
    if value.get("format") != FORMAT:
        raise StoreError(
            f"{where} is of format {value.get('format', 1)!r}, and this version reads {FORMAT}: the store was written "
            "by another version; extract it again"
        )
    _expect(_is_checksum(value.get("meta")), where, "meta, the checksum of meta.json")
    _expect(value.get("units") == len(units), where, f"units, {len(units)}")
    for key in ("samples", "skipped", "bytes"):
        _expect(_count(value.get(key)), where, f"{key}, a number of 0 or more")
    folders = value.get("folders")
    _expect(isinstance(folders, list) and len(folders) == units.folders, where, f"{units.folders} folders")
    for number, folder in enumerate(folders):
        _expect(isinstance(folder, dict) and folder.get("folder") == number, where, f"folder {number} in its place")
        _expect(folder.get("units") == len(units.in_folder(number)), where, f"the units of folder {number}")
        _expect(_count(folder.get("samples")) and _count(folder.get("bytes")), where, f"sizes of folder {number}")
        _expect(_is_checksum(folder.get("checksum")), where, f"the checksum of folder {number}'s index")
    return value


def read_unit(place: Place, number: int, units: Units | None = None) -> UnitInfo:
    """Reads a unit's JSON; see `parse_unit`."""
    name = info_name(number)
    return parse_unit(place.read(name), place.where(name), number, units)


def read_folder(place: Place, folder: int, units: Units) -> FolderIndex:
    """Reads the index of a folder; see `parse_folder`."""
    name = folder_index(folder)
    return parse_folder(place.read(name), place.where(name), folder, units)


def read_index(place: Place, units: Units) -> dict[str, Any]:
    """Reads the store's index.json; see `parse_index`."""
    return parse_index(place.read(INDEX), place.where(INDEX), units)


def number_of(file: str, folder: int, ending: str) -> int | None:
    """Returns the unit that a file of a folder belongs to; None when it is no unit's, or in the wrong folder.

    Args:
        file: Its name, such as "0000123.json".
        folder: Number of the folder.
        ending: ".json" or ".safetensors".
    """
    digits = file.removesuffix(ending)
    if digits == file or len(digits) < 7 or not (digits.isascii() and digits.isdigit()):
        return None
    number = int(digits)
    return number if number // PER_FOLDER == folder and f"{number:07d}" == digits else None


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_BYTES


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and CHECKSUMS.fullmatch(value) is not None


def _expect(condition: bool, where: str, wanted: str) -> None:
    if not condition:
        raise StoreError(f"{where} is damaged: {wanted} is wanted; 'diffrep store repair' removes what cannot be read")
