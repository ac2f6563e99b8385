"""Signals that ask a run in step to save and end: what schedulers send before they take a machine away."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator

from diffrep.dist import StopSignal

# Several processes must end after the same step; they ask one another about this often, in seconds.
EVERY = 2.0


class StopRequest(StopSignal):
    """A `StopSignal` of one process that all processes of a run see.

    Args:
        accelerator: Of the run.
    """

    def __init__(self, accelerator: Accelerator):
        super().__init__()
        self._accelerator = accelerator
        # When the processes last asked one another, after which step, and after which they do next. A run that goes on
        # begins at any step.
        self._asked, self._next = time.monotonic(), 0
        self._last: int | None = None

    def asked(self, step: int) -> bool:
        """Tells, the same on all processes, whether one of them was asked to end before this step is over."""
        accelerator = self._accelerator
        if accelerator.num_processes == 1:
            return self.name is not None
        if step < self._next:
            return False
        now = time.monotonic()
        spent = (now - self._asked) / (1 if self._last is None else step - self._last)
        mine = torch.tensor([float(self.name is not None), spent], device=accelerator.device)
        asked, spent = accelerator.reduce(mine, "mean").tolist()  # the same everywhere, and so is what follows
        self._asked, self._last, self._next = now, step, step + max(1, int(EVERY / spent))
        return asked > 0
