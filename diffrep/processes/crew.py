"""Starting several processes of the command on this machine: in step through torchrun, or apart."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

from diffrep.processes.ranks import Worker, told
from diffrep.processes.signals import SIGNALS, handled

PASSED_ON = (*SIGNALS, signal.SIGINT)
# Of a process that did what a signal told it to, as a shell reports one that SIGTERM ended.
STOPPED = 128 + signal.SIGTERM
# How often, in all, a process that a signal has ended is started again.
RESTARTS = 3
# Seconds that processes have to give back what they have begun when another one has failed.
GRACE = 180.0
# Seconds that the first process has to say the same, when another one has failed: a mistake is told once.
SAME_MISTAKE = 2.0
POLL = 0.05  # seconds between two looks
LAST_WORDS = 4000  # bytes that are shown of what a failed process printed
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def launch(processes: int, words: list[str]) -> int:
    """Runs `diffrep WORDS` in several processes on this machine, which work in step, and returns the exit status.

    torchrun, because `accelerate launch --cpu --num_processes N` runs one process and says nothing. SIGTERM and
    SIGUSR1 reach the processes; torchrun then ends with status 1, whatever they made of it.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = step_environment(processes)
    # What torchrun passes on, and how long it waits for processes that save a checkpoint before they end.
    environment.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    environment.setdefault("PET_SHUTDOWN_TIMEOUT", "180")
    process = subprocess.Popen([*command, "-m", "diffrep", *words], env=environment)
    with handled((signal.SIGTERM, signal.SIGUSR1), lambda number, _: process.send_signal(number)):
        return process.wait()


def launch_apart(processes: int, words: Sequence[str]) -> int:
    """Runs `diffrep WORDS` in several processes on this machine, which need not know of each other.

    See `Crew` for what becomes of signals, of processes that die and of what they print. A process that is one of
    several itself, as a task of `srun` is, numbers its own after those of the ones before it.

    Returns:
        The exit status: 0 when all ended with 0, else that of the first that failed.
    """
    return Crew([sys.executable, "-m", "diffrep", *words], apart(processes)).run()


def apart(processes: int) -> list[dict[str, str]]:
    """Returns the variables of each of several processes that number themselves and form no group."""
    outer, environments = told() or Worker(), []
    for index in range(processes):
        environment = shared_environment(processes)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        environment["RANK"] = str(outer.rank * processes + index)
        environment["WORLD_SIZE"] = str(outer.world * processes)
        environment["LOCAL_RANK"] = str(outer.local_rank * processes + index)
        environment["LOCAL_WORLD_SIZE"] = str(processes)
        environments.append(environment)
    return environments


def shared_environment(processes: int) -> dict[str, str]:
    """Returns this process's variables for one of several on this machine, with its share of the cores."""
    environment = dict(os.environ)
    # A scheduler may have given this job some of the machine's cores.
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    return environment


def step_environment(processes: int) -> dict[str, str]:
    """Returns the same for processes that work in step."""
    import torch

    environment = shared_environment(processes)
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"  # or each would believe that it is alone
    return environment


