"""Signals that ask a run to end: what schedulers send before they take a machine away."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Self

# SIGTERM comes with preemption, cancellation and `docker stop`; SIGUSR1 is what batch scripts ask SLURM for, SIGUSR2
# what submitit asks it for.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# A scheduler signals every process of a step, and a launcher passes on what it got: within these seconds it is one
# request, which reaches a process twice.
SAME_REQUEST = 5.0


class StopSignal:
    """Takes note of SIGTERM, SIGUSR1 and SIGUSR2 while it is entered; a second one does what it did before.

    A signal that follows within seconds is taken as the first one's echo. Outside the main thread, which alone may
    handle signals, nothing is handled.

    Attributes:
        name: Of the signal that came; None while there was none.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._handlers = ExitStack()

    def __enter__(self) -> Self:
        self._handlers.enter_context(handled(SIGNALS, self._take))
        return self

    def __exit__(self, *_: Any) -> None:
        self._handlers.close()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > SAME_REQUEST:
            self._handlers.close()
            signal.raise_signal(number)


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Gives signals a handler inside the block; outside the main thread, which alone may, nothing is handled."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
