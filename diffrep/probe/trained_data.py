"""What a trained head reads: stored features by sample number, and the order they are shown in."""

from __future__ import annotations

import hashlib
from math import ceil, prod

import numpy as np
import torch

from diffrep import dist
from diffrep.probe.reading import check_finite, pooled, pooled_shape
from diffrep.store import FeatureStore

Pair = tuple[str, str]
# Bytes of features that all processes of a machine together keep in memory; more are read from the files at each step.
MEMORY = 2 << 30
CHUNK = 4096
# In the run folder: the state that a stopped training goes on from.
CHECKPOINT = "last.ckpt"


class Samples:
    """Features of some samples of a store, pooled, by the sample's position in the store.

    They are read once and kept when they fit into `memory`, and are read from the mapped files step by step otherwise;
    both give the same numbers.

    Args:
        store: Where they are.
        pairs: Which (layer, level).
        rows: Positions of all samples that will be asked for.
        pool: Side that maps are pooled to; None reads everything as it is stored.
        memory: Bytes that may be kept; None shares `MEMORY` among the processes.

    Attributes:
        shapes: Shape of one sample of each pair, after pooling.
        kept: Whether they lie in memory.

    Raises:
        ConfigError: The pooling does not suit what is stored.
        DiffrepError: Features hold NaN or infinity.
    """

    def __init__(
        self, store: FeatureStore, pairs: list[Pair], rows: np.ndarray, pool: int | None, memory: int | None = None
    ):
        self.store, self.pool, self.rows = store, pool, np.unique(rows)
        self.shapes = {pair: pooled_shape(store, pair[0], pool) for pair in pairs}
        first = store.take(*pairs[0], self.rows[:1]).dtype
        sizes = {
            pair: (4 if self._pools(pair) else first.itemsize) * prod(shape) for pair, shape in self.shapes.items()
        }
        budget = MEMORY // dist.state().num_processes if memory is None else memory
        self.kept = len(self.rows) * sum(sizes.values()) <= budget
        self._memory: dict[Pair, torch.Tensor] = {}
        for pair in pairs:
            self._load(pair)

    def read(self, rows: np.ndarray) -> dict[Pair, torch.Tensor]:
        """Returns features (n, ...) of some samples by pair, in the stored type, or in fp32 where they are pooled."""
        if self.kept:
            places = torch.from_numpy(np.searchsorted(self.rows, rows))
            return {pair: whole.index_select(0, places) for pair, whole in self._memory.items()}
        return {pair: self._pooled(pair, rows) for pair in self.shapes}

    def _load(self, pair: Pair) -> None:
        """Looks at every sample once, and keeps it where there is room."""
        marks = torch.zeros(len(self.rows), 1)
        for start in range(0, len(self.rows), CHUNK):
            part = self._pooled(pair, self.rows[start : start + CHUNK])
            marks[start : start + CHUNK][~torch.isfinite(part.flatten(1)).all(1)] = torch.nan
            if self.kept:
                if not start:
                    self._memory[pair] = part.new_empty(len(self.rows), *part.shape[1:])
                self._memory[pair][start : start + CHUNK] = part
        check_finite(marks, "@".join(pair))

    def _pools(self, pair: Pair) -> bool:
        return self.shapes[pair] != tuple(self.store.meta["layers"][pair[0]]["shape"])

    def _pooled(self, pair: Pair, rows: np.ndarray) -> torch.Tensor:
        part = self.store.take(*pair, rows)
        return pooled(part, self.pool).view(len(part), *self.shapes[pair]) if self._pools(pair) else part


class Order:
    """Which training samples each step of each epoch reads: a function of the seed, whatever the number of processes.

    An epoch is cut into as few steps as `batch_size` allows, and these are equally long to within one sample: nothing
    is dropped, and no small last batch disturbs batch norm.

    Args:
        rows: Positions of the training samples.
        batch_size: Most samples of a step, over all processes.
        seed: Seed of the permutations.

    Attributes:
        steps: Steps of an epoch.
        smallest: Samples of the smallest step.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int):
        self.rows, self.seed = rows, seed
        self.steps = ceil(len(rows) / batch_size)
        self.smallest = len(rows) // self.steps
        self._epoch, self._parts = -1, []

    def step(self, epoch: int, step: int) -> np.ndarray:
        """Returns the samples of a step, sorted, for files are read fastest in order."""
        if epoch != self._epoch:
            shuffled = self.rows[draws(self.seed, "order", epoch).permutation(len(self.rows))]
            self._epoch, self._parts = epoch, np.array_split(shuffled, self.steps)
        return np.sort(self._parts[step])


def draws(seed: int, purpose: str, number: int) -> np.random.Generator:
    """Returns the generator of one epoch or step, so that a resumed run draws what one that never stopped does."""
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, number)))


def seed_of(seed: int, purpose: str, number: int) -> int:
    """Returns a seed for torch that belongs to one step of one process."""
    return _key(seed, purpose, number) >> 1


def _key(seed: int, purpose: str, number: int) -> int:
    digest = hashlib.blake2b(f"{purpose}\x1f{seed}\x1f{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
