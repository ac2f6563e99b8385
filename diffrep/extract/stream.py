"""The batches of streamed shards: one thread reads, others decode, and both keep some batches ahead of the network."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from diffrep.data import ShardSet
from diffrep.data.streams import Sample
from diffrep.errors import DataError
from diffrep.extract.feed import Batch
from diffrep.store import Unit

if TYPE_CHECKING:
    from collections.abc import Iterable

# Seconds that an ended feed waits for a read in progress; the thread itself ends with it, whenever that is.
PATIENCE = 5.0


class StreamFeed:
    """Samples of shards, each shard read once from its beginning to its end. A unit is a shard.

    Args:
        images: The set.
        size: Images of a batch; a shard's last one may be smaller.
        workers: Threads that decode; 0 decodes in the thread that reads.
        prefetch: Batches that each of them keeps ahead, read or decoded.
        pin: Put batches into page-locked memory, where CUDA is there.
    """

    def __init__(self, images: ShardSet, size: int, workers: int = 0, prefetch: int = 2, pin: bool = False):
        self.images, self.size, self.workers = images, size, workers
        self.ahead = max(workers, 1) * prefetch
        self.pin = pin and torch.cuda.is_available()

    def __call__(self, units: Iterable[Unit]) -> Iterator[tuple[Unit, Batch | None]]:
        """Gives the batches of each unit in order, and None after its last one.

        Units are taken in the caller's thread, one more than is being read; several where these have few batches.

        Raises:
            DataError: The storage failed.
            ConfigError: A label is not an integer.
        """
        source, begun = iter(units), deque()
        reading = _Reading(self, self.images.labelled)
        try:
            while True:
                while reading.wants_units and (unit := next(source, None)) is not None:
                    begun.append(unit)
                    reading.begin(unit)
                if not begun:
                    return
                batch = reading.next()
                yield begun[0], batch
                if batch is None:
                    begun.popleft()
        finally:
            reading.end()


class _Reading:
    """The threads of one call."""

    def __init__(self, feed: StreamFeed, labelled: bool):
        self._feed, self._labelled = feed, labelled
        self._units: SimpleQueue[Unit | None] = SimpleQueue()
        self._batches: SimpleQueue[Future[Batch | None]] = SimpleQueue()
        self._room = threading.Semaphore(feed.ahead)
        self._ended = threading.Event()
        self._idle = 0  # times that no unit waited when one was through
        # Page-locked memory belongs to the GPU of the thread that asks for it, which is the first one by default.
        self._device = torch.cuda.current_device() if feed.pin else None
        self._pool = ThreadPoolExecutor(feed.workers, "diffrep-decode", self._set_device) if feed.workers else None
        self._thread = threading.Thread(target=self._read, daemon=True, name="diffrep-read")
        self._thread.start()

    @property
    def wants_units(self) -> bool:
        return self._units.qsize() < 1 + min(self._idle, self._feed.ahead)

    def begin(self, unit: Unit) -> None:
        self._units.put(unit)

    def next(self) -> Batch | None:
        batch = self._batches.get().result()
        if batch is not None:
            self._room.release()
        return batch

    def end(self) -> None:
        self._ended.set()
        self._units.put(None)
        self._room.release()
        self._thread.join(PATIENCE)
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self) -> None:
        try:
            self._set_device()
            while not self._ended.is_set() and (unit := self._units.get()) is not None:
                self._read_unit(unit)
                self._idle += self._units.empty()
        except BaseException as error:  # the consumer gets it in its place among the batches
            failed: Future[Batch | None] = Future()
            failed.set_exception(error)
            self._batches.put(failed)

    def _read_unit(self, unit: Unit) -> None:
        # A pause before a shard is begun anew ends with the feed.
        samples = enumerate(self._feed.images.samples(unit.rows[0], self._ended.wait))
        while True:
            self._room.acquire()
            part = []
            for place in islice(samples, self._feed.size):
                if self._ended.is_set():
                    return
                part.append(place)
            if not part:
                self._room.release()
                self._put(None)
                return
            self._put(part)

    def _put(self, part: list[tuple[int, Sample]] | None) -> None:
        if part is not None and self._pool is not None and not self._ended.is_set():
            self._batches.put(self._pool.submit(self._decode, part))
            return
        done: Future[Batch | None] = Future()
        done.set_result(None if part is None else self._decode(part))
        self._batches.put(done)

    def _decode(self, part: list[tuple[int, Sample]]) -> Batch:
        rows, ids, labels, images, problems = [], [], [], [], []
        for row, sample in part:
            if self._ended.is_set():
                break
            problem = sample.problem
            if problem is None:
                try:
                    images.append(self._feed.images.image(sample.content))
                except DataError as error:
                    problem = f"{sample.id}: {error}"
            if problem is not None:
                problems.append((sample.id, problem))
                continue
            rows.append(row)
            ids.append(sample.id)
            labels.append(sample.label)
        sizes = sorted({tuple(image.shape[-2:]) for image in images})
        stacked = self._stack(images) if len(sizes) == 1 else None
        return Batch(rows, ids, labels if self._labelled else None, stacked, None, sizes, problems)

    def _stack(self, images: list[torch.Tensor]) -> torch.Tensor:
        stacked = torch.empty(len(images), *images[0].shape, pin_memory=self._feed.pin)
        # By numpy: torch would start its own threads in each of these.
        for place, image in zip(stacked.numpy(), images, strict=True):
            place[...] = image.numpy()
        return stacked

    def _set_device(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
