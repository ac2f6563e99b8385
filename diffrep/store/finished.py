"""Which units of a store are finished, as far as one process has looked."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffrep.store.layout import INDEX, PER_FOLDER, UNITS, Units, folder_index, folder_name
from diffrep.store.place import Place

# Requests that are on their way at once to a place that is not on this machine.
REQUESTS = 16


class Finished:
    """One bit a unit: a million take 125 kB.

    Args:
        place: The store.
        units: Its units; none counts as finished before somebody has looked.
    """

    def __init__(self, place: Place, units: Units):
        self.place, self.units = place, units
        self._bits = np.zeros((units.folders, PER_FOLDER // 8), dtype=np.uint8)
        if len(units) % PER_FOLDER:
            self._bits[-1] = np.packbits(np.arange(PER_FOLDER) >= len(units) % PER_FOLDER)

    @property
    def count(self) -> int:
        """Number of finished units."""
        return len(self.units) - int(np.count_nonzero(np.unpackbits(self._bits) == 0))

    @property
    def all(self) -> bool:
        """Whether all units are finished."""
        return bool((self._bits == 255).all())

    def open_folders(self) -> np.ndarray:
        """Returns the folders in which units are missing, int64."""
        return np.flatnonzero((self._bits != 255).any(axis=1))

    def missing(self, folder: int | None = None) -> np.ndarray:
        """Returns the missing units of a folder, or of all, int64."""
        if folder is None:
            return np.flatnonzero(np.unpackbits(self._bits) == 0)
        return folder * PER_FOLDER + np.flatnonzero(np.unpackbits(self._bits[folder]) == 0)

    def next_missing(self, start: int) -> int | None:
        """Returns the first missing unit from `start` on."""
        if start >= len(self.units):
            return None
        folder = start // PER_FOLDER
        near = self.missing(folder)
        near = near[near >= start]
        if len(near):
            return int(near[0])
        behind = self.open_folders()
        behind = behind[behind > folder]
        return int(self.missing(int(behind[0]))[0]) if len(behind) else None

    def mark(self, number: int) -> None:
        """Takes note that a unit is finished."""
        folder, place = divmod(number, PER_FOLDER)
        self._bits[folder, place // 8] |= 128 >> place % 8

    def look(self) -> None:
        """Looks into all folders that are there and not known to be complete.

        Raises:
            StoreError: The place cannot be read.
        """
        if self.place.size(INDEX) is not None:
            self._bits[:] = 255
            return
        there = {int(name) for name in self.place.folders(UNITS) if name.isascii() and name.isdigit()}
        self.look_into([folder for folder in self.open_folders().tolist() if folder in there])

    def look_into(self, folders: Iterable[int]) -> None:
        """Looks into some folders; those with an index are complete, and are not listed.

        Raises:
            StoreError: The place cannot be read.
        """
        if self.place.file(UNITS) is not None:
            for folder in folders:
                self._look(folder)
        else:
            with ThreadPoolExecutor(REQUESTS) as threads:
                list(threads.map(self._look, folders))

    def _look(self, folder: int) -> None:
        if self.place.size(folder_index(folder)) is not None:
            self._bits[folder] = 255
            return
        for number in pick_finished(self.place.list(folder_name(folder)), self.missing(folder).tolist()):
            self.mark(number)


def pick_finished(files: Iterable[str], numbers: Iterable[int]) -> list[int]:
    """Returns those units of which both files are among a folder's."""
    names = set(files)
    return [n for n in numbers if f"{n:07d}.json" in names and f"{n:07d}.safetensors" in names]
