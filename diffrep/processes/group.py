"""Processes that work in step: Accelerate's view of them, and how to leave."""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from diffrep.errors import ConfigError


def state() -> PartialState:
    """Returns Accelerate's view of this process; creates the process group when a launcher asks for one.

    Raises:
        ConfigError: The processes were started apart, as `launch_apart` does, and would wait for one another for ever.
    """
    if "RANK" in os.environ and "MASTER_ADDR" not in os.environ and not torch.distributed.is_initialized():
        raise ConfigError(
            "RANK is set and MASTER_ADDR is not: these processes have nowhere to meet, and this work is done in step. "
            "Start it with --nproc, torchrun, 'accelerate launch' or 'diffrep slurm', or unset RANK for one process"
        )
    # PartialState, unlike Accelerator, does not look at the variable: each process would believe it is alone.
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    # Processes meet only at the end of an extraction, and one may be hours behind: torch's ten minutes are too short.
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def label(work: str) -> str:
    """Returns the text of a progress bar, which says how many processes share the work when there are several."""
    processes = state().num_processes
    return work if processes == 1 else f"{work} in {processes} processes"


def teardown(accelerator: Accelerator | None = None, *prepared: Any) -> None:
    """Leaves a run in step with the other processes.

    Every verb that called `state()` ends with it: a DDP wrapper alive at interpreter exit can abort a process whose
    work is done, so its references are dropped before the process group is destroyed. The caller must let go of its
    own references first.

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
    # Otherwise a second run in this process would inherit the first one's mixed precision.
    AcceleratorState._reset_state()


def abandon() -> None:
    """Forgets a run that has failed, without waiting for other processes, so that the next one can begin."""
    AcceleratorState._reset_state()
