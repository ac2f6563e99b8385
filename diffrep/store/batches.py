"""Batches of a store of any size, read unit after unit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch

from diffrep.store.files import UnitFiles
from diffrep.store.tensors import Rows

# Positions in the store (n,), features (n, ...), labels (n,) or (n, L) or None.
Batch: TypeAlias = tuple[np.ndarray, torch.Tensor, torch.Tensor | None]


def iterate(
    files: UnitFiles, names: list[str], units: range, size: int, shuffle: int | None, window: int
) -> Iterator[Batch]:
    """Reads units once; see `FeatureStore.batches`.

    Args:
        files: The store's.
        names: The tensor of the features and, where there are labels, theirs.
        units: Which ones.
        size: Samples of a batch.
        shuffle: Seed of the order, or None.
        window: Units whose samples are shuffled together.
    """
    generator = None if shuffle is None else np.random.default_rng(shuffle)
    order = np.array(units) if generator is None else generator.permutation(units)
    begun: Batch | None = None
    for start in range(0, len(order), window):
        held = _Window(files, names, order[start : start + window], generator)
        begin = 0
        while begin < len(held):
            end = begin + size - (0 if begun is None else len(begun[0]))
            part = held.read(begin, end)
            begun, begin = part if begun is None else _joined(begun, part), end
            if len(begun[0]) == size:
                yield begun
                begun = None
    if begun is not None:
        yield begun


class _Window:
    """The samples of some units, in the order in which they are read."""

    def __init__(self, files: UnitFiles, names: list[str], units: np.ndarray, generator: np.random.Generator | None):
        samples = files.table.samples[units]
        self._of = np.repeat(np.arange(len(units)), samples)
        self._at = np.concatenate([np.arange(count) for count in samples])
        if generator is not None:
            order = generator.permutation(len(self._of))
            self._of, self._at = self._of[order], self._at[order]
        self._begins = files.starts[units]
        held = files.held(names, units.tolist())
        self._read = [Rows(held, name) for name in names]

    def __len__(self) -> int:
        return len(self._of)

    def read(self, begin: int, end: int) -> Batch:
        """Returns the samples from one place in the order to before another."""
        of, at = self._of[begin:end], self._at[begin:end]
        features, *labels = (read(of, at) for read in self._read)
        return self._begins[of] + at, features, labels[0] if labels else None


def _joined(first: Batch, second: Batch) -> Batch:
    labels = None if first[2] is None else torch.cat([first[2], second[2]])
    return np.concatenate([first[0], second[0]]), torch.cat([first[1], second[1]]), labels
