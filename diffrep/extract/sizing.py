"""The batch size that a device takes and still gains from, measured."""

from __future__ import annotations

import resource
import sys
import time
from math import ceil
from typing import TYPE_CHECKING

import psutil
import torch

from diffrep.extract.memory import OutOfMemory, clear_memory, free_memory

if TYPE_CHECKING:
    from diffrep.backbones.conditioning import Cond
    from diffrep.extract.extractor import Extractor

FIRST, MOST = 8, 1024
# Twice the rows must bring this much more images a second.
GAIN = 1.03
# Share of the free memory that a batch may take: other processes of the machine want some of a CPU's, and fragments
# some of a GPU's.
SHARE = {"cpu": 0.5, "cuda": 0.9}
# The first run of a size warms up (and compiles); more are made while they are short.
RUNS, SECONDS = 3, 0.3


def find_batch_size(
    extractor: Extractor,
    height: int,
    width: int,
    cond: Cond = None,
    encode: bool = True,
    most: int = MOST,
) -> int:
    """Finds the largest batch that fits and is still faster than half of it, by trying.

    Rows are doubled from 8 while images per second grow by more than 3 %; where 8 do not fit they are halved. So they
    are powers of two, and compiled code is made for few sizes. All runs are on random images; the extractor itself is
    left as it is.

    Args:
        extractor: What will be run; its own `batch_size` does not matter.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        cond: The job's condition, one for all images.
        encode: Count the encoding of images in; not where posteriors are given.
        most: Largest number of rows to try.

    Returns:
        Rows of one forward, which is also the number of images to encode at a time.

    Raises:
        OutOfMemory: Not even one row fits.
        ConfigError: The condition or the size does not fit the network.
    """
    probe = _Probe(extractor, height, width, cond, encode)
    size, best, rate, shrunk = min(FIRST, most), 0, 0.0, False
    while True:
        found = room = None
        try:
            found, room = probe.measure(size)
        except OutOfMemory:
            if size == 1:
                raise
        if found is None:
            clear_memory()
            if best:
                return best
            size, shrunk = size // 2, True
            continue
        if best and found < GAIN * rate:
            return best
        best, rate = size, found
        if shrunk or not room or 2 * size > most:
            return best
        size *= 2


class _Probe:
    """Runs an extractor's work at any number of rows."""

    def __init__(self, extractor: Extractor, height: int, width: int, cond: Cond, encode: bool):
        self.extractor, self.cond, self.encode = extractor, cond, encode
        self.device, self.size = extractor.backbone.device, (height, width)
        self.rows = extractor.plan(height, width, extractor.backbone.condition(cond, 1)).rows

    def measure(self, rows: int) -> tuple[float, bool]:
        """Returns images per second at some rows of a forward, and whether the memory allows twice as many."""
        before = self._begin()
        best, spent, runs = float("inf"), 0.0, 0
        while runs < 2 or (runs < RUNS and spent < SECONDS):
            seconds, lasted = self._run(rows)
            best, spent, runs = min(best, seconds), spent + lasted, runs + 1
        taken = self._peak() - before
        kind = self.device.type
        return 1 / best, 2 * taken < SHARE.get(kind, 0.5) * free_memory(self.device)

    def _run(self, rows: int) -> tuple[float, float]:
        """Returns the seconds an image takes, and those that passed."""
        extractor, backbone = self.extractor, self.extractor.backbone
        twin = extractor.with_batch_size(rows)
        images = torch.rand(rows, backbone.image_channels, *self.size)
        began = time.perf_counter()
        posterior = twin.encode(images)
        self._wait()
        encoded = time.perf_counter()
        # A forward is full with these; where images have more rows than a forward, one of them will do.
        count = ceil(rows / self.rows)
        std = None if posterior.std is None else posterior.std[:count]
        twin(None, [str(i) for i in range(count)], self.cond, posterior=type(posterior)(posterior.mean[:count], std))
        ended = time.perf_counter()
        seconds = (ended - encoded) / count + ((encoded - began) / rows if self.encode else 0)
        return seconds, ended - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _begin(self) -> int:
        """Returns the bytes that are taken before a run."""
        if self.device.type != "cuda":
            return psutil.Process().memory_info().rss
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _peak(self) -> int:
        if self.device.type != "cuda":
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return torch.cuda.max_memory_allocated(self.device)
