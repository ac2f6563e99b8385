"""Processes: who am I, how many are we, and how to leave."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState


def state() -> PartialState:
    """Returns Accelerate's view of this process; creates the process group when a launcher asks for one."""
    # PartialState, unlike Accelerator, does not look at the variable: each process would believe it is alone.
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    # Processes meet only at the end of an extraction, and one may be hours behind: torch's ten minutes are too short.
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def label(work: str) -> str:
    """Returns the text of a progress bar, which says how many processes share the work when there are several."""
    processes = state().num_processes
    return work if processes == 1 else f"{work} in {processes} processes"


def launch(processes: int, words: list[str]) -> int:
    """Runs `diffrep WORDS` in several processes on this machine and returns the exit status.

    torchrun, because `accelerate launch --cpu --num_processes N` runs one process and says nothing. SIGTERM and
    SIGUSR1 reach the processes; torchrun then ends with status 1, whatever they made of it.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"  # or torchrun gives runs of one process each
    # What torchrun passes on, and how long it waits for processes that save a checkpoint before they end.
    environment.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    environment.setdefault("PET_SHUTDOWN_TIMEOUT", "180")
    process = subprocess.Popen([*command, "-m", "diffrep", *words], env=environment)
    with _passed_on(process):
        return process.wait()


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Passes SIGTERM and SIGUSR1 on to a process; the main thread alone may handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda got, _: process.send_signal(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    # Otherwise a second run in this process would inherit the first one's mixed precision.
    AcceleratorState._reset_state()


def abandon() -> None:
    """Forgets a run that has failed, without waiting for other processes, so that the next one can begin."""
    AcceleratorState._reset_state()
