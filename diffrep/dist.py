"""Processes: who am I, how many are we, and how to leave."""

from __future__ import annotations

import gc
from typing import Any

from accelerate import Accelerator, PartialState


def state() -> PartialState:
    """Returns Accelerate's view of this process; creates the process group when a launcher asks for one."""
    return PartialState()


def teardown(accelerator: Accelerator | None = None, *prepared: Any) -> None:
    """Leaves a run in step with the other processes.

    Every verb ends with it: a DDP wrapper alive at interpreter exit can abort a process whose work is done, so its
    references are dropped before the process group is destroyed. The caller must let go of its own references first.

    Args:
        accelerator: The run's accelerator; None for runs that only use `state()`.
        prepared: Objects that `accelerator.prepare` returned.
    """
    if accelerator is not None:
        accelerator.free_memory(*prepared)
    del prepared
    gc.collect()
    current = PartialState()
    current.wait_for_everyone()
    if accelerator is not None:
        accelerator.end_training()
    current.destroy_process_group()
