"""The batches of a run, read ahead while the network works."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from diffrep.train.order import Picks, StepBatches

AHEAD = 2
_END = object()


class Feed:
    """Batches of a data set in a run's order, read by a thread.

    Args:
        data: Indexed with `Picks`; gives a dict of tensors (B, ...).
        order: Which samples each step takes.
        workers: Processes that read; 0 reads in the thread.
        device: Where the tensors go.

    Attributes:
        waited: Seconds that steps have waited for their batch so far.
    """

    def __init__(self, data: Any, order: StepBatches, workers: int, device: torch.device):
        self.order, self.device = order, device
        pinned = device.type == "cuda"
        self._loader = DataLoader(data, sampler=order, batch_size=None, num_workers=workers, pin_memory=pinned)
        self.waited = 0.0

    def __iter__(self) -> Iterator[tuple[Picks, dict[str, torch.Tensor]]]:
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        ended = threading.Event()

        def read() -> None:
            try:
                for item in self._loader:
                    _put(ready, item, ended)
                    if ended.is_set():
                        return
                _put(ready, _END, ended)
            except BaseException as error:  # it is the reader of the batches who must see it
                _put(ready, error, ended)

        thread = threading.Thread(target=read, daemon=True, name="diffrep-feed")
        thread.start()
        try:
            for picks in self.order:
                began = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - began
                if isinstance(item, BaseException):
                    raise item
                yield picks, {name: tensor.to(self.device, non_blocking=True) for name, tensor in item.items()}
        finally:
            ended.set()
            thread.join()


def _put(ready: queue.Queue[Any], item: Any, ended: threading.Event) -> None:
    """Puts an item into the queue as soon as there is room, or gives up when nobody reads any more."""
    while not ended.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            continue
