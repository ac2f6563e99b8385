import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from diffrep import dist
from diffrep.errors import ConfigError
from diffrep.processes.crew import apart

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "DIFFREP_RANK", "DIFFREP_WORLD")
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A process that nobody has numbered."""
    for name in list(os.environ):
        if name in VARIABLES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def crew(code, *arguments, processes=2, **options):
    """Processes that import next to nothing, told apart by RANK."""
    command = [sys.executable, "-S", "-c", f"import os, sys, time, signal; rank = int(os.environ['RANK']); {code}"]
    environments = [{**os.environ, "RANK": str(rank)} for rank in range(processes)]
    return dist.Crew([*command, *map(str, arguments)], environments, **options)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (5, 8, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8"}, (5, 8, 0)),
        (STEP, (3, 4, 1)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "5"}, (3, 5, 1)),
        (STEP | TORCHRUN, (5, 8, 1)),
        (STEP | {"SLURM_STEP_ID": "4294967291"}, (0, 1, 0)),  # a batch script
        (STEP | {"SLURM_STEP_ID": "batch"}, (0, 1, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1, 0)),
        ({"DIFFREP_RANK": "2", "DIFFREP_WORLD": "3"}, (2, 3, 0)),
        (TORCHRUN | {"DIFFREP_RANK": "2", "DIFFREP_WORLD": "3"}, (21, 24, 1)),
        (STEP | {"DIFFREP_RANK": "0", "DIFFREP_WORLD": "3"}, (3, 12, 1)),
    ],
)
def test_who_a_process_is(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dist.worker() == dist.Worker(*expected)


@pytest.mark.gpu
def test_a_process_takes_the_gpu_of_its_number(monkeypatch):
    count = torch.cuda.device_count()
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": str(2 * count - 1)}.items():
        monkeypatch.setenv(name, value)
    dist.worker()
    assert torch.cuda.current_device() == count - 1
    torch.cuda.set_device(0)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4 do not go together"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK=one, where a launcher gives each process a number from 0"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1, where"),
        ({"WORLD_SIZE": "4"}, "RANK is not set, where"),
        ({"DIFFREP_RANK": "1"}, "DIFFREP_WORLD is not set, where"),
        ({"SLURM_STEP_ID": "1", "SLURM_PROCID": "2", "SLURM_NTASKS": "2"}, "SLURM_PROCID=2 and SLURM_NTASKS=2 do"),
    ],
)
def test_variables_that_make_no_sense(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        dist.worker()


def test_processes_that_were_started_apart_do_not_wait_for_one_another(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="RANK is set and MASTER_ADDR is not: these processes have nowhere to meet"):
        dist.state()


def test_what_starts_processes_does_not_load_torch():
    code = "import sys, diffrep.cluster; from diffrep import dist; dist.launch_apart, dist.StopSignal; "
    subprocess.run([sys.executable, "-c", f"{code} sys.exit('torch' in sys.modules)"], check=True)


@pytest.mark.parametrize("number", dist.SIGNALS)
def test_a_signal_is_noted_and_its_echo_ignored(number):
    before = signal.getsignal(number)
    with dist.StopSignal() as stop:
        assert stop.name is None
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # within seconds: the launcher passes on what came to all
        assert stop.name == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_later_signal_does_what_it_did_before(monkeypatch):
    monkeypatch.setattr("diffrep.processes.signals.SAME_REQUEST", 0.01)
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("before"))
    try:
        with dist.StopSignal() as stop:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.02)
            signal.raise_signal(signal.SIGUSR1)
            assert (stop.name, seen) == ("SIGTERM", ["before"])
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_threads_handle_no_signals():
    def enter():
        with dist.StopSignal():
            assert signal.getsignal(signal.SIGTERM) == before
            done.append(True)

    before, done = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert done


def test_processes_apart_are_numbered(monkeypatch):
    for name, value in STEP.items():  # one of four tasks, each with two processes
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    made = apart(2)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [[one[name] for name in names] for one in made] == [["6", "8", "2", "2"], ["7", "8", "3", "2"]]
    assert all("MASTER_ADDR" not in one for one in made)


@pytest.mark.mp
def test_a_mistake_is_told_once(capfd):
    assert dist.launch_apart(3, ["validate", "extract", "nonsense=1"]) == 2
    assert capfd.readouterr().err.count("nonsense") == 1


@pytest.mark.mp
def test_a_process_that_a_signal_ends_is_started_again_while_the_others_go_on(tmp_path, capfd):
    code = "n = len(os.listdir(sys.argv[1])); open(f'{sys.argv[1]}/{n}-{rank}', 'w'); print('words of', rank);"
    code += "sys.stdout.flush(); rank == 1 and n < 3 and os.kill(os.getpid(), signal.SIGKILL)"
    assert crew(code, tmp_path).run() == 0
    assert sorted(path.name[-1] for path in tmp_path.iterdir())[:2] == ["0", "1"]
    out, err = capfd.readouterr()
    assert out == "words of 0\n"
    assert "process 1 was ended by SIGKILL, as when memory is short; it is started again" in err
    assert "words of 1" in err


@pytest.mark.mp
def test_restarts_have_an_end(tmp_path, capfd):
    code = "open(f'{sys.argv[1]}/{time.monotonic_ns()}', 'w') if rank else time.sleep(60);"
    code += "os.kill(os.getpid(), signal.SIGSEGV)"
    assert crew(code, tmp_path, restarts=2).run() == 128 + signal.SIGSEGV
    assert len(list(tmp_path.iterdir())) == 3
    assert capfd.readouterr().err.count("all are told to end") == 1


@pytest.mark.mp
@pytest.mark.parametrize("status", [1, 2])
def test_a_process_that_fails_ends_the_others(capfd, monkeypatch, status):
    monkeypatch.setattr("diffrep.processes.crew.SAME_MISTAKE", 0.1)
    code = f"rank != 1 and time.sleep(60); print('reason', file=sys.stderr); sys.exit({status})"
    began = time.monotonic()
    assert crew(code, processes=3).run() == status
    assert time.monotonic() - began < 10
    assert capfd.readouterr().err == "reason\n"


@pytest.mark.mp
@pytest.mark.parametrize("number", [*dist.SIGNALS, signal.SIGINT])
def test_signals_are_passed_on(tmp_path, number):
    code = f"signal.signal({int(number)}, lambda *_: sys.exit(143)); open(f'{{sys.argv[1]}}/{{rank}}', 'w');"
    code += "time.sleep(60)"
    processes = crew(code, tmp_path)

    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send).start()
    assert processes.run() == 143
    assert processes.stopped == number
    assert signal.getsignal(number) == before


@pytest.mark.mp
def test_the_processes_die_with_the_one_that_started_them(tmp_path):
    parent = os.fork()
    if not parent:
        try:
            crew("open(f'{sys.argv[1]}/{os.getpid()}', 'w'); time.sleep(60)", tmp_path).run()
        finally:
            os._exit(0)
    while len(pids := [path.name for path in tmp_path.iterdir()]) < 2:
        assert os.waitpid(parent, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until = time.monotonic() + 10
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < until, "a process outlived its parent"
        time.sleep(0.01)
