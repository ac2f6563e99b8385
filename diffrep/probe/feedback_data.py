"""What DifFeed is trained and judged on: batches of live images, read by sample number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from diffrep.data import ImageSet
from diffrep.errors import ConfigError
from diffrep.probe.trained_data import Order

Batch = tuple[torch.Tensor, torch.Tensor]  # rows (B,) of the image set, and images (B, C, H, W)


class Batches(Dataset):
    """Batches of an image set; an index is the rows of one."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, rows: np.ndarray) -> Batch:
        return collate([(int(row), self.images[int(row)]) for row in rows])


class Steps(Sampler):
    """One process's samples of each step of an epoch, which Lightning names with `set_epoch`."""

    def __init__(self, order: Order, rank: int, processes: int):
        self.order, self.mine, self.epoch = order, slice(rank, None, processes), 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.order.step(self.epoch, step)[self.mine] for step in range(self.order.steps))


def batches_of(images: ImageSet, rows: Sampler | list[np.ndarray], workers: int) -> DataLoader:
    """Returns a loader of batches, each of given rows."""
    return DataLoader(Batches(images), batch_size=None, sampler=rows, num_workers=workers)


def collate(samples: list[tuple[int, torch.Tensor]]) -> Batch:
    """Puts samples together.

    Raises:
        ConfigError: They differ in size.
    """
    sizes = sorted({tuple(image.shape[-2:]) for _, image in samples})
    if len(sizes) > 1:
        raise ConfigError(f"the images differ in size, such as {sizes[:2]}; set data.size")
    return torch.tensor([row for row, _ in samples]), torch.stack([image for _, image in samples])
