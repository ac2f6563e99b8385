import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from diffrep import ExtractConfig, ExtractJob, FeatureStore
from diffrep.cli import main
from diffrep.cli.words import read_config
from diffrep.cluster import Allocation, Task, submit, wait
from diffrep.errors import BackendUnavailable, ConfigError
from diffrep.store import Claims, StoreWriter

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))


def words_of(folder, images, out):
    request = ["request.layers=mid_block", "request.levels=[100]", "request.pool=mean"]
    return [f"backbone={folder}", f"data={images}", f"out={out}", "unit_size=4", "batch_size=2", *request]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_bash_and_come_back(script):
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    for line in ("#SBATCH --requeue", "#SBATCH --signal=TERM@", "set -euo pipefail", "scontrol requeue"):
        assert line in text
    verb = script.name.partition("_")[0]
    assert re.search(rf'diffrep {verb} "\$@"', text)


def test_a_dry_run_prints_what_sbatch_would_get(unet_folder, image_folder, tmp_path, capsys):
    words = words_of(unet_folder, image_folder, tmp_path / "store")
    asked = ["--array", "8", "--at-once", "4", "--gpus-per-node", "4", "--cpus", "6", "--partition", "gpu"]
    more = ["--sbatch", "account=me", "--sbatch", "exclusive", "--setup", "module load cuda"]
    assert main(["slurm", "extract", *words, *asked, *more, "--dry-run", "--folder", str(tmp_path / "slurm")]) == 0
    lines = capsys.readouterr().out.splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")}
    assert options == {
        "job-name=diffrep-extract", "time=60", "nodes=1", "gpus-per-node=4", "ntasks-per-node=1", "cpus-per-task=24",
        "partition=gpu", "array=0-7%4", "signal=USR2@120", "requeue", "account=me", "exclusive",
    }  # fmt: skip
    assert lines[-2:] == [
        "module load cuda",
        f"8 tasks of 1 x 4 processes: {shlex.join(['diffrep', 'extract', *words])}",
    ]
    assert not (tmp_path / "slurm").exists()


def test_work_in_step_is_a_task_for_each_process():
    parameters = Allocation("name", nodes=2, gpus=4, processes=4, cores=6).parameters(apart=False)
    assert parameters["tasks_per_node"] == 4
    assert parameters["cpus_per_task"] == 6
    assert parameters["slurm_srun_args"] == ["--cpus-per-task=6", "--kill-on-bad-exit=1"]
    assert "slurm_array_parallelism" not in parameters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extract", "request.layers=nowhere"], r"nowhere"),
        (["extract", "batch=3"], r"batch: unknown key; did you mean 'batch_size'\?"),
        (["probe", "--array", "2"], "probe is one job and no array; give it --nodes, and leave --array out"),
        (["correspond", "match"], "correspond needs one of the actions evaluate, train behind it, got 'match'"),
        (["extract", "--sbatch=--account=me"], "'--account=me' is no option of sbatch"),
        (
            ["extract", "--nodes", "2", "--cluster", "local"],
            "cluster local is this one machine, and 2 nodes are asked",
        ),
        (["extract", "--setup", "x", "--cluster", "local"], "cluster local works in this very environment"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(unet_folder, image_folder, tmp_path, capsys, words, message):
    given = words_of(unet_folder, image_folder, tmp_path / "store") if words[0] == "extract" else []
    pytest.importorskip("submitit")
    assert main(["slurm", *words[:1], *given, *words[1:], "--folder", str(tmp_path / "slurm")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.pkl"))


def test_a_missing_package_or_cluster_is_named(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        with pytest.raises(BackendUnavailable, match=r"pip install 'diffrep\[slurm\]', or take the batch scripts"):
            submit([Task(("ls",))], Allocation("name"), tmp_path, "slurm")
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendUnavailable, match='detect "srun".*or take --cluster local'):
        submit([Task(("ls",))], Allocation("name"), tmp_path, "slurm")


def test_sbatch_may_refuse(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    for name, code in {"srun": "exit 0", "sbatch": "echo 'invalid partition: nowhere' >&2; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="SLURM refuses the job: .*invalid partition: nowhere"):
        submit([Task(("ls",))], Allocation("name", partition="nowhere"), tmp_path / "slurm", "slurm")


@pytest.mark.mp
def test_a_failed_task_is_named_with_its_reason(tmp_path, capsys):
    pytest.importorskip("submitit")
    jobs = submit([Task(("validate", "extract", "nonsense=1"))], Allocation("name", gpus=0), tmp_path, "local")
    assert not wait(jobs, "local")
    out = capsys.readouterr().out
    assert f"{jobs[0].job_id} failed; see {jobs[0].paths.stderr}\n  diffrep validate: error: " in out


def wait_for(condition, seconds=200):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.05)
    return found


def preempt(logs, ready):
    """Tells the first of two tasks that its machine is wanted, as SLURM would, and waits until it is queued again."""
    wait_for(ready)
    first = wait_for(lambda: [path for path in logs.glob("*_0_log.err") if "in 2 processes" in path.read_text()])[0]
    task = first.name.partition("_")[0]
    (process,) = psutil.Process(int(task)).children()
    process.send_signal(signal.SIGUSR2)
    wait_for(lambda: f"Requeued job {task}" in (logs / f"{task}_0_log.out").read_text())
    assert "stopped by SIGUSR2" in (logs / f"{task}_0_log.err").read_text()


@pytest.mark.mp
@pytest.mark.slow
def test_an_array_extracts_and_a_preempted_task_comes_back(unet_folder, image_folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, logs = tmp_path / "store", tmp_path / "slurm"
    words = words_of(unet_folder, image_folder, out)
    job = ExtractJob(read_config(ExtractConfig, words))
    mine = Claims(StoreWriter(out, job.meta()).place, job.units, lease=300)
    held = mine.take()  # so no task can end before it is told

    def disturb():
        try:
            preempt(logs, lambda: len(list(out.glob("units/*/[0-9]*.json"))) == len(job.units) - 1)
            done.append(True)
        finally:
            mine.release(held.number)

    done = []
    other = threading.Thread(target=disturb)
    other.start()
    local = ["--array", "2", "--gpus-per-node", "0", "--cluster", "local", "--wait", "--folder", str(logs)]
    assert main(["slurm", "extract", *words, *local]) == 0
    other.join()
    assert done
    assert capsys.readouterr().out.count("ended well") == 2
    store = FeatureStore(out)
    assert len(set(store.ids)) == len(store) == len(job.images)
    assert store.verify() == []
    assert not (out / "claims").exists()
