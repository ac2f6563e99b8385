"""The tensors of one unit: mapped from a local file, or read from a remote one by byte ranges."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch

from diffrep.errors import StoreError
from diffrep.store.header import Header, Slot, damaged, read_header
from diffrep.store.inside import check_inside
from diffrep.store.place import Place

# Bytes of a remote file that are read at once, where header and small tensors often end.
HEAD = 32_768
# Wanted rows of a remote tensor that lie closer, in bytes, are read together with what is between them.
GAP = 262_144
# Bytes that numpy lets an array have.
LARGEST = 2**62


def plain_type(dtype: torch.dtype) -> np.dtype:
    """Returns the numpy type of the same size: its own, or an integer for those that numpy lacks."""
    if dtype.is_floating_point and dtype not in (torch.float16, torch.float32, torch.float64):
        return np.dtype(f"i{dtype.itemsize}")
    return np.dtype(str(dtype).removeprefix("torch."))


def open_unit(place: Place, name: str, size: int) -> UnitFile:
    """Opens the tensors of a unit.

    Args:
        place: The store's.
        name: The file in it.
        size: Bytes it must have.

    Raises:
        StoreError: It is missing, has another size, leads out of the store, or its header is damaged.
    """
    path = check_inside(place, name)
    return RemoteUnit(place, name, size) if path is None else map_unit(path, size)


def load_unit(place: Place, name: str, size: int) -> MemoryUnit:
    """Opens a unit as `open_unit` does, and reads all of it where it cannot be mapped."""
    path = check_inside(place, name)
    if path is not None:
        return map_unit(path, size)
    content, where = bytearray(place.read(name)), place.where(name)
    if len(content) != size or not size:
        raise damaged(where, f"it has {len(content)} bytes in place of {size}")
    header = read_header(lambda start, stop: bytes(content[start:stop]), size, where)
    return MemoryUnit(where, torch.frombuffer(content, dtype=torch.uint8), header)


class UnitFile(ABC):
    """The tensors of a unit.

    Args:
        where: Path or URL.
        header: Of the file.

    Attributes:
        where: As given.
        slots: Element type, shape and bytes of each tensor, by name.
        metadata: Strings of the header.
    """

    def __init__(self, where: str, header: Header):
        self.where, (self.slots, self.metadata) = where, header

    def slot(self, name: str) -> Slot:
        """Returns where a tensor lies.

        Raises:
            StoreError: The unit has no such tensor.
        """
        if name not in self.slots:
            raise damaged(self.where, f"it has no tensor {name}, but {', '.join(self.slots) or 'none'}")
        return self.slots[name]

    def check(self, samples: int, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises where the tensors are not those of a unit.

        Args:
            samples: Number of its samples.
            shapes: Shape of a sample's features, by the name of the tensor.

        Raises:
            StoreError: One has another number of rows or another shape, or `row` or `label` is none.
        """
        for name, slot in self.slots.items():
            wanted = shapes.get(name)
            if slot.shape[:1] != (samples,) or wanted not in (None, slot.shape[1:]):
                told = "..." if wanted is None else ", ".join(map(str, wanted))
                raise damaged(self.where, f"{name} has the shape {slot.shape} in place of ({samples}, {told})")
            axes = {"row": (1,), "label": (1, 2)}.get(name)
            if axes and (slot.dtype != torch.int64 or len(slot.shape) not in axes):
                raise damaged(self.where, f"{name} is {slot.dtype} of shape {slot.shape}, no list of numbers")

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor (n, ...)."""

    @abstractmethod
    def rows(self, name: str, at: np.ndarray) -> torch.Tensor:
        """Returns the rows `at` (m,) int64 of a tensor, (m, ...), in that order."""

    @abstractmethod
    def held(self, names: list[str]) -> MemoryUnit:
        """Returns the unit with some of its tensors in memory."""


class MemoryUnit(UnitFile):
    """A unit in memory, or mapped: what is written into its tensors then does not reach the file.

    Args:
        where: Path or URL.
        memory: The bytes (size,) uint8.
        header: Of the file.
    """

    def __init__(self, where: str, memory: torch.Tensor, header: Header):
        super().__init__(where, header)
        self.memory, self.address = memory.numpy(), memory.data_ptr()
        self._memory = memory
        self._tensors: dict[str, torch.Tensor] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor (n, ...), which shares this memory."""
        if name not in self._tensors:
            slot = self.slot(name)
            content = self._memory[slot.start : slot.stop]
            if slot.start % slot.dtype.itemsize:
                content = content.clone()
            self._tensors[name] = content.view(slot.dtype).view(slot.shape)
        return self._tensors[name]

    def rows(self, name: str, at: np.ndarray) -> torch.Tensor:
        """Returns the rows `at` (m,) int64 of a tensor, (m, ...), copied."""
        return Rows([self], name)(np.zeros(len(at), np.int64), at)

    def held(self, names: list[str]) -> MemoryUnit:
        """Returns itself."""
        return self


def map_unit(path: Path, size: int) -> MemoryUnit:
    """Maps a local file of `size` bytes; see `open_unit`."""
    where = str(path)
    try:
        found = os.stat(path).st_size
        if found != size or not size:
            raise damaged(where, f"it has {found} bytes in place of {size}")
        memory = torch.from_file(where, shared=False, size=size, dtype=torch.uint8)
    except FileNotFoundError as error:
        raise StoreError(f"{where} is missing; extract again") from error
    except (OSError, RuntimeError) as error:
        raise damaged(where, getattr(error, "strerror", None) or str(error)) from error
    content = memory.numpy()
    return MemoryUnit(where, memory, read_header(lambda start, stop: content[start:stop].tobytes(), size, where))


