import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffrep import load_backbone, run_train
from diffrep.config import DataConfig, ModelConfig, TrainConfig
from diffrep.errors import CheckpointError, ConfigError, DiffrepError
from diffrep.testing import TINY
from diffrep.train.order import StepBatches


def config(image_folder, out, **changes):
    given = {
        "model": ModelConfig(args=TINY["unet2d"][1]),
        "data": DataConfig(path=image_folder, splits="train"),
        "out": out,
        "steps": 6,
        "batch_size": 4,
        "warmup": 2,
        "checkpoint_every": 2,
        "log_every": 2,
        "flip": True,
        **changes,
    }
    return TrainConfig(**given)


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_can_be_loaded_and_is_repeatable(image_folder, tmp_path):
    first = run_train(config(image_folder, tmp_path / "a"))
    second = run_train(config(image_folder, tmp_path / "b"))
    assert same(weights(first), weights(second))
    other = run_train(config(image_folder, tmp_path / "c", seed=1))
    assert not same(weights(first), weights(other))
    backbone = load_backbone(first, device="cpu")
    assert len(backbone.blocks()) == 5
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert len(list((tmp_path / "a" / "checkpoints").iterdir())) == 2, "older checkpoints go"


def test_resume_is_exact(image_folder, tmp_path):
    whole = run_train(config(image_folder, tmp_path / "whole"))
    run = tmp_path / "cut"
    run_train(config(image_folder, run))
    # Back to the state after step 4, as if the run had been killed in step 5 while writing.
    shutil.rmtree(run / "checkpoints" / "step-0000006")
    shutil.rmtree(run / "model")
    (run / "checkpoints" / "partial-0000006").mkdir()
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    resumed = run_train(config(image_folder, run))
    assert same(weights(whole), weights(resumed))
    assert (run / "log.jsonl").read_text().count('"step": 6') == 1
    results = json.loads((run / "results.json").read_text())
    run_train(config(image_folder, run))
    assert json.loads((run / "results.json").read_text()) == results, "a finished run has nothing to add"
    assert not list(run.rglob("custom_checkpoint*")), "nothing that would be read back as a pickle with code"


def test_a_checkpoint_that_cannot_be_written(image_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint of step 2"):
        run_train(config(image_folder, tmp_path / "run"))


def test_a_damaged_checkpoint_and_unnamed_splits(image_folder, tmp_path):
    run_train(config(image_folder, tmp_path / "run", steps=2))
    file = tmp_path / "run" / "checkpoints" / "step-0000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="delete it to go on"):
        run_train(config(image_folder, tmp_path / "run", steps=2))
    with pytest.raises(ValueError, match="data.splits must name"):
        config(image_folder, tmp_path / "other", data=DataConfig(path=image_folder))


@pytest.mark.gpu
def test_resume_on_cuda(image_folder, tmp_path):
    """Close, not equal: cuDNN's backward adds up in no fixed order."""
    whole = weights(run_train(config(image_folder, tmp_path / "whole", mixed_precision="no")))
    run = tmp_path / "run"
    run_train(config(image_folder, run, mixed_precision="no"))
    shutil.rmtree(run / "checkpoints" / "step-0000006")
    resumed = weights(run_train(config(image_folder, run, mixed_precision="no")))
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-3, rtol=1e-2)


def test_the_exported_weights_are_the_average(image_folder, tmp_path):
    averaged = weights(run_train(config(image_folder, tmp_path / "a", ema=0.9)))
    last = load_file(tmp_path / "a" / "checkpoints" / "step-0000006" / "model.safetensors")
    last = {name.removeprefix("network."): tensor for name, tensor in last.items()}
    assert not same(averaged, last)
    half = weights(run_train(config(image_folder, tmp_path / "b", export_dtype="float16")))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_training_lowers_the_loss(image_folder, tmp_path):
    run_train(
        config(image_folder, tmp_path / "run", steps=60, lr=3e-3, log_every=20, checkpoint_every=60, batch_size=8)
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_a_folder_of_another_run_is_refused(image_folder, tmp_path):
    run_train(config(image_folder, tmp_path / "run", steps=2))
    with pytest.raises(ConfigError, match="lr: 0.001 there, 0.5 now"):
        run_train(config(image_folder, tmp_path / "run", steps=2, lr=0.5))
    run_train(config(image_folder, tmp_path / "run", steps=2, log_every=1, keep=1))


def test_a_loss_that_is_not_finite_stops_the_run(image_folder, tmp_path):
    with pytest.raises(DiffrepError, match="the loss is nan|the loss is inf"):
        run_train(config(image_folder, tmp_path / "run", lr=1e30, clip=1e30, steps=20, warmup=0))


def test_every_sample_once_an_epoch_on_any_number_of_processes():
    whole = [row for rows, _ in StepBatches(10, 4, seed=3, first=0, last=5) for row in rows]
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10))
    assert whole[:10] != whole[10:20]
    ranks = [list(StepBatches(10, 4, 3, 0, 5, rank, 2, flip=True)) for rank in range(2)]
    together = [(a + b, f + g) for (a, f), (b, g) in zip(*ranks, strict=True)]
    assert together == list(StepBatches(10, 4, 3, 0, 5, flip=True))
    assert [rows for rows, _ in together] == [whole[i : i + 4] for i in range(0, 20, 4)]
    assert list(StepBatches(10, 4, 3, first=2, last=5, flip=True)) == together[2:]
    mirrored = [flag for _, flags in StepBatches(10, 40, 0, 0, 50, flip=True) for flag in flags]
    assert abs(np.mean(mirrored) - 0.5) < 0.05
    assert not any(flag for _, flags in StepBatches(10, 40, 0, 0, 5) for flag in flags)
