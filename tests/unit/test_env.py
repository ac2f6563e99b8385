"""`diffrep env --check`: what a container's health check and a user on a new machine ask."""

import os
import subprocess
import sys
import time

import pytest
import torch

from diffrep.cli import main
from diffrep.cli.env import unfit_devices, unfit_packages
from diffrep.dist import Worker
from diffrep.extract.monitor import Monitor


def aged(file, seconds):
    file.write_text("diffrep_images_total 1\n")
    os.utime(file, (time.time() - seconds,) * 2)
    return file


def test_this_machine_can_work(capsys):
    assert main(["env", "--check"]) == 0
    assert capsys.readouterr().out == "ok\n"
    assert unfit_devices() == []


def test_packages_that_do_not_fit_are_named(tmp_path, monkeypatch):
    needs = "numpy<1", "torch>=1", "nothing-of-this-name>=2", "pip<1; extra == 'dev'"
    folder = tmp_path / "diffrep-9.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: diffrep", "Version: 9", *(f"Requires-Dist: {one}" for one in needs)]
    (folder / "METADATA").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    first, second = unfit_packages()
    assert first.startswith("numpy ") and first.endswith("is installed; <1 is needed")
    assert second == "nothing-of-this-name is not installed; >=2 is needed"


def test_a_job_that_goes_on_is_healthy(tmp_path, capsys):
    file = tmp_path / "run.prom"
    assert main(["env", "--check", "--monitor", str(file)]) == 1
    assert "run.prom is not there: no job has been given monitor=" in capsys.readouterr().out
    monitor = Monitor(3, 30, Worker(0, 1, 0), torch.device("cpu"), str(file), "store")
    monitor.close()
    assert main(["env", "--check", "--monitor", str(file)]) == 0
    os.utime(file, (time.time() - 1000,) * 2)
    assert main(["env", "--check", "--monitor", str(file)]) == 1
    assert "no progress for 1,000 s, and 300 s are allowed" in capsys.readouterr().out
    assert main(["env", "--monitor", str(file), "--max-age", "2000"]) == 0


@pytest.mark.parametrize(("name", "status"), [("run.prom.1", 0), ("run.prom.old", 1), ("run.promo.1", 1)])
def test_of_several_processes_the_newest_counts(tmp_path, name, status):
    aged(tmp_path / "run.prom.0", 5000)
    aged(tmp_path / name, 1)
    assert main(["env", "--check", "--monitor", str(tmp_path / "run.prom")]) == status


def test_asking_a_job_is_cheap(tmp_path):
    file = aged(tmp_path / "run.prom", 1)
    code = f"import sys; from diffrep.cli import main; status = main(['env', '--monitor', {str(file)!r}]); "
    subprocess.run([sys.executable, "-c", code + "sys.exit(status or 'torch' in sys.modules)"], check=True)
