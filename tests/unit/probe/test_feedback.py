"""`run_feedback` from images to a report, on a tiny U-Net."""

import argparse
import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffrep import dist
from diffrep.cli import feedback as verb
from diffrep.cli import main
from diffrep.config import read_results
from diffrep.config.feedback import FeedbackConfig
from diffrep.data import open_images
from diffrep.errors import BackendUnavailable, CheckpointError, ConfigError, DataError, DiffrepError
from diffrep.heads import load_head
from diffrep.probe.feedback import FeedbackRun, open_feedback, run_feedback
from diffrep.probe.feedback_data import Steps, batches_of, collate
from diffrep.probe.trained_data import Order

# Dies by SIGKILL while it scores samples for the nth time: nothing can be tidied up. The validation samples of an
# epoch are scored in one batch.
KILLED = """
import os, signal, sys
from diffrep.config import load_config
from diffrep.config.feedback import FeedbackConfig
from diffrep.probe import feedback

class Doomed(feedback.FeedbackRun):
    evaluated = 0

    def inputs(self, batch, draw, seed, flip=False):
        self.evaluated += draw == feedback.EVALUATION
        if self.evaluated == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().inputs(batch, draw, seed, flip)

feedback.FeedbackRun = Doomed
feedback.run_feedback(load_config(FeedbackConfig, [sys.argv[1]]))
"""


@pytest.fixture
def config(unet_folder, image_folder, tmp_path):
    def make(name="run", **changes):
        plain = {
            "backbone": {"source": str(unet_folder), "device": "cpu"},
            "data": {"path": str(image_folder)},
            "out": str(tmp_path / name),
            "levels": [5],
            "read": ["up_blocks.0"],
            "head": {"width": 8, "heads": 2, "depth": 1, "pool": 4, "dropout": 0.1},
            "epochs": 4,
            "batch_size": 4,
            "optimizer": "adamw",
            "lr": 0.02,
            "flip": True,
        }
        return FeedbackConfig.model_validate(plain | changes)

    return make


def config_folder(config):
    return Path(config.out)


def weights(config, seed=0):
    return load_file(config_folder(config) / "heads" / f"DifFeed-seed-{seed}" / "model.safetensors")


@pytest.fixture
def killed_at(tmp_path, two_processes):
    """Runs in a process of its own, which dies when it scores for the nth time."""

    def run(config, evaluation):
        file = tmp_path / "killed.yaml"
        file.write_text(config.model_dump_json())
        done = two_processes.run(file, evaluation, source=KILLED, ranks=1)
        assert done.codes == [-9], done.err

    return run


def log_of(config, seed=0):
    """The lines of all metrics files of a seed."""
    files = sorted((config_folder(config) / f"seed-{seed}").glob("csv/*/metrics.csv"))
    return [row for file in files for row in csv.DictReader(file.open())]


def same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_images_in_results_and_report_out(config):
    config = config(epochs=8, seeds=2, levels=[5, 50], read=["up_blocks.0", "up_blocks.1"])
    metrics, out = run_feedback(config), config_folder(config)
    (score,) = metrics["scores"]
    assert score["test"] > 0.8  # three classes, told apart by their brightness
    assert score["error"] is not None
    assert metrics["samples"] == {"train": 15, "val": 3, "test": 18, "classes": 3, "seeds": 2}
    assert [level["key"] for level in metrics["levels"]] == ["t=5", "t=50"]
    assert read_results(out)["metrics"] == json.loads(json.dumps(metrics))
    assert "DifFeed" in (out / "report.html").read_text()
    assert [int(row["epoch"]) for row in log_of(config, 1)] == list(range(1, 9))
    first, second = weights(config, 0), weights(config, 1)
    assert first.keys() == second.keys()
    assert {name.split(".")[0] for name in first} == {"feedback", "head"}
    # The saved weights, opened again, are those that were scored.
    network, run = open_feedback(out), FeedbackRun(config)
    stored = load_file(out / "seed-0" / "scores.safetensors")
    assert torch.equal(stored["rows"], torch.from_numpy(run.task.test))
    torch.testing.assert_close(run.scores(network, run.task.test, 0), stored["scores"])
    assert open_feedback(out, seed=1).state_dict().keys() == first.keys()
    with pytest.raises(CheckpointError, match="no .*seed-7; .diffrep feedback. writes it"):
        open_feedback(out, seed=7)


