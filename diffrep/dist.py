"""Processes: who am I, how many are we, how they are started, and how to leave.

The names load on first use: what only starts processes, and waits for days, need not hold torch in memory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffrep.processes.crew import Crew, launch, launch_apart
    from diffrep.processes.group import abandon, label, state, teardown
    from diffrep.processes.ranks import Worker, worker
    from diffrep.processes.signals import SIGNALS, StopSignal

_HOMES = {
    "group": ("abandon", "label", "state", "teardown"),
    "crew": ("Crew", "launch", "launch_apart"),
    "ranks": ("Worker", "worker"),
    "signals": ("SIGNALS", "StopSignal"),
}

__all__ = [
    "SIGNALS",
    "Crew",
    "StopSignal",
    "Worker",
    "abandon",
    "label",
    "launch",
    "launch_apart",
    "state",
    "teardown",
    "worker",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"diffrep.processes.{home}"), name)
    raise AttributeError(f"module 'diffrep.dist' has no attribute {name!r}")
