"""Runs of `diffrep train` that end before their end, as a user's or a scheduler's do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from diffrep import run_train
from diffrep.config import DataConfig, TrainConfig, to_yaml
from diffrep.testing import TINY_OFFICIAL

STEPS = 12


def settings(image_folder, out, **changes):
    args = {name: value for name, value in TINY_OFFICIAL["sit"].items() if name != "learn_sigma"}
    given = {
        "model": {"kind": "repa", "args": args | {"in_channels": 1, "input_size": 16, "num_classes": 3}},
        "align": {"own": {"preset": "sra", "layers": "blocks.0", "width": 16}},
        "data": DataConfig(path=image_folder, splits="train"),
        "out": out,
        "steps": STEPS,
        "batch_size": 4,
        "warmup": 2,
        "decay": "none",  # which alone does not depend on the number of steps
        "checkpoint_every": 3,
        "log_every": 1,
        "flip": True,
    }
    return TrainConfig(**given | changes)


def start(file, out, *words):
    command = [sys.executable, "-m", "diffrep", "train", str(file), f"out={out}", *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)


def logged(run):
    """The last step in a run's log, 0 without any."""
    lines = (run / "log.jsonl").read_text().split("\n")[:-1] if (run / "log.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def same_run(a, b, steps=STEPS):
    """Compares the results and all that the last checkpoints hold, bit for bit."""
    last = f"checkpoints/step-{steps:07d}"
    for name in ("model/model.safetensors", f"{last}/model.safetensors", f"{last}/ema.safetensors"):
        one, two = (load_file(run / name) for run in (a, b))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
    for name in ("loss", "grad_norm", "denoise", "align/own/blocks.0"):
        logs = [[json.loads(line)[name] for line in (run / "log.jsonl").read_text().splitlines()] for run in (a, b)]
        assert logs[0] == logs[1], name


@pytest.fixture
def file(image_folder, tmp_path):
    """The settings of a run."""
    file = tmp_path / "train.yaml"
    file.write_text(to_yaml(settings(image_folder, "unused")))
    return file


def undisturbed(image_folder, out, steps):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the other runs
    try:
        run_train(settings(image_folder, out, steps=steps))
    finally:
        torch.set_num_threads(threads)
    return out


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(image_folder, file, tmp_path):
    run = tmp_path / "run"
    # Steps enough that it is still at work when the signal comes.
    process = start(file, run, "steps=100000", "keep=100000")
    wait_for(lambda: (run / "checkpoints" / "step-0000006").is_dir(), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    # Whatever it had done by then, it is taken back to step 6.
    for folder in (run / "checkpoints").iterdir():
        if folder.name != "step-0000006":
            shutil.rmtree(folder)
    done = start(file, run)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert "resumed" in out and "at step 6" in out
    same_run(undisturbed(image_folder, tmp_path / "whole", STEPS), run)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_ends(image_folder, file, tmp_path, number):
    run = tmp_path / "run"
    process = start(file, run, "steps=100000", "checkpoint_every=100000")
    wait_for(lambda: logged(run) > 0, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "stopped at step" in out and "model:" not in out
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert f"stopped at step {step};" in out
    assert logged(run) == step
    done = start(file, run, f"steps={step + 3}")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    same_run(undisturbed(image_folder, tmp_path / "whole", step + 3), run, step + 3)


@pytest.mark.mp
@pytest.mark.slow
def test_signals_reach_every_process(image_folder, file, tmp_path, two_processes):
    """Under torchrun, which passes them on (SIGUSR1 because it is told to) and then ends with status 1."""
    run = tmp_path / "run"
    process = start(file, run, "steps=100000", "checkpoint_every=100000", "keep=1", "--nproc", "2")
    wait_for(lambda: logged(run) > 0, process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    (saved,) = (run / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert step > 0
    assert f"stopped at step {step};" in out and "model:" not in out
    assert logged(run) == step
    done = two_processes.run("train", file, f"out={run}", f"steps={step + 3}")
    assert done.codes == [0, 0], done.err
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 4))
