"""Verbs as jobs of a SLURM cluster: what is asked of it, what a task does, and how it comes back when taken away.

submitit writes the batch script and starts `Task` on the machines. A task runs the verb in processes of their own, so
that these can end what they have begun when SLURM wants the machine back; then it has submitit put the job back into
the queue. An extraction takes its units through claims and the other verbs resume, so nothing else need be kept.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from diffrep.errors import BackendUnavailable, ConfigError

Cluster = Literal["slurm", "local", "debug"]
# Names of submitit's parameters whose sbatch options are called otherwise.
SBATCH = {"name": "job-name", "timeout_min": "time", "mem_gb": "mem", "tasks_per_node": "ntasks-per-node"}
# Seconds in which SLURM ends the tasks of a job that it takes back.
TAKEN_BACK = 120
# Seconds between two looks at jobs that are waited for.
LOOK = {"slurm": 15.0, "local": 0.2, "debug": 0.0}
LAST_LINES = 5  # of a failed task's errors


@dataclass(frozen=True)
class Allocation:
    """What a job asks of the cluster.

    Attributes:
        name: Of the job.
        minutes: That it may take before it must go back into the queue.
        nodes: Machines of the job; of an array, of each task.
        gpus: GPUs of each machine.
        processes: Processes on each machine.
        array: Independent jobs of the same work.
        at_once: How many of them may run at a time; None for all.
        cores: CPU cores of each process; None leaves it to the cluster.
        memory: GB of each machine; None leaves it to the cluster.
        partition: Where to queue; None for the cluster's default.
        grace: Seconds between the signal and the end of the time.
        timeouts: How often a task that ran out of time goes back into the queue; preemptions are not counted.
        setup: Lines of shell before the work, such as "module load cuda".
        options: Other options of sbatch, by name.
    """

    name: str
    minutes: int = 60
    nodes: int = 1
    gpus: int = 1
    processes: int = 1
    array: int = 1
    at_once: int | None = None
    cores: int | None = None
    memory: float | None = None
    partition: str | None = None
    grace: int = 120
    timeouts: int = 10
    setup: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)

    def parameters(self, apart: bool) -> dict[str, Any]:
        """Returns submitit's parameters.

        Args:
            apart: One task on each machine starts all of its processes, in place of a task for each.
        """
        tasks, cores = (1, self.processes) if apart else (self.processes, 1)
        cores = None if self.cores is None else self.cores * cores
        # srun does not take it from the job; and one dead process of a group is the end of all.
        srun = [] if cores is None else [f"--cpus-per-task={cores}"]
        given = {
            "name": self.name,
            "timeout_min": self.minutes,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus or None,
            "tasks_per_node": tasks,
            "cpus_per_task": cores,
            "mem_gb": self.memory,
            "slurm_partition": self.partition,
            "slurm_array_parallelism": (self.at_once or self.array) if self.array > 1 else None,
            "slurm_signal_delay_s": self.grace,
            "slurm_setup": list(self.setup) or None,
            "slurm_srun_args": (srun if apart else [*srun, "--kill-on-bad-exit=1"]) or None,
            "slurm_additional_parameters": {"requeue": True, **self.options},
        }
        return {name: value for name, value in given.items() if value is not None}

    def text(self, apart: bool) -> str:
        """Returns the options that sbatch would get, in lines."""
        options: dict[str, Any] = {}
        for name, value in self.parameters(apart).items():
            if name == "slurm_additional_parameters":
                options |= value
            elif name == "slurm_signal_delay_s":
                options["signal"] = f"USR2@{value}"
            elif name == "slurm_array_parallelism":
                options["array"] = f"0-{self.array - 1}%{min(value, self.array)}"
            elif name == "mem_gb":
                options["mem"] = f"{value:g}GB"
            elif name not in ("slurm_setup", "slurm_srun_args"):
                options[SBATCH.get(name, name.removeprefix("slurm_").replace("_", "-"))] = value
        lines = [f"#SBATCH --{name}" + ("" if value is True else f"={value}") for name, value in options.items()]
        return "\n".join([*lines, *self.setup])


@dataclass(frozen=True)
class Task:
    """What runs on a machine: `diffrep WORDS` in one process or several.

    Args:
        words: The verb's.
        processes: How many this task starts.
        apart: They take work through claims; else this is one process of a group, one of each task.
        index: Number of this task in its array.
        array: Tasks of the array.
    """

    words: tuple[str, ...]
    processes: int = 1
    apart: bool = True
    index: int = 0
    array: int = 1

    def __call__(self) -> None:
        """Runs the verb.

        Raises:
            RuntimeError: It ended with another status than 0.
        """
        from diffrep.processes.crew import RESTARTS, Crew, apart, step_environment

        if self.apart:
            os.environ |= {"DIFFREP_RANK": str(self.index), "DIFFREP_WORLD": str(self.array)}
            environments, restarts = apart(self.processes), RESTARTS
        else:
            submitit = _submitit()
            # Every process sees all GPUs of its machine and takes the one of its local rank.
            group = submitit.helpers.TorchDistributedEnvironment()
            group = group.export(set_cuda_visible_devices=False, overwrite=True)
            environments, restarts = [step_environment(group.local_world_size)], 0
        crew = Crew([sys.executable, "-m", "diffrep", *self.words], environments, restarts)
        status = crew.run()
        # What takes units through claims says with its status that all are there; the other verbs do not.
        if crew.stopped not in (None, signal.SIGINT) and not (self.apart and status == 0):
            self._come_back()
        if status:
            raise RuntimeError(f"'diffrep {shlex.join(self.words)}' ended with status {status}; its output says why")

    def checkpoint(self) -> Any:
        """Returns what submitit is to start when the job comes back: the same; by now the processes have ended."""
        return _submitit().helpers.DelayedSubmission(self)

    def _come_back(self) -> None:
        """Has submitit put the job back into the queue and end this process, unless the job was cancelled."""
        number = getattr(signal, "SIG" + _submitit().JobEnvironment.USR_SIG)
        if not callable(signal.getsignal(number)) or _job_state() not in ("RUNNING", None):
            return
        # SLURM takes a job that ends by itself for complete, preempted or not. The handler is submitit's; it ends the
        # first task, and leaves the others to SLURM.
        signal.raise_signal(number)
        time.sleep(TAKEN_BACK)


def _job_state() -> str | None:
    """Returns what SLURM says of the job that this process belongs to; None outside of SLURM."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    command = ["scontrol", "show", "job", "--oneliner", os.environ["SLURM_JOB_ID"]]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"\bJobState=(\w+)", shown)
    return found[1] if found else "UNKNOWN"


