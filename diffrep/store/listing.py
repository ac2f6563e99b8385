"""What a store holds, in a few lines or as a row of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from diffrep.errors import printable
from diffrep.store.claims import read_owner
from diffrep.store.finished import Finished
from diffrep.store.header import DTYPES
from diffrep.store.layout import CLAIMS, INDEX, SHARD, units_of
from diffrep.store.meta import read_levels, read_meta, read_shapes
from diffrep.store.place import is_temporary, open_place
from diffrep.store.table import read_table

SIZES = {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Listing:
    """What a store says of itself.

    Attributes:
        target: Path or URL.
        units: Number of units.
        done: How many are there.
        finished: Whether index.json is there.
        splits: Samples of each split; of an unfinished store those of the data, and None where they are in shards.
        skipped: Samples that could not be read; None of an unfinished store.
        bytes: Of the tensors' files; None of an unfinished store.
        layers: Shape of a sample's features, by layer.
        levels: Canonical keys.
        dtype: Element type; "" where meta.json does not tell.
        backbone: Its name.
        holders: Number of claims, by whom they name.
    """

    target: str
    units: int
    done: int
    finished: bool
    splits: dict[str, int | None]
    skipped: int | None
    bytes: int | None
    layers: dict[str, tuple[int, ...]]
    levels: list[str]
    dtype: str
    backbone: str
    holders: dict[str, int]

    @property
    def state(self) -> str:
        """Whether it is finished, or how far."""
        return "finished" if self.finished else f"{self.done:,} of {self.units:,} units"

    @property
    def samples(self) -> int | None:
        """Number of samples; None where nobody knows."""
        known = list(self.splits.values())
        return None if None in known else sum(known)

    def text(self) -> str:
        """Returns all of it in lines."""
        splits = ", ".join(f"{name} {_number(samples)}" for name, samples in self.splits.items())
        lines = {
            "store": self.target,
            "state": f"{self.state}, {self.units:,} units" if self.finished else self.state,
            "splits": splits + (f"; {self.skipped:,} skipped" if self.skipped else ""),
            "backbone": self.backbone or "not told",
            "dtype": self.dtype or "not told",
            "levels": ", ".join(self.levels),
            "size": _size(self.bytes),
        }
        told = [f"{name:<10}{value}" for name, value in lines.items()]
        wide = max([5, *(len(name) for name in self.layers)])
        told.append(f"{'layer':<{wide}}  {'shape':<18}{'a sample':>12}{'all levels':>14}")
        for layer, shape in self.layers.items():
            one = prod(shape) * SIZES[self.dtype] if self.dtype in SIZES else None
            every = None if one is None or self.samples is None else one * len(self.levels) * self.samples
            told.append(f"{layer:<{wide}}  {' x '.join(map(str, shape)):<18}{_size(one):>12}{_size(every):>14}")
        told += [f"{count:,} claims of {holder}" for holder, count in self.holders.items()]
        return printable("\n".join(told))


def read_listing(target: str | Path) -> Listing:
    """Reads what a store says of itself; no unit is opened.

    Raises:
        StoreError: There is no store, or an index is damaged.
    """
    place = open_place(target)
    meta = read_meta(place)
    units = units_of(meta)
    finished = place.size(INDEX) is not None
    splits: dict[str, int | None]
    skipped = size = None
    if finished:
        table, done = read_table(place, units), len(units)
        totals = np.concatenate([[0], np.cumsum(table.samples)])
        numbers = {split: units.numbers_of(split) for split in units.splits}
        splits = {split: int(totals[mine.stop] - totals[mine.start]) for split, mine in numbers.items()}
        skipped, size = int(table.skipped.sum()), int(table.bytes.sum())
    else:
        looked = Finished(place, units)
        looked.look()
        done = looked.count
        splits = {name: None if meta["unit_size"] == SHARD else len(rows) for name, rows in units.splits.items()}
    names = [f"{CLAIMS}/{name}" for name in place.list(CLAIMS) if not is_temporary(name)]
    holders = Counter(describe_owner(read_owner(place, name)) for name in names)
    return Listing(
        target=place.target,
        units=len(units),
        done=done,
        finished=finished,
        splits=splits,
        skipped=skipped,
        bytes=size,
        layers=read_shapes(place, meta),
        levels=list(read_levels(place, meta).levels),
        dtype=_told(meta, "request", "dtype"),
        backbone=_told(meta, "backbone", "name"),
        holders=dict(holders),
    )


def to_table(listings: Iterable[Listing]) -> str:
    """Returns several stores as a table, one a row."""
    head = ("store", "state", "samples", "layers", "levels", "dtype", "size", "claims", "backbone")
    rows = [
        (
            one.target,
            one.state,
            _number(one.samples),
            str(len(one.layers)),
            str(len(one.levels)),
            one.dtype,
            _size(one.bytes),
            str(sum(one.holders.values())),
            one.backbone,
        )
        for one in listings
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return printable("\n".join(line.rstrip() for line in lines))


def describe_owner(owner: dict[str, Any] | None) -> str:
    """Returns whom a claim names, in words."""
    known = [f"{key} {owner[key]}" for key in ("host", "pid", "rank", "started") if owner and key in owner]
    return printable(", ".join(known) or "nobody knows whom")


def _told(meta: dict[str, Any], *keys: str) -> str:
    found: Any = meta
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else ""


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
