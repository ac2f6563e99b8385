"""The order of the training data and the randomness of a step, as functions of (seed, step) and nothing else.

That is what makes a resumed run equal to one that never stopped, on any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

# Rows of the data set, and which of them are mirrored: what one process takes in one step.
Picks = tuple[list[int], list[bool]]


def _key(seed: int, purpose: str, number: int) -> int:
    digest = hashlib.blake2b(f"{purpose}\x1f{seed}\x1f{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def step_rng(seed: int, purpose: str, number: int) -> np.random.Generator:
    """Returns the generator of one step or epoch."""
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, number)))


class StepRandom:
    """What a step draws at random, for the batch over all processes.

    Every process draws all of it and takes its own rows, so that their number changes nothing. Numbers of a few values
    a sample come from numpy; noise is drawn where it is used, on CUDA by the device's own generator, whose numbers
    differ from those on the CPU.

    Args:
        seed: The run's.
        step: The step.
        device: Where the noise is needed.
    """

    def __init__(self, seed: int, step: int, device: torch.device | str = "cpu"):
        self._rng = step_rng(seed, "step", step)
        self._device = torch.device(device)
        self._generator: torch.Generator | None = None
        if self._device.type == "cuda":
            self._generator = torch.Generator(self._device).manual_seed(_key(seed, "noise", step) >> 1)

    def uniform(self, *shape: int) -> np.ndarray:
        """Returns numbers of [0, 1), fp64."""
        return self._rng.random(shape)

    def normal(self, *shape: int) -> np.ndarray:
        """Returns unit Gaussian numbers, fp64."""
        return self._rng.standard_normal(shape)

    def noise(self, *shape: int) -> torch.Tensor:
        """Returns unit Gaussian noise, fp32, on the device."""
        if self._generator is not None:
            return torch.randn(shape, generator=self._generator, device=self._device)
        return torch.from_numpy(self._rng.standard_normal(shape, dtype=np.float32)).to(self._device)


@dataclass(frozen=True)
class StepBatches:
    """The samples that one process takes in each step, and which of them are mirrored.

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
        flip: Mirror each sample with probability one half.
    """

    samples: int
    batch_size: int
    seed: int
    first: int
    last: int
    rank: int = 0
    world: int = 1
    flip: bool = False

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[Picks]:
        share = self.batch_size // self.world
        mine = slice(self.rank * share, (self.rank + 1) * share)
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            rows = []
            for position in range(step * self.batch_size + mine.start, step * self.batch_size + mine.stop):
                if position // self.samples != epoch:
                    epoch = position // self.samples
                    order = step_rng(self.seed, "order", epoch).permutation(self.samples)
                rows.append(int(order[position % self.samples]))
            mirrored = step_rng(self.seed, "mirror", step).random(self.batch_size)[mine] < (0.5 if self.flip else 0)
            yield rows, mirrored.tolist()
