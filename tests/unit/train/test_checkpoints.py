import json
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from diffrep import run_train
from diffrep.config import DataConfig, TrainConfig
from diffrep.errors import CheckpointError

ARGS = {"input_size": 16, "patch_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2}


def config(image_folder, out, **changes):
    given = {
        "model": {"kind": "repa", "args": ARGS | {"num_classes": 3}},
        "data": DataConfig(path=image_folder, splits="train"),
        "out": out,
        "steps": 4,
        "batch_size": 4,
        "decay": "none",
        "checkpoint_every": 2,
        "log_every": 1,
        "keep": 1,
    }
    return TrainConfig(**given | changes)


@contextmanager
def room_for(size):
    """No file may grow beyond a size in bytes, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """A run that nothing has disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    run_train(config(image_folder, run))
    return run


def same_model(a, b):
    one, two = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin"])
def test_a_disk_that_is_full(image_folder, tmp_path, whole, file):
    """Each of these is the first file that does not fit."""
    run = tmp_path / "run"
    run_train(config(image_folder, run, steps=2))
    kept = run / "checkpoints" / "step-0000002"
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with room_for(len(before[file]) - 1000), pytest.raises(CheckpointError) as caught:
        run_train(config(image_folder, run))
    message = str(caught.value)
    assert f"cannot write the checkpoint of step 4 to {run / 'checkpoints'}" in message and "\n" not in message
    assert list((run / "checkpoints").iterdir()) == [kept], "nothing half done stays"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    run_train(config(image_folder, run))
    assert same_model(run, whole)


def test_a_run_without_a_checkpoint_begins_anew(image_folder, tmp_path, whole):
    run = tmp_path / "run"
    with room_for(10_000), pytest.raises(CheckpointError, match="cannot write the checkpoint of step 2"):
        run_train(config(image_folder, run))
    run_train(config(image_folder, run))
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert same_model(run, whole)


def test_a_disk_that_is_full_at_the_end(image_folder, tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "model")
    size = (whole / "model" / "model.safetensors").stat().st_size
    with (
        room_for(size - 1000),
        pytest.raises(CheckpointError, match="File too large; its checkpoints stay: make room"),
    ):
        run_train(config(image_folder, run))
    assert not (run / "model").exists(), "a model is there whole or not at all"
    run_train(config(image_folder, run))
    assert same_model(run, whole) and not (run / "partial-model").exists()