def test_a_killed_run_goes_on_as_if_nothing_had_been(config, killed_at):
    whole, killed = config("whole"), config("killed")
    run_feedback(whole)
    killed_at(killed, 3)
    assert not (config_folder(killed) / "results.json").exists()
    reached = torch.load(config_folder(killed) / "seed-0" / "last.ckpt", weights_only=True)
    assert reached["epoch"] == 1
    run_feedback(killed)
    same_weights(whole, killed)
    found = [read_results(config_folder(one))["metrics"]["scores"] for one in (whole, killed)]
    assert found[0] == found[1]


def test_a_kill_after_early_stopping_trains_no_further(config, killed_at):
    options = {"epochs": 9, "patience": 2, "lr": 1e-9}  # nothing gets better than the first epoch
    whole, killed = config("whole", **options), config("killed", **options)
    run_feedback(whole)
    assert [int(row["epoch"]) for row in log_of(whole)] == [1, 2, 3]
    killed_at(killed, 4)  # the first test batch
    assert not (config_folder(killed) / "heads").exists()
    run_feedback(killed)
    assert log_of(killed) == log_of(whole), "no epoch after the third"
    same_weights(whole, killed)


def test_a_run_is_drawn_out_and_not_cut_short(config):
    straight = config("straight")
    run_feedback(straight)
    run_feedback(config("drawn", epochs=2))
    drawn = config("drawn")
    run_feedback(drawn)
    same_weights(straight, drawn)
    before = (config_folder(drawn) / "seed-0" / "done.json").stat().st_mtime_ns
    run_feedback(drawn)
    assert (config_folder(drawn) / "seed-0" / "done.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="was to have 4 epochs, and epochs=3"):
        run_feedback(config("drawn", epochs=3))


def test_another_config_is_refused(config):
    run_feedback(config(epochs=1))
    with pytest.raises(ConfigError, match=r"other settings \(lr: 0.02 there, 0.1 now\); use another out"):
        run_feedback(config(epochs=1, lr=0.1))


def test_the_verb_prints_the_table(config, tmp_path, capsys):
    file = tmp_path / "feedback.yaml"
    file.write_text(config(epochs=1).model_dump_json())
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    verb.run(parser.parse_args([str(file), "lr=0.01"]))
    printed = capsys.readouterr().out
    assert "DifFeed" in printed
    assert f"report: {(tmp_path / 'run' / 'report.html').resolve()}" in printed


def test_other_images_are_refused(config, image_folder, tmp_path):
    folder = shutil.copytree(image_folder, tmp_path / "photos")
    config = config(epochs=1, data={"path": str(folder)})
    run_feedback(config)
    (folder / "train" / "class0" / "0.png").unlink()
    with pytest.raises(ConfigError, match="other settings .*images: "):
        run_feedback(config)


def test_a_damaged_checkpoint_is_named(config):
    config = config(epochs=1)
    folder = config_folder(config) / "seed-0"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(CheckpointError, match="cannot read the checkpoint .*last.ckpt"):
        run_feedback(config)


def test_scores_do_not_depend_on_the_batch(config):
    first, second = FeedbackRun(config(batch_size=4)), FeedbackRun(config(batch_size=7))
    network, rows = first.network(0), first.task.test
    torch.testing.assert_close(first.scores(network, rows, 0), second.scores(network, rows, 0))
    backwards = second.scores(network, rows[::-1].copy(), 0).flip(0)
    torch.testing.assert_close(first.scores(network, rows, 0), backwards)


def test_a_linear_head_reads_one_map(config):
    run = FeedbackRun(config(head={"kind": "linear", "pool": 2, "norm": "batch"}, noise="none"))
    batch = next(iter(batches_of(run.images, [run.task.train[:4]], 0)))
    assert run.network(0)(run.inputs(batch, 1, 0)).shape == (4, 3)
    clean = next(iter(run.inputs(batch, 1, 0).values()))[0]
    torch.testing.assert_close(clean, next(iter(run.inputs(batch, 2, 3).values()))[0])
    with pytest.raises(ConfigError, match="head.kind linear reads one layer at one level, and 1 layers at 2 levels"):
        FeedbackRun(config(head={"kind": "linear"}, levels=[5, 9])).network(0)


def test_what_cannot_be_trained_is_told(config, tmp_path):
    with pytest.raises(ConfigError, match="levels names one level twice"):
        FeedbackRun(config(levels=[5, "5"]))
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    for name, labels, message in (
        ("none", None, "have no labels"),
        ("several", np.eye(3, dtype=np.int64)[np.arange(12) % 3], "have several labels each"),
    ):
        arrays = {} if labels is None else {"train_labels": labels, "test_labels": labels}
        np.savez(tmp_path / f"{name}.npz", train_images=images, test_images=images, **arrays)
        with pytest.raises(DataError, match=message):
            FeedbackRun(config(data={"path": str(tmp_path / f"{name}.npz")}))


def test_a_loss_that_is_not_finite_stops_the_run(config):
    with pytest.raises(DiffrepError, match="the loss of DifFeed is .* in epoch .*; lower lr"):
        run_feedback(config(optimizer="sgd", lr=1e12, head={"kind": "linear", "pool": 2, "norm": "none"}))


def test_images_of_several_sizes_need_a_size(config, image_folder):
    run = FeedbackRun(config())
    images = open_images(config().data, 1)
    with pytest.raises(ConfigError, match="differ in size"):
        collate([(0, images[0]), (1, images[1][:, :8])])
    assert run.size == (16, 16)


def test_every_sample_is_shown_once_an_epoch_whatever_the_number_of_processes(config):
    run = FeedbackRun(config(batch_size=7))
    assert len(run.task.train) == 15, "one more than two steps of seven"
    shown = []
    for rank in (0, 1):
        steps = Steps(Order(run.task.train, 7, 0), rank, 2)
        steps.set_epoch(1)
        loader = batches_of(run.images, steps, 0)
        assert len(loader) == 3
        shown.append([rows.tolist() for rows, _ in loader])
    assert [len(first) + len(second) for first, second in zip(*shown, strict=True)] == [5, 5, 5]
    assert sorted(row for one in shown for rows in one for row in rows) == run.task.train.tolist()
    with pytest.raises(ConfigError, match="15 training samples in steps of 2 leave a step of 1"):
        FeedbackRun(config(batch_size=2))


def test_loggers(config):
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(BackendUnavailable, match=r"pip install 'diffrep\[trackers\]'"):
            run_feedback(config(epochs=1, loggers=["csv", "tensorboard"]))
    else:
        run_feedback(config(epochs=1, loggers=["csv", "tensorboard"]))
        assert list((config_folder(config()) / "seed-0").glob("tensorboard/*/events*"))
    run_feedback(config("silent", epochs=1, loggers=[]))
    assert not (config_folder(config("silent")) / "seed-0" / "csv").exists()


@pytest.mark.parametrize("head", [{}, {"kind": "linear", "pool": 2, "norm": "batch"}])
def test_the_card_scores_images_as_the_run_did(config, head):
    # Without noise, which depends on the sample's id, and the card's images have none.
    changes = {"head": head} if head else {"levels": [5, 50], "read": ["up_blocks.0", "up_blocks.1"]}
    config = config(epochs=2, noise="none", **changes)
    metrics, out = run_feedback(config), config_folder(config)
    folder = out / "heads" / "DifFeed-seed-0"
    assert load_head(folder).about["accuracy"] == metrics["scores"][0]["test"]
    text = (folder / "README.md").read_text()
    assert "no part of these files" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    stored = load_file(out / "seed-0" / "scores.safetensors")
    run = FeedbackRun(config)
    images = torch.stack([run.images[int(row)] for row in stored["rows"]])
    lines = ["images = given" if line.startswith("images =") else line for line in code.splitlines()]
    names = {"given": images}
    exec("\n".join(lines), names)
    torch.testing.assert_close(names["scores"].cpu(), stored["scores"])


@pytest.mark.mp
def test_two_processes_train_what_one_trains(config, tmp_path, two_processes, monkeypatch, capsys):
    head = {"width": 8, "heads": 2, "depth": 1, "pool": 4}
    # Without dropout, and with SGD, which does not enlarge rounding, only the order of sums is left to differ.
    one, two = (config(name, head=head, optimizer="sgd", lr=0.1, epochs=3) for name in ("one", "two"))
    run_feedback(one)
    file = tmp_path / "two.yaml"
    file.write_text(two.model_dump_json())
    monkeypatch.setattr(dist, "launch", two_processes.launch)
    capsys.readouterr()
    status, done = main(["feedback", str(file), "--nproc", "2"]), capsys.readouterr()
    assert status == 0, done.out + done.err
    # A launcher that starts one process and says nothing would pass the comparison.
    assert "train seed-0 in 2 processes" in done.err
    assert done.out.count("DifFeed") == 1
    other = weights(two)
    for name, value in weights(one).items():
        torch.testing.assert_close(other[name], value, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    first, second = (load_file(config_folder(c) / "seed-0" / "scores.safetensors")["scores"] for c in (one, two))
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


def test_processes_that_do_not_divide_the_batch(config, tmp_path):
    file = tmp_path / "odd.yaml"
    file.write_text(config(batch_size=4).model_dump_json())
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    with pytest.raises(ConfigError, match="batch_size 4 does not divide among 3 processes"):
        verb.run(parser.parse_args([str(file), "--nproc", "3"]))
