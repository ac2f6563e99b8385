"""The order of the training data and the randomness of a step, as functions of (seed, step) and nothing else.

That is what makes a resumed run equal to one that never stopped, on any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def step_rng(seed: int, purpose: str, number: int) -> np.random.Generator:
    """Returns the generator of one step or epoch."""
    digest = hashlib.blake2b(f"{purpose}\x1f{seed}\x1f{number}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@dataclass(frozen=True)
class StepBatches:
    """Batch sampler: the sample indices of one process, step by step.

    All epochs' permutations stand one after another; step s takes the next `batch_size` of them, so a batch may span
    two epochs and no sample is dropped.

    Attributes:
        samples: Size of the data set.
        batch_size: Samples of a step over all processes.
        seed: Seed of the permutations.
        first: First step.
        last: One past the last step.
        rank: This process.
        world: Number of processes; divides `batch_size`.
    """

    samples: int
    batch_size: int
    seed: int
    first: int
    last: int
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            batch = []
            for position in range(
                step * self.batch_size + self.rank * share, step * self.batch_size + (self.rank + 1) * share
            ):
                if position // self.samples != epoch:
                    epoch = position // self.samples
                    order = step_rng(self.seed, "order", epoch).permutation(self.samples)
                batch.append(int(order[position % self.samples]))
            yield batch
