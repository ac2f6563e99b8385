"""The indexes of a store's folders: written when a folder has all its units, so that nobody need list it again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from diffrep.store.finished import REQUESTS, pick_finished
from diffrep.store.index import parse_folder, read_folder, read_unit
from diffrep.store.layout import INDEX, PER_FOLDER, Units, checksum, folder_index, folder_name
from diffrep.store.place import Place, is_temporary

# Of the units that a folder lacks, one in this many is written between two looks at it.
PART = 16
# Samples, bytes, checksum and skipped samples of a unit.
Row = tuple[int, int, str, int]


@dataclass
class _Folder:
    """What one process knows of a folder: the units that it wrote, and how many were missing when it last looked."""

    rows: dict[int, Row] = field(default_factory=dict)
    missing: int | None = None
    since: int = 0


class Folders:
    """Writes the folder indexes of a store.

    Args:
        place: The store.
        units: Its units.
    """

    def __init__(self, place: Place, units: Units):
        self.place, self.units = place, units
        self._known: dict[int, _Folder] = {}

    def wrote(self, number: int, samples: int, size: int, checksum: str, skipped: int) -> None:
        """Takes note of a unit that this process wrote."""
        folder = self._known.setdefault(number // PER_FOLDER, _Folder())
        folder.rows[number] = (samples, size, checksum, skipped)
        folder.since += 1

    def close(self, number: int) -> bool:
        """Writes the index of a folder if all its units are there, and tells whether it did.

        It looks when this process has written a part of what was missing at the last look: others may have written the
        rest, and a look after each unit would list a thousand times.

        Raises:
            StoreError: The place cannot be read or written.
        """
        folder = self._known.setdefault(number, _Folder())
        if folder.missing is not None and folder.since < folder.missing // PART:
            return False
        numbers = self.units.in_folder(number)
        there = pick_finished(self.place.list(folder_name(number)), numbers)
        folder.missing, folder.since = len(numbers) - len(there), 0
        if folder.missing:
            return False
        self._write(number)
        return True

    def finish(self) -> tuple[list[dict[str, Any]], int]:
        """Closes all folders and removes temporary files from them.

        Returns:
            What the store's index says of each folder, with the number of skipped samples; and how many units are
            missing, which are in no index then.

        Raises:
            StoreError: The place cannot be read or written.
        """
        numbers = range(self.units.folders)
        if self.place.file(folder_name(0)) is None:
            with ThreadPoolExecutor(REQUESTS) as threads:
                found = list(threads.map(self._finish, numbers))
        else:
            found = [self._finish(number) for number in numbers]
        return [entry for entry, _ in found if entry], sum(missing for _, missing in found)

    def with_skipped(self, number: int) -> list[int]:
        """Returns the units of a closed folder that skipped samples."""
        index = read_folder(self.place, number, self.units)
        return [unit for unit, skipped in zip(index.units, index.skipped, strict=True) if skipped]

    def _finish(self, number: int) -> tuple[dict[str, Any] | None, int]:
        files, folder, numbers = (
            self.place.list(folder_name(number)),
            folder_name(number),
            self.units.in_folder(number),
        )
        missing = len(numbers) - len(pick_finished(files, numbers))
        if missing:
            return None, missing
        for name in filter(is_temporary, files):
            self.place.remove(f"{folder}/{name}")
        content = self.place.read(folder_index(number)) if INDEX in files else self._write(number)
        index = parse_folder(content, self.place.where(folder_index(number)), number, self.units)
        entry = {
            "folder": number,
            "units": len(index.units),
            "samples": int(index.samples.sum()),
            "bytes": int(index.bytes.sum()),
            "checksum": checksum(content),
            "skipped": int(index.skipped.sum()),
        }
        return entry, 0

    def _write(self, number: int) -> bytes:
        numbers = self.units.in_folder(number)
        known = self._known.pop(number, _Folder()).rows
        known |= self._read([unit for unit in numbers if unit not in known])
        samples, sizes, checksums, skipped = (
            list(column) for column in zip(*(known[unit] for unit in numbers), strict=True)
        )
        value = {
            "units": [numbers.start, numbers.stop],
            "split": [self.units.split_of(unit) for unit in numbers],
            "samples": samples,
            "bytes": sizes,
            "checksum": checksums,
            "skipped": skipped,
        }
        content = (json.dumps(value) + "\n").encode()
        self.place.write(folder_index(number), [content])
        return content

    def _read(self, numbers: Iterable[int]) -> dict[int, Row]:
        def row(number: int) -> tuple[int, Row]:
            info = read_unit(self.place, number, self.units)
            return number, (info.samples, info.bytes, info.checksum, len(info.skipped))

        if self.place.file(folder_name(0)) is not None:
            return dict(map(row, numbers))
        with ThreadPoolExecutor(REQUESTS) as threads:
            return dict(threads.map(row, numbers))
