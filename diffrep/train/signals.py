"""Signals that ask a run to save and end: what schedulers send before they take a machine away."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Several processes must end after the same step; they ask one another about this often, in seconds.
EVERY = 2.0


class StopRequest:
    """Takes note of SIGTERM and SIGUSR1 while it is entered; a second one does what it did before.

    Outside the main thread, which alone may handle signals, nothing is handled.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._before: dict[int, Any] = {}
        # When the processes last asked one another, after which step, and after which they do next.
        self._since, self._last, self._next = time.monotonic(), 0, 0
        self.name: str | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def asked(self, step: int) -> bool:
        """Tells, the same on all processes, whether one of them was asked to end before this step is over."""
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return self.name is not None
        if step < self._next:
            return False
        now = time.monotonic()
        spent = (now - self._since) / max(1, step - self._last)
        mine = torch.tensor([float(self.name is not None), spent], device=accelerator.device)
        asked, spent = accelerator.reduce(mine, "mean").tolist()  # the same everywhere, and so is what follows
        self._since, self._last, self._next = now, step, step + max(1, int(EVERY / spent))
        return asked > 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