class Crew:
    """Processes of one command, of which any may die.

    SIGTERM, SIGUSR1, SIGUSR2 and SIGINT are passed on to all. A process that a signal ended which did not come through
    here (out of memory, a crash in a library) is started again, `restarts` times in all, while the others go on. One
    that fails by itself ends the others with SIGTERM. The first process prints as usual; what another one prints is
    kept, and shown when it fails and the first one does not fail likewise. All die with this process.

    Args:
        command: What each of them runs.
        environments: The variables of each.
        restarts: How often, in all, one is started again.

    Attributes:
        stopped: The first signal that was passed on; None while there was none.
    """

    def __init__(self, command: list[str], environments: list[dict[str, str]], restarts: int = RESTARTS):
        self.command, self.restarts = command, restarts
        self.stopped: signal.Signals | None = None
        self._members = [_Member(index, environment) for index, environment in enumerate(environments)]

    def run(self) -> int:
        """Runs the processes until all have ended.

        Returns:
            0 when all ended with 0, else the status of the first that failed, 128 + N for one that signal N ended.
        """
        with handled(PASSED_ON, self._pass_on):
            try:
                for member in self._members:
                    self._start(member)
                failed = self._watch()
            finally:
                for member in self._members:
                    member.kill()
        if failed is None:
            return 0
        if failed.own_fault and self._members[0].status != failed.status:
            failed.show()
        return failed.status if failed.status > 0 else 128 - failed.status

    def _watch(self) -> _Member | None:
        """Returns the first process that failed, when all have ended."""
        failed, deadline = None, float("inf")
        while running := [member for member in self._members if member.status is None]:
            time.sleep(POLL)
            for member in running:
                if not member.has_ended() or member.status == 0 or failed is not None or self._restart(member):
                    continue
                failed = member
                if self.stopped is None:  # else they have been told, and the scheduler sets the deadline
                    if member.own_fault:
                        self._members[0].wait(SAME_MISTAKE)
                    self._send(signal.SIGTERM)
                    deadline = time.monotonic() + GRACE
            if time.monotonic() > deadline:
                self._send(signal.SIGKILL)
        return failed

    def _start(self, member: _Member) -> None:
        member.start(self.command)
        if self.stopped is not None:  # it came while this one was on its way
            member.process.send_signal(signal.SIGTERM)

    def _restart(self, member: _Member) -> bool:
        """Starts a process again when it should be."""
        if self.stopped is not None or member.own_fault:
            return False
        again, self.restarts = self.restarts > 0, self.restarts - 1
        rest = f"it is started again, {self.restarts} more times at most" if again else "all are told to end"
        text = f"diffrep: process {member.index} was ended by {member.ended_by}, as when memory is short; {rest}"
        print(f"\n{text}", file=sys.stderr, flush=True)  # on a line of its own, behind a bar
        member.show()
        if again:
            self._start(member)
        return again

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stopped = self.stopped or signal.Signals(number)
        self._send(number)

    def _send(self, number: int) -> None:
        for member in self._members:
            if member.process is not None and member.status is None:
                member.process.send_signal(number)


class _Member:
    """One process of a crew; the first one prints where this process does, the others to a file."""

    def __init__(self, index: int, environment: dict[str, str]):
        self.index, self.environment = index, environment
        self.process: subprocess.Popen[bytes] | None = None
        self.status: int | None = None
        self._kept: IO[bytes] | None = None

    @property
    def own_fault(self) -> bool:
        """Whether it ended by itself, not by a signal."""
        return self.status > 0 and self.status != STOPPED

    @property
    def ended_by(self) -> str:
        """Name of the signal that ended it."""
        return signal.Signals(-self.status if self.status < 0 else signal.SIGTERM).name

    def start(self, command: list[str]) -> None:
        parent, self.status = os.getpid(), None
        if self.index > 0:
            self._kept = tempfile.TemporaryFile()  # noqa: SIM115 - it is read when the process has ended
        self.process = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self._kept,
            stderr=self._kept,
            process_group=0,  # or Ctrl-C would reach it twice, from the terminal and from here
            preexec_fn=lambda: _die_with(parent),
        )

    def has_ended(self) -> bool:
        self.status = self.process.poll()
        return self.status is not None

    def wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.has_ended() and time.monotonic() < until:
            time.sleep(POLL)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def show(self) -> None:
        """Prints the end of what was kept."""
        if self._kept is None:
            return
        self._kept.seek(max(0, self._kept.seek(0, os.SEEK_END) - LAST_WORDS))
        print(self._kept.read().decode(errors="replace"), end="", file=sys.stderr, flush=True)


def _die_with(parent: int) -> None:
    """Lets this new process be killed when the one that started it dies, however it dies."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was dead already
        os._exit(STOPPED)