def submit(tasks: list[Task], allocation: Allocation, folder: Path, cluster: Cluster) -> list[Any]:
    """Submits tasks, several as an array, and returns submitit's jobs.

    Args:
        tasks: What to run.
        allocation: What to ask for.
        folder: For scripts and logs; every machine must see it.
        cluster: "slurm", "local" for processes of this machine, "debug" for this very process.

    Raises:
        BackendUnavailable: submitit or SLURM is missing.
        ConfigError: SLURM or submitit refuses the parameters.
    """
    submitit = _submitit()
    if cluster != "slurm" and allocation.nodes > 1:
        raise ConfigError(f"cluster {cluster} is this one machine, and {allocation.nodes} nodes are asked for")
    if cluster != "slurm" and allocation.setup:
        raise ConfigError(f"cluster {cluster} works in this very environment; enter the lines of --setup before")
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=allocation.timeouts)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"{error}; submit from a machine of the cluster, or take --cluster local for processes of this one"
        ) from error
    with _outside_of_jobs(submitit):
        try:
            executor.update_parameters(**allocation.parameters(tasks[0].apart))
            with executor.batch():
                return [executor.submit(task) for task in tasks]
        except submitit.core.utils.FailedJobError as error:  # sbatch said no
            raise ConfigError(f"SLURM refuses the job: {str(error).strip()}") from error


def wait(jobs: list[Any], cluster: Cluster) -> bool:
    """Waits for jobs, tells of each how it ended, and returns whether all ended well."""
    left, gone, well = list(jobs), set(), True
    while left:
        for job in [job for job in left if job.done() or job.job_id in gone]:
            left.remove(job)
            good = job.done() and job.exception() is None
            well = well and good
            print(f"{job.job_id} ended well" if good else f"{job.job_id} failed; {_last_words(job)}", flush=True)
        if left:
            # What a killed task did not write, submitit asks of SLURM's accounting, which not all clusters have.
            gone = _gone(left) if cluster == "slurm" else set()
            time.sleep(LOOK[cluster])
    return well


def _gone(jobs: list[Any]) -> set[str]:
    """Returns the ids of the jobs that SLURM's queue no longer holds."""
    ids = {str(job.job_id) for job in jobs}
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(sorted(ids))}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return set()  # it does not answer now, which says nothing of the jobs
    return ids - set(answer.stdout.split())


def watching(jobs: list[Any], folder: Path, cluster: Cluster) -> str:
    """Returns how to follow and end jobs that were submitted, in lines."""
    names = list(dict.fromkeys(str(job.job_id).partition("_")[0] for job in jobs))
    look, end = ("squeue -j ", "scancel ") if cluster == "slurm" else ("ps -p ", "kill -INT ")
    together = look + ",".join(names), end + " ".join(names)
    logs = f"{folder}/{names[0]}*_log.err" if len(names) == 1 else f"{folder}/*_log.err"
    count = f"{len(jobs)} tasks" if len(jobs) > 1 else "1 task"
    return f"submitted {count}: {', '.join(names)}\nwatch     {together[0]}\nlogs      {logs}\nend       {together[1]}"


def _last_words(job: Any) -> str:
    """Names a failed task's log, and quotes what diffrep said in it, or else its end."""
    log = job.paths.stderr
    text = log.read_text(errors="replace") if log.exists() else ""
    told = re.findall(r"diffrep(?: \w+)?: .*", text) or text.splitlines()
    return "\n  ".join([f"see {log}", *told[-LAST_LINES:]])


@contextmanager
def _outside_of_jobs(submitit: ModuleType) -> Iterator[None]:
    """Hides the variables of the job that this process belongs to, if any, from those that it submits."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    # submitit hides these too: where the cluster's configuration lies, and the user's own defaults.
    kept = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or name.startswith("SBATCH_")}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def _submitit() -> ModuleType:
    try:
        import submitit
        import submitit.helpers
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            "'diffrep slurm' needs the submitit package: pip install 'diffrep[slurm]', or take the batch scripts of "
            "scripts/slurm"
        ) from error
    return submitit