class RemoteUnit(UnitFile):
    """A file somewhere else, of which each reading is a request."""

    def __init__(self, place: Place, name: str, size: int):
        self.where, self._place, self._name = place.where(name), place, name
        head = self._read(0, min(size, HEAD))

        def read(start: int, stop: int) -> bytes:
            return bytes(head[start:stop] if stop <= len(head) else self._read(start, stop))

        super().__init__(self.where, read_header(read, size, self.where))

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor (n, ...)."""
        return self.held([name]).tensor(name)

    def rows(self, name: str, at: np.ndarray) -> torch.Tensor:
        """Returns the rows `at` (m,) int64 of a tensor, (m, ...); those that lie together are one request."""
        slot = self.slot(name)
        wanted, places = np.unique(at, return_inverse=True)
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) * slot.width > GAP) + 1)
        parts = [self._part(slot, run) for run in runs if len(run)]
        found = torch.cat(parts) if parts else torch.empty(0, *slot.shape[1:], dtype=slot.dtype)
        return found[torch.from_numpy(places)]

    def held(self, names: list[str]) -> MemoryUnit:
        """Returns the unit with some of its tensors, read now."""
        content, slots = bytearray(), {}
        for name in names:
            slot = self.slot(name)
            slots[name] = slot._replace(start=len(content), stop=len(content) + slot.stop - slot.start)
            content += self._read(slot.start, slot.stop)
        memory = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        return MemoryUnit(self.where, memory, Header(slots, self.metadata))

    def _part(self, slot: Slot, run: np.ndarray) -> torch.Tensor:
        first, count = int(run[0]), int(run[-1] - run[0]) + 1
        start = slot.start + first * slot.width
        content = self._read(start, start + count * slot.width)
        if not content:
            return torch.empty(len(run), *slot.shape[1:], dtype=slot.dtype)
        return torch.frombuffer(content, dtype=slot.dtype).view(count, *slot.shape[1:])[torch.from_numpy(run - first)]

    def _read(self, start: int, stop: int) -> bytearray:
        content = bytearray(self._place.read(self._name, start, stop))
        if len(content) != stop - start:
            raise damaged(self.where, f"it ends before byte {stop}")
        return content


class Rows:
    """Copies rows of one tensor, of one element type and row shape, out of several units that are in memory.

    A row is named by its place in bytes behind the first row of the unit that lies lowest in memory.

    Args:
        units: The units.
        name: The tensor.

    Attributes:
        begins: Places of the units' first rows (n,) int64.
        width: Bytes of a row.

    Raises:
        StoreError: A unit has no such tensor.
    """

    def __init__(self, units: list[MemoryUnit], name: str):
        slots = [unit.slot(name) for unit in units]
        self._dtype, self._shape, self.width = slots[0].dtype, slots[0].shape[1:], slots[0].width
        self._plain = plain_type(self._dtype)
        # Also keeps the memory.
        self._tensors = [unit.memory[slot.start : slot.stop] for unit, slot in zip(units, slots, strict=True)]
        addresses = np.array([unit.address + slot.start for unit, slot in zip(units, slots, strict=True)])
        lowest = int(addresses.argmin())
        self.begins = addresses - addresses[lowest]
        self._span = int(self.begins.max()) + max(slot.stop - slot.start for slot in slots) - self.width + 1
        self._every = None
        if self.width and self._span * self.width < LARGEST:
            # One indexing over all units, where one a unit would cost more than the copying: an array that begins at
            # the lowest and has an element of a row's size at every byte, read only where a row is.
            one = np.ndarray((1,), np.dtype((np.void, self.width)), self._tensors[lowest].data)
            self._every = np.lib.stride_tricks.as_strided(one, (self._span,), (1,))

    def __call__(self, of: np.ndarray, at: np.ndarray) -> torch.Tensor:
        """Returns rows (m, ...).

        Args:
            of: Which of the units each is from (m,) int64.
            at: Its place among the unit's rows (m,) int64; that it exists is not checked.
        """
        return self.copy(self.begins[of] + at * self.width)

    def copy(self, places: np.ndarray) -> torch.Tensor:
        """Returns rows (m, ...).

        Args:
            places: Where they begin (m,) int64, 0 or more; that a row is there is not checked.

        Raises:
            IndexError: A place is behind the last row.
        """
        shape = (len(places), *self._shape)
        if not self.width or not len(places):
            return torch.empty(shape, dtype=self._dtype)
        content = self._loop(places) if self._every is None else self._every[places]
        found = torch.from_numpy(content.view(self._plain).reshape(shape))
        return found if found.dtype == self._dtype else found.view(self._dtype)

    def _loop(self, places: np.ndarray) -> np.ndarray:
        if places.max() >= self._span:
            raise IndexError(f"row at {places.max()} of {self._span}")
        order = np.argsort(self.begins)
        of = order[np.searchsorted(self.begins[order], places, "right") - 1]
        content = np.empty((len(places), self.width), np.uint8)
        for row, (unit, start) in enumerate(zip(of.tolist(), (places - self.begins[of]).tolist(), strict=True)):
            content[row] = self._tensors[unit][start : start + self.width]
        return content
