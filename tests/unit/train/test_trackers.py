import importlib.util
import json
import shutil
import warnings

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffrep import dist, run_train
from diffrep.config import DataConfig, TrainConfig
from diffrep.errors import BackendUnavailable
from diffrep.train.trackers import Trackers, check_trackers

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
        "trackers": ["tensorboard"],
    }
    return TrainConfig(**given | changes)


def lines(run, name="log.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def scalars(run):
    """What TensorBoard shows: steps and values by name."""
    read = EventAccumulator(str(run / "tracking" / "diffrep")).Reload()
    return {name: [(one.step, one.value) for one in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_has_the_numbers_of_the_log(image_folder, tmp_path):
    run = tmp_path / "run"
    watch = {"every": 2, "limit": 12, "test_split": "test", "layers": "blocks.1"}
    run_train(config(image_folder, run, watch=watch, steps=2))
    run_train(config(image_folder, run, watch=watch))
    found = scalars(run)
    for key in ("loss", "grad_norm", "denoise", "images_per_s"):
        wanted = [(line["step"], line[key]) for line in lines(run)]
        assert [step for step, _ in wanted] == [1, 2, 3, 4]
        assert [step for step, _ in found[key]] == [1, 2, 3, 4]
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in wanted], rel=1e-6)
    measured = [(line["step"], line["probe/blocks.1"]) for line in lines(run, "watch.jsonl")]
    assert found["probe/blocks.1"] == [(step, pytest.approx(value)) for step, value in measured]
    assert [step for step, _ in measured] == [0, 2, 4]
    last = lines(run)[-1]["loss_bins"]
    shown = {i: dict(found.get(f"loss_bins/{i}", [])).get(4) for i in range(len(last))}
    assert [shown[i] for i in range(len(last))] == [value and pytest.approx(value) for value in last]


def test_steps_that_come_again_are_seen_once(image_folder, tmp_path):
    run = tmp_path / "run"
    run_train(config(image_folder, run))
    shutil.rmtree(run / "checkpoints" / "step-0000004")
    run_train(config(image_folder, run))
    assert [step for step, _ in scalars(run)["loss"]] == [1, 2, 3, 4]


def test_a_tracker_that_fails_is_left_out(image_folder, tmp_path):
    accelerator = Accelerator(cpu=True)
    trackers = Trackers(accelerator, tmp_path, config(image_folder, tmp_path), 0)
    trackers.log({"loss": 1.0}, 1)
    trackers._running["tensorboard"].writer.file_writer.event_writer._async_writer.close()
    with pytest.warns(UserWarning, match="tensorboard failed and is left out from now on: .*log.jsonl has all"):
        trackers.log({"loss": 2.0}, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.log({"loss": 3.0}, 3)
        trackers.close()
    dist.teardown(accelerator)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1]


def test_a_tracker_that_does_not_start(image_folder, tmp_path):
    """It ends a run that is new, and no other."""
    run = tmp_path / "run"
    (run / "tracking").mkdir(parents=True)
    (run / "tracking" / "diffrep").write_text("a file where a folder should be")
    with pytest.raises(BackendUnavailable, match="trackers=tensorboard does not start"):
        run_train(config(image_folder, run))
    run_train(config(image_folder, run, trackers=[], steps=2))
    with pytest.warns(UserWarning, match="tensorboard failed"):
        run_train(config(image_folder, run))
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]


def test_a_package_that_is_missing(image_folder, tmp_path):
    missing = [name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None]
    check_trackers(("tensorboard",))
    for name in missing:
        with pytest.raises(BackendUnavailable, match=f"pip install {name}; log.jsonl is written in any case"):
            run_train(config(image_folder, tmp_path / "never", trackers=[name]))
    assert not (tmp_path / "never").exists()
