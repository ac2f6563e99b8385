"""The header of a safetensors file.

It is read here and not by the safetensors package, which opens local files only. Nothing that stands in it is trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from diffrep.errors import StoreError
from diffrep.store.packing import DTYPES as NAMES

DTYPES = {name: dtype for dtype, name in NAMES.items()}
# The limit of the format's own reader.
LONGEST_HEADER = 100_000_000


class Slot(NamedTuple):
    """Where a tensor lies in its file: bytes `start` to before `stop`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Header(NamedTuple):
    """What stands at the beginning of a file: its tensors by name, in the order of their bytes, and strings."""

    slots: dict[str, Slot]
    metadata: dict[str, str]


def read_header(read: Callable[[int, int], bytes], size: int, where: str) -> Header:
    """Reads the header of a safetensors file and checks it.

    Args:
        read: Gives the file's bytes from a position to before another.
        size: Bytes of the file.
        where: Path or URL of the file, for messages.

    Raises:
        StoreError: The header is damaged, or names bytes that are not there, overlap or belong to no tensor.
    """
    if size < 8:
        raise damaged(where, f"it ends after {size} bytes")
    length = int.from_bytes(read(0, 8), "little")
    if length > min(size - 8, LONGEST_HEADER):
        raise damaged(where, f"its header of {length} bytes is longer than the file or than {LONGEST_HEADER}")
    try:
        header = json.loads(read(8, 8 + length).decode(), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata of its header are no strings")
        slots = {name: _slot(name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:
        raise damaged(where, str(error)) from error
    slots = dict(sorted(slots.items(), key=lambda item: item[1].start))
    end = 8 + length
    for name, slot in slots.items():
        if slot.start != end:
            raise damaged(where, f"{name} begins at byte {slot.start} in place of {end}")
        end = slot.stop
    if end != size:
        raise damaged(where, f"its tensors end at byte {end} and the file at {size}")
    return Header(slots, metadata)


def damaged(where: str, reason: str) -> StoreError:
    """Returns the error of a file that cannot be read."""
    return StoreError(f"cannot read {where}: {reason}; run 'diffrep store repair', then extract again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def _slot(name: str, entry: Any, begin: int) -> Slot:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} wants dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has the element type {dtype!r}; known: {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > 8 or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has a wrong shape or wrong offsets")
    start, stop = offsets
    if math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
        raise ValueError(f"{name} of shape {tuple(shape)} and type {dtype} does not fill {stop - start} bytes")
    return Slot(DTYPES[dtype], tuple(shape), begin + start, begin + stop)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)
