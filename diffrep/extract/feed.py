"""The batches of units of work: samples that could be read, and those that could not."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from diffrep.backbones import Posterior
from diffrep.data import ImageSet
from diffrep.errors import DataError
from diffrep.store import Unit

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Batch:
    """Samples of one unit.

    Attributes:
        rows: Places of those that could be read, in the data set, or in their shard when it is streamed.
        ids: Their ids.
        labels: Their labels, or None.
        images: (B, C, H, W) fp32 in [0, 1]; None where there are none, where they differ in size, or where the
            posterior is there already.
        posterior: The codec's posterior of the images, in place of these.
        sizes: Sizes of the images, in pixels; with more than one there is no common tensor.
        problems: Ids of the others, with the reason.
    """

    rows: list[int]
    ids: list[str]
    labels: list[int] | list[list[int]] | None
    images: torch.Tensor | None
    posterior: Posterior | None
    sizes: list[tuple[int, int]]
    problems: list[tuple[str, str]]

    @property
    def samples(self) -> int:
        """Number of samples, readable or not."""
        return len(self.rows) + len(self.problems)


class Feed(Protocol):
    """Reads units ahead of the network."""

    def __call__(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Batch | None]]:
        """Gives the batches of each unit in order, and None after its last one.

        Units are taken from the iterable as there is room to read ahead.
        """


class ImageFeed:
    """Images of a set that is indexed by position, decoded by a data loader.

    Args:
        images: The set.
        size: Images of a batch; a unit's last one may be smaller.
        workers: Processes that decode; 0 decodes when a batch is asked for.
        prefetch: Batches that each of them reads ahead.
        pin: Put batches into page-locked memory, from where copies to a GPU need not be waited for.
    """

    def __init__(self, images: ImageSet, size: int, workers: int = 0, prefetch: int = 2, pin: bool = False):
        self.images, self.size = images, size
        self._options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin, "collate_fn": _collate}
        if workers:
            self._options["prefetch_factor"] = prefetch

    def __call__(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Batch | None]]:
        """Gives the batches of each unit in order, and None after its last one."""
        ahead: deque[tuple[Unit, int]] = deque()

        def cuts() -> Iterator[list[int]]:
            for unit in units:
                rows = list(unit.rows)
                parts = [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
                ahead.append((unit, len(parts)))
                yield from parts

        # One loader for all units, so that its workers start once.
        loader = iter(DataLoader(_Readable(self.images), batch_sampler=_Lazy(cuts), **self._options))
        for batch in loader:
            unit, left = ahead.popleft()
            yield unit, self._named(*batch)
            if left > 1:
                ahead.appendleft((unit, left - 1))
            else:
                yield unit, None

    def _named(
        self, rows: list[int], images: torch.Tensor | None, sizes: list[tuple[int, int]], failed: list[tuple[int, str]]
    ) -> Batch:
        labels = [self.images.label(row) for row in rows] if self.images.labelled else None
        problems = [(self.images.id(row), problem) for row, problem in failed]
        return Batch(rows, [self.images.id(row) for row in rows], labels, images, None, sizes, problems)


class _Lazy:
    """A batch sampler that is asked for its batches as the loader needs them."""

    def __init__(self, cuts: Any):
        self._cuts = cuts

    def __iter__(self) -> Iterator[list[int]]:
        return self._cuts()


class _Readable(Dataset):
    """Images that come with their row and, where reading failed, the reason in place of an image.

    The reason travels as a value because an exception from a data-loader worker arrives wrapped in its traceback.
    """

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor | None, str | None]:
        try:
            return row, self.images[row], None
        except DataError as error:
            return row, None, str(error)


def _collate(
    samples: list[tuple[int, torch.Tensor | None, str | None]],
) -> tuple[list[int], torch.Tensor | None, list[tuple[int, int]], list[tuple[int, str]]]:
    good = [(row, image) for row, image, problem in samples if problem is None]
    sizes = sorted({tuple(image.shape[-2:]) for _, image in good})
    images = torch.stack([image for _, image in good]) if len(sizes) == 1 else None
    return [row for row, _ in good], images, sizes, [(row, problem) for row, _, problem in samples if problem]
