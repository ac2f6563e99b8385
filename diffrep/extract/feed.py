"""The batches of units of work: samples that could be read, and those that could not."""

from __future__ import annotations

import errno
import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from diffrep import dist
from diffrep.backbones import Posterior
from diffrep.data import ImageSet
from diffrep.data.shards import StorageError
from diffrep.errors import DataError, DiffrepError
from diffrep.store import Unit

if TYPE_CHECKING:
    from collections.abc import Iterable

# What the system says of files that were there when the job began, once their disk or server is gone.
GONE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}


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
            self._options |= {"prefetch_factor": prefetch, "worker_init_fn": _outlive_signals}

    def __call__(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Batch | None]]:
        """Gives the batches of each unit in order, and None after its last one.

        Raises:
            StorageError: A file is gone that was listed.
            DiffrepError: A process that decodes was ended.
        """
        ahead: deque[tuple[Unit, int]] = deque()

        def cuts() -> Iterator[list[int]]:
            for unit in units:
                rows = list(unit.rows)
                parts = [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
                ahead.append((unit, len(parts)))
                yield from parts

        # One loader for all units, so that its workers start once.
        batches = _begin(DataLoader(_Readable(self.images), batch_sampler=_Lazy(cuts), **self._options))
        while (batch := _next(batches, self._options["num_workers"])) is not None:
            unit, left = ahead.popleft()
            yield unit, self._named(*batch)
            if left > 1:
                ahead.appendleft((unit, left - 1))
            else:
                yield unit, None

    def _named(
        self,
        rows: list[int],
        images: torch.Tensor | None,
        sizes: list[tuple[int, int]],
        failed: list[tuple[int, str]],
        gone: list[str],
    ) -> Batch:
        if gone:
            raise StorageError(
                f"{gone[0]}; it was there when the job began, so nothing is skipped. Finished units stay: see whether "
                "the data are where they were, and run again"
            )
        labels = [self.images.label(row) for row in rows] if self.images.labelled else None
        problems = [(self.images.id(row), problem) for row, problem in failed]
        return Batch(rows, [self.images.id(row) for row in rows], labels, images, None, sizes, problems)


class _Lazy:
    """A batch sampler that is asked for its batches as the loader needs them."""

    def __init__(self, cuts: Any):
        self._cuts = cuts

    def __iter__(self) -> Iterator[list[int]]:
        return self._cuts()


# A row and its image; or the reason why there is none, and whether the file is gone.
_Read = tuple[int, torch.Tensor | None, str | None, bool]


class _Readable(Dataset):
    """Images that come with their row and, where reading failed, the reason in place of an image.

    The reason travels as a value because an exception from a data-loader worker arrives wrapped in its traceback.
    """

    def __init__(self, images: ImageSet):
        self.images = images

    def __getitem__(self, row: int) -> _Read:
        try:
            return row, self.images[row], None, False
        except DataError as error:
            return row, None, str(error), _is_gone(error)


def _is_gone(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in GONE:
            return True
        error = error.__cause__
    return False


def _collate(samples: list[_Read]) -> tuple[Any, ...]:
    good = [(row, image) for row, image, problem, _ in samples if problem is None]
    sizes = sorted({tuple(image.shape[-2:]) for _, image in good})
    images = torch.stack([image for _, image in good]) if len(sizes) == 1 else None
    failed = [(row, problem) for row, _, problem, _ in samples if problem]
    return [row for row, _ in good], images, sizes, failed, [problem for _, _, problem, gone in samples if gone]


def _begin(loader: DataLoader) -> Any:
    """Starts a loader's processes.

    Torch would raise in the midst of anything when one of them dies; asked for a batch it tells of that too.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    begun = iter(loader)
    # An earlier loader of this process may have left torch's.
    mine = before is not None and getattr(before, "__module__", "").split(".")[0] != "torch"
    signal.signal(signal.SIGCHLD, before if mine else signal.SIG_DFL)
    return begun


def _next(batches: Any, workers: int) -> tuple[Any, ...] | None:
    try:
        return next(batches, None)
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        reason = str(error).strip()
        # Of an exception inside a process torch's text begins with "Caught"; what is no RuntimeError is a pipe's end.
        if not workers or reason.startswith("Caught") or type(error) is RuntimeError and "worker" not in reason:
            raise
        raise DiffrepError(
            f"a process that decodes images was ended ({reason}), as when memory is short, or shared memory "
            "(/dev/shm); finished units stay. Run again, with less workers, prefetch or batch_size"
        ) from error


def _outlive_signals(worker: int) -> None:
    """Lets a process that decodes go on when a scheduler signals all of a job's: the job itself ends it in order."""
    for number in dist.SIGNALS:
        signal.signal(number, _pass_over)


def _pass_over(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one means it
