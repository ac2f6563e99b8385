"""Who a process is among those that share work through claims, without a process group."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from diffrep.errors import ConfigError

# From here on SLURM numbers steps that no `srun` of the user started: of the batch script, of a shell, of logins.
NO_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Worker:
    """One of several processes.

    Attributes:
        rank: Its number among all of them.
        world: How many they are meant to be; fewer or more do no harm, since work is taken through claims.
        local_rank: Its number among those of its machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def worker() -> Worker:
    """Returns who this process is, and gives it its own GPU when a launcher has numbered the processes of its machine.

    Told by the process group when there is one, else by RANK, WORLD_SIZE and LOCAL_RANK (torchrun, accelerate), else
    by the variables of a step that `srun` has started. DIFFREP_RANK and DIFFREP_WORLD number whole groups of such
    processes: the tasks of a job array. No process group is made.

    Raises:
        ConfigError: The variables make no sense.
    """
    import torch

    inner = told()
    if inner is not None and torch.cuda.is_available():
        torch.cuda.set_device(inner.local_rank % torch.cuda.device_count())
    inner = inner or Worker()
    if "DIFFREP_RANK" not in os.environ and "DIFFREP_WORLD" not in os.environ:
        return inner
    group, groups = _rank_and_world("DIFFREP_RANK", "DIFFREP_WORLD")
    return Worker(group * inner.world + inner.rank, groups * inner.world, inner.local_rank)


def told() -> Worker | None:
    """Returns who the launcher says this process is, job arrays left out; None when there was none.

    Raises:
        ConfigError: The variables make no sense.
    """
    torch = sys.modules.get("torch")  # a process that has not loaded it is in no group
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return Worker(torch.distributed.get_rank(), torch.distributed.get_world_size(), _number("LOCAL_RANK", 0))
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return Worker(*_rank_and_world("RANK", "WORLD_SIZE"), _number("LOCAL_RANK", 0))
    if _in_a_step():
        # A step may be smaller than the job, whose size SLURM_NTASKS gives to steps of old versions.
        world = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        return Worker(*_rank_and_world("SLURM_PROCID", world), _number("SLURM_LOCALID", 0))
    return None


def _in_a_step() -> bool:
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < NO_STEP


def _rank_and_world(rank: str, world: str) -> tuple[int, int]:
    values = _number(rank), _number(world)
    if values[0] >= values[1]:
        raise ConfigError(
            f"{rank}={values[0]} and {world}={values[1]} do not go together: {world} processes are numbered from 0; "
            "mend what starts them, or unset both for a single process"
        )
    return values


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        given = f"{name}={text}" if name in os.environ else f"{name} is not set"
        raise ConfigError(
            f"{given}, where a launcher gives each process a number from 0; mend what starts this process, or unset "
            "RANK, WORLD_SIZE and LOCAL_RANK (DIFFREP_RANK and DIFFREP_WORLD in a job array) for a single process"
        )
    return int(text)
