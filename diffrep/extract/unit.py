"""The features of one unit of work, filled batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from diffrep.extract.features import Features
from diffrep.extract.feed import Batch
from diffrep.store import StoreWriter, Unit

# Samples that a streamed shard is first given room for; nobody knows how many it holds.
FIRST = 1024


@dataclass
class UnitFeatures:
    """What is known of a unit so far.

    Attributes:
        unit: Which one.
        capacity: Its number of samples; None where that is not known.
        tensors: Room for "layer@level" features (capacity, ...), of which the first rows are filled.
        ids: Of the samples.
        rows: Their places.
        labels: Their labels, or None.
        skipped: The samples that could not be read, with the reason.
    """

    unit: Unit
    capacity: int | None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    labels: list[int] | list[list[int]] | None = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(self, batch: Batch, features: Features | None) -> None:
        """Adds a batch and its features, or the reasons why it has none."""
        self.skipped += [{"id": sample, "reason": reason} for sample, reason in batch.problems]
        if batch.labels is None:
            self.labels = None
        if features is None:
            return
        first, last = len(self.ids), len(self.ids) + len(batch.ids)
        for (layer, level), tensor in features.items():
            self._room(f"{layer}@{level}", tensor, last)[first:last] = tensor
        self.ids += batch.ids
        self.rows += batch.rows
        if self.labels is not None:
            self.labels += batch.labels

    def write(self, writer: StoreWriter, **options: object) -> bool:
        """Writes the unit into a store; options are those of `StoreWriter.write`."""
        count = len(self.ids)
        tensors = {name: tensor[:count] for name, tensor in self.tensors.items()}
        return writer.write(self.unit, tensors, self.ids, self.rows, self.labels, self.skipped, **options)

    def _room(self, name: str, like: torch.Tensor, needed: int) -> torch.Tensor:
        held = self.tensors.get(name)
        if held is None or len(held) < needed:
            size = max(needed, self.capacity or (FIRST if held is None else 2 * len(held)))
            grown = like.new_empty(size, *like.shape[1:])
            if held is not None:
                grown[: len(held)] = held
            self.tensors[name] = held = grown
        return held
