"""What a process tells about its work: a live line, and a file of counters for monitors."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from diffrep.dist import Worker
from diffrep.errors import StoreError
from diffrep.store.layout import write_whole

# Seconds between two looks at what the other processes have done, and between two writings of the counters.
LOOK, WRITE = 15.0, 5.0


class Monitor:
    """Counts what one process does and how it spends its time.

    Args:
        total: Units of the job.
        samples: Samples of the job; None where shards are streamed and nobody knows.
        worker: Which process this is; the first one shows the line.
        device: Where the network runs.
        file: File of counters in the text format of Prometheus; None writes none.
        store: Name of the store, a label of every counter.

    Attributes:
        seconds: Spent so far, by part: "data" waits for samples, "network" reads features, "write" waits for the disk.
    """

    def __init__(
        self, total: int, samples: int | None, worker: Worker, device: torch.device, file: str | None, store: str
    ):
        self.total, self.samples, self.worker, self.device = total, samples, worker, device
        self.file = None if file is None else Path(file if worker.world == 1 else f"{file}.{worker.rank}")
        self.store = store
        self.seconds = dict.fromkeys(("data", "network", "write"), 0.0)
        self.images = self.skipped = self.units = self.done = self._since = 0
        self.batch_size = 0
        self._began = self._looked = time.monotonic()
        self._wrote = float("-inf")
        self._progress = time.time()
        several = f" in {worker.world} processes" if worker.world > 1 else ""
        what = {"total": total, "unit": "unit"} if samples is None else {"total": samples, "unit": "image"}
        self._bar = tqdm(desc=f"extract{several}", disable=worker.rank > 0, smoothing=0.1, **what)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the block's time as a part's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def look_due(self) -> bool:
        """Tells whether it is time to see what the other processes have done; only the line needs it."""
        return self.worker.rank == 0 and self.worker.world > 1 and time.monotonic() - self._looked > LOOK

    def looked(self, done: int) -> None:
        """Takes note of the number of units that the store has, by whomever."""
        self._looked = time.monotonic()
        self.done, self._since = done, 0
        self._show()

    def batch(self, read: int, skipped: int) -> None:
        """Counts a batch's samples."""
        self.images += read
        self.skipped += skipped
        self._since += read + skipped
        self._progress = time.time()
        self._show()
        self.write()

    def unit(self) -> None:
        """Counts a unit that this process has published."""
        self.units += 1

    def write(self, last: bool = False) -> None:
        """Writes the file of counters, when it is time or this is the last chance.

        Raises:
            StoreError: It cannot be written the first time. Later that is warned of once, and the work goes on.
        """
        if self.file is None or not (last or time.monotonic() - self._wrote >= WRITE):
            return
        try:
            write_whole(self.file, self.text().encode())
        except StoreError as error:
            self.file = None
            if self._wrote < self._began:
                raise
            warnings.warn(f"the counters stay as they are: {error}", stacklevel=2)
        self._wrote = time.monotonic()

    def close(self) -> None:
        """Ends the line and writes the counters a last time."""
        self._bar.close()
        self.write(last=True)

    def text(self) -> str:
        """Returns the counters in the text format of Prometheus."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        lines = []
        for name, kind, what, values in (
            ("images_total", "counter", "Images whose features were read.", {"": self.images}),
            ("skipped_total", "counter", "Samples that could not be read.", {"": self.skipped}),
            ("units_total", "counter", "Units that this process has published.", {"": self.units}),
            ("store_units", "gauge", "Units of the whole store.", {"": self.total}),
            ("store_units_done", "gauge", "Units known to be there, by whomever.", {"": self.done}),
            ("seconds_total", "counter", "Seconds by what they were spent on.", self._parts()),
            ("images_per_second", "gauge", "Mean rate of this process.", {"": self.images / elapsed}),
            ("batch_size", "gauge", "Rows of one forward.", {"": self.batch_size}),
            ("device_bytes", "gauge", "Most device memory held so far.", {"": self._device_bytes()}),
            ("last_progress_seconds", "gauge", "Unix time of the last batch.", {"": self._progress}),
        ):
            lines += [f"# HELP diffrep_{name} {what}", f"# TYPE diffrep_{name} {kind}"]
            labels = f'store="{_escaped(self.store)}",rank="{self.worker.rank}"'
            lines += [f"diffrep_{name}{{{labels}{extra}}} {value:.10g}" for extra, value in values.items()]
        return "\n".join(lines) + "\n"

    def _parts(self) -> dict[str, float]:
        return {f',part="{part}"': spent for part, spent in self.seconds.items()}

    def _device_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _show(self) -> None:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        network = "GPU" if self.device.type == "cuda" else "network"
        shares = f"wait {self.seconds['data'] / elapsed:.0%}, {network} {self.seconds['network'] / elapsed:.0%}"
        if self.samples is None:
            self._bar.n = min(self.done, self.total)
            shares = f"{self.images / elapsed:.0f} images/s, {shares}"
        else:
            self._bar.n = min(self.samples, round(self.samples * self.done / self.total) + self._since)
        self._bar.set_postfix_str(shares, refresh=False)
        self._bar.update(0)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
