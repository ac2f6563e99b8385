"""The files of a store's units, opened as they are needed."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from diffrep.errors import StoreError
from diffrep.store.header import damaged
from diffrep.store.layout import META, Units, ids_checksum, tensor_name
from diffrep.store.place import Place
from diffrep.store.table import UnitTable, read_info, several
from diffrep.store.tensors import MemoryUnit, Rows, UnitFile, open_unit, plain_type

# Files that are mapped at once, for each of the last tensors that were read: Linux allows some 65,000.
OPEN = 1024
LAST = 8
# Ids that are kept, about: some 80 MB.
IDS = 1_000_000
# Behind all that can be mapped, and small enough for a row's place to be added.
ABSENT = 2**62


@dataclass(frozen=True)
class _Ready:
    """Units whose rows of one tensor can be copied.

    Attributes:
        rows: The rows.
        units: Which ones (m,) int64.
        begins: Where the store's first sample would lie if the rows of each unit went on before it, (n + 1,) int64;
            ABSENT for units that are not mapped, and behind the last.
    """

    rows: Rows
    units: np.ndarray
    begins: np.ndarray


class UnitFiles:
    """Tensors and ids of those units of a store that have samples. A unit is named by its place among these.

    Args:
        place: Where the store is.
        units: All units of the store.
        table: Those with samples.
        shapes: Shape of a sample's features, by the name of the tensor.

    Attributes:
        table: As given.
        starts: Position in the store of each unit's first sample (n,) int64.
        ends: Position after its last one (n,) int64.
    """

    def __init__(self, place: Place, units: Units, table: UnitTable, shapes: dict[str, tuple[int, ...]]):
        self.table = table
        self.ends = np.cumsum(table.samples)
        self.starts = self.ends - table.samples
        self._place, self._units, self._shapes = place, units, shapes
        self._local = place.file(META) is not None
        self._kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._begin()

    def _begin(self) -> None:
        self.open = lru_cache(OPEN)(self._open)
        self.ids = lru_cache(max(1, IDS * len(self) // int(self.ends[-1])))(self.read_ids)
        self._ready: dict[str, _Ready] = {}
        self._lock = threading.Lock()

    def between(self, numbers: range) -> range:
        """Returns the units whose numbers in the store are in a range."""
        return range(*np.searchsorted(self.table.numbers, [numbers.start, numbers.stop]).tolist())

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the unit of a sample and its place in there.

        Raises:
            IndexError: The store has no such sample.
        """
        if not 0 <= index < self.ends[-1]:
            raise IndexError(f"sample {index} of {self.ends[-1]}")
        unit = int(np.searchsorted(self.ends, index, side="right"))
        return unit, index - int(self.starts[unit])

    def row(self, name: str, unit: int, place: int) -> torch.Tensor:
        """Returns one row (...) of a tensor."""
        file = self.open(unit)
        return file.tensor(name)[place] if isinstance(file, MemoryUnit) else file.rows(name, np.array([place]))[0]

    def label(self, unit: int, place: int) -> int | torch.Tensor:
        """Returns a sample's label, or labels (L,) int64."""
        label = self.row("label", unit, place)
        return label if label.ndim else int(label)

    def read_ids(self, unit: int) -> list[str]:
        """Reads the ids of a unit's samples.

        Raises:
            StoreError: Its JSON is missing, damaged, or not the one that the index tells of.
        """
        number, table = int(self.table.numbers[unit]), self.table
        info = read_info(self._place, number, self._units)
        told = (table.samples[unit], table.bytes[unit], table.checksum(unit))
        names = ids_checksum(info.ids, info.skipped)
        if (info.samples, info.bytes, info.checksum) != told or names != self.open(unit).metadata.get("ids"):
            raise StoreError(
                f"the JSON of unit {number} in {self._place.target} is not the one that belongs to its tensors; run "
                "'diffrep store repair'"
            )
        return info.ids

    def ids_of(self, rows: np.ndarray) -> list[str]:
        """Returns the ids of samples at positions (n,) int64; each unit is read once.

        Raises:
            IndexError: A position is not in the store.
            StoreError: As `read_ids`.
        """
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.ends[-1]):
            raise IndexError(f"samples {rows.min()} to {rows.max()} of {self.ends[-1]}")
        units = np.searchsorted(self.ends, rows, "right")
        wanted, of = np.unique(units, return_inverse=True)
        lists = list(several(self._place, self.ids, wanted.tolist()))
        places = rows - self.starts[units]
        return [lists[unit][place] for unit, place in zip(of.tolist(), places.tolist(), strict=True)]

    def whole(self, name: str, units: range) -> torch.Tensor:
        """Returns all rows (N, ...) of a tensor in units that follow each other.

        Raises:
            StoreError: A file is missing or damaged, or the tensor does not fit into memory.
        """
        slot = self.open(units[0]).slot(name)
        begin, end = int(self.starts[units[0]]), int(self.ends[units[-1]])
        shape = (end - begin, *slot.shape[1:])
        try:
            # numpy asks for huge pages, which are several times quicker to fill.
            found = torch.from_numpy(np.empty(shape, plain_type(slot.dtype))).view(slot.dtype)
        except (MemoryError, ValueError) as error:
            raise StoreError(
                f"{name} of {end - begin:,} samples of {self._place.target} does not fit into memory; use take or "
                "batches"
            ) from error
        tensors = several(self._place, lambda unit: self.open(unit).tensor(name), units)
        for unit, tensor in zip(units, tensors, strict=True):
            found[self.starts[unit] - begin : self.ends[unit] - begin] = tensor
        return found

    def take(self, name: str, rows: np.ndarray) -> torch.Tensor:
        """Returns the rows (n, ...) of a tensor at positions (n,) int64 in the store.

        Raises:
            IndexError: A position is not in the store.
            StoreError: A file is missing or damaged.
        """
        if not len(rows):
            slot = self.open(0).slot(name)
            return torch.empty(0, *slot.shape[1:], dtype=slot.dtype)
        if rows.min() < 0:
            raise IndexError(f"sample {rows.min()} of {self.ends[-1]}")
        units = self.ends.searchsorted(rows, "right")
        ready = self._ready.get(name)
        if ready is not None:
            # A unit that is not mapped yet, or a sample that does not exist.
            with suppress(IndexError):
                return ready.rows.copy(ready.begins[units] + rows * ready.rows.width)
        if rows.max() >= self.ends[-1]:
            raise IndexError(f"sample {rows.max()} of {self.ends[-1]}")
        wanted = np.unique(units)
        if not self._local or len(wanted) > OPEN:
            return self._take_apart(name, units, rows - self.starts[units], OPEN if self._local else 1)
        ready = self._prepare(name, ready, wanted)
        return ready.rows.copy(ready.begins[units] + rows * ready.rows.width)

    def _prepare(self, name: str, ready: _Ready | None, wanted: np.ndarray) -> _Ready:
        """Maps the wanted units, beside those that are while these are few."""
        units = wanted if ready is None else np.union1d(ready.units, wanted)
        units = units if len(units) <= OPEN else wanted
        rows = Rows([self.open(unit) for unit in units.tolist()], name)
        begins = np.full(len(self) + 1, ABSENT)
        begins[units] = rows.begins - self.starts[units] * rows.width
        with self._lock:
            if name not in self._ready and len(self._ready) >= LAST:
                self._ready.pop(next(iter(self._ready)))
            self._ready[name] = found = _Ready(rows, units, begins)
        return found

    def held(self, names: list[str], units: list[int]) -> list[MemoryUnit]:
        """Returns units with some of their tensors mapped, or in memory."""
        return list(several(self._place, lambda unit: self.open(unit).held(names), units))

    def _take_apart(self, name: str, units: np.ndarray, at: np.ndarray, size: int) -> torch.Tensor:
        """Takes from `size` units at a time: of more than may be mapped, or of remote ones, each of which is asked."""
        wanted, of = np.unique(units, return_inverse=True)
        order = np.argsort(of, kind="stable")
        begins = np.searchsorted(of[order], np.arange(0, len(wanted), size))
        groups = zip(range(0, len(wanted), size), np.split(order, begins[1:]), strict=True)

        def read(group: tuple[int, np.ndarray]) -> torch.Tensor:
            first, mine = group
            if self._local:
                some = wanted[first : first + size].tolist()
                return Rows([self.open(unit) for unit in some], name)(of[mine] - first, at[mine])
            return self.open(int(wanted[first])).rows(name, at[mine])

        parts = torch.cat(list(several(self._place, read, groups)))
        found = torch.empty_like(parts)
        found[torch.from_numpy(order)] = parts
        return found

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay in the process that opened them; data-loader workers open their own.
        return {key: value for key, value in self.__dict__.items() if key not in ("open", "ids", "_ready", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _open(self, unit: int) -> UnitFile:
        table = self.table
        file = open_unit(self._place, tensor_name(int(table.numbers[unit])), int(table.bytes[unit]))
        file.check(int(table.samples[unit]), self._shapes)
        for name, slot in file.slots.items():
            kind = slot.dtype, slot.shape[1:]
            if self._kinds.setdefault(name, kind) != kind:
                raise damaged(file.where, f"{name} has rows of {kind}, and in other units of {self._kinds[name]}")
        return file
