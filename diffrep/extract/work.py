"""One process's share of a job: units are claimed, read ahead, extracted, and written by a thread of their own."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from diffrep import dist
from diffrep.errors import Stopped, StoreError
from diffrep.extract.monitor import Monitor
from diffrep.extract.unit import UnitFeatures
from diffrep.store import Claims, StoreWriter, Unit

if TYPE_CHECKING:
    from diffrep.extract.job import ExtractJob

# Seconds between two looks for units that others have given up; it doubles from the first to the last.
FIRST_WAIT, LAST_WAIT = 0.05, 10.0


class Work:
    """Extracts what is missing in a store, together with all other processes that do so.

    Args:
        job: What is extracted.
        writer: The store.
        stop: Tells when a scheduler wants the machine back.
    """

    def __init__(self, job: ExtractJob, writer: StoreWriter, stop: dist.StopSignal):
        self.job, self.writer, self.stop = job, writer, stop
        worker = dist.worker()
        self.claims = Claims(writer.place, writer.units, job.config.lease, worker.rank, worker.world)
        device, monitor = job.backbone.device, job.config.monitor
        self.monitor = Monitor(len(writer.units), job.samples, worker, device, monitor, writer.place.name)

    def run(self) -> None:
        """Works until every unit is there, and index.json.

        Raises:
            Stopped: A signal came first; what was begun is given back.
            DiffrepError: As `ExtractJob.read` and `StoreWriter.write`.
        """
        publisher = _Publisher(self.writer, self.claims)
        try:
            self._look()
            if not self.claims.finished:
                self._extract(publisher)
            self._finish()
        finally:
            self.monitor.close()
            publisher.close()
            with suppress(StoreError):  # then they expire; what ended the job says more
                self.claims.release_all()

    def _extract(self, publisher: _Publisher) -> None:
        self._check_stop()  # what comes now may take long
        feed = self.job.feed()
        self.monitor.batch_size = self.job.batch_size
        wait = FIRST_WAIT
        while True:
            before = self.monitor.units
            self._pass(feed(self._take()), publisher)
            self._published(publisher.flush())
            self._check_stop()
            self._look()
            if self.claims.finished:
                return
            # What is left is in other hands, which may be dead ones.
            wait = FIRST_WAIT if self.monitor.units > before else min(2 * wait, LAST_WAIT)
            self._sleep(wait)

    def _pass(self, batches: Iterator[tuple[Unit, object]], publisher: _Publisher) -> None:
        current: UnitFeatures | None = None
        while True:
            with self.monitor.timed("data"):
                unit, batch = next(batches, (None, None))
            if unit is None or self.stop.name is not None:
                return
            if current is None:
                current = UnitFeatures(unit, self.job.capacity(unit))
            if batch is None:
                with self.monitor.timed("write"):
                    self._published(publisher.put(current))
                current = None
                continue
            with self.monitor.timed("network"):
                current.add(batch, self.job.read(batch))
            self.monitor.batch(len(batch.ids), len(batch.problems))
            self.claims.beat()
            if self.monitor.look_due():
                self._look()

    def _take(self) -> Iterator[Unit]:
        while self.stop.name is None and (unit := self.claims.take()) is not None:
            yield unit

    def _published(self, units: list[tuple[Unit, bool]]) -> None:
        for unit, written in units:
            self.claims.release(unit.number)
            if written:
                self.monitor.unit()
            else:
                self._lengthen_lease(unit)

    def _lengthen_lease(self, unit: Unit) -> None:
        # Else two processes whose batches take longer would take the last unit from each other for ever.
        self.claims.lease *= 2
        warnings.warn(
            f"unit {unit.number} was taken over by another process, as this one made no progress for lease seconds; "
            f"it grants others {self.claims.lease:g} s from now on. Use a longer lease",
            stacklevel=2,
        )

    def _look(self) -> None:
        self.claims.refresh()
        self.monitor.looked(self.claims.done)

    def _finish(self) -> None:
        """Writes index.json, or waits for the process that does."""
        wait = FIRST_WAIT
        while not self.writer.indexed():
            if self.claims.take_index():
                self.writer.finish()
                return
            self._check_stop()
            self._sleep(wait)
            wait = min(2 * wait, LAST_WAIT)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.stop.name is None and time.monotonic() < until:
            time.sleep(min(0.1, seconds))
        self.monitor.write()  # a process that waits is well
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop.name is not None:
            units = f"at least {self.claims.done:,} of {len(self.writer.units):,} units"
            raise Stopped(
                f"stopped by {self.stop.name}: {units} are in {self.writer.place.target}; run the same command again "
                "to go on"
            )


class _Publisher:
    """Writes units in a thread, one at a time: two are in memory, that one and the one that is being filled."""

    def __init__(self, writer: StoreWriter, claims: Claims):
        self._writer, self._claims = writer, claims
        self._todo: queue.Queue[UnitFeatures | None] = queue.Queue()
        self._done: queue.Queue[tuple[Unit, bool]] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="diffrep-writer")
        self._thread.start()

    def put(self, features: UnitFeatures) -> list[tuple[Unit, bool]]:
        """Hands a unit over when the one before is through; returns those, and whether this process published them."""
        through = self.flush()
        self._todo.put(features)
        return through

    def flush(self) -> list[tuple[Unit, bool]]:
        """Waits until all units are through and returns them."""
        self._todo.join()
        if self._error is not None:
            raise self._error
        found = []
        while not self._done.empty():
            found.append(self._done.get())
        return found

    def close(self) -> None:
        """Ends the thread when it is through."""
        self._todo.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (features := self._todo.get()) is not None:
            try:
                if self._error is None:  # else the job is ending, and the rest stays undone
                    self._write(features)
            except BaseException as error:  # it is the job that must see it
                self._error = error
            del features  # or it would be held until the next one comes
            self._todo.task_done()
        self._todo.task_done()

    def _write(self, features: UnitFeatures) -> None:
        number = features.unit.number
        token, claims = self._claims.token, self._claims
        written = features.write(self._writer, token=token, still=lambda: claims.holds(number))
        if written:
            self._writer.close_folder(features.unit)
        self._done.put((features.unit, written))
