"""`diffrep probe` on several processes gives what one process gives."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffrep import FeatureStore, dist
from diffrep.cli import main
from diffrep.config import ProbeConfig
from diffrep.heads import load_head
from diffrep.probe import make_task
from diffrep.probe.trained_data import Samples
from diffrep.probe.trained_net import evaluate
from diffrep.store import StoreWriter

pytestmark = pytest.mark.mp
TRAIN, TEST, CLASSES = 301, 600, 3
LEVEL = "t=50"


@pytest.fixture
def run(capsys, monkeypatch, two_processes):
    """Runs the command in this process, and what it launches in two others; returns (stdout, stderr)."""
    monkeypatch.setattr(dist, "launch", two_processes.launch)

    def probe(*words, check=0):
        capsys.readouterr()
        status = main(["probe", *map(str, words)])
        done = capsys.readouterr()
        assert status == check, done.out + done.err
        return done

    return probe


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Maps of noisy class means, in units that no batch and no block ends with; 600 test samples are three blocks."""
    path, count, shape = tmp_path_factory.mktemp("mp") / "store", TRAIN + TEST, (6, 4, 4)
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=count)
    centres = rng.normal(size=(CLASSES, *shape))
    meta = {
        "numerics": 1,
        "backbone": {"name": "net"},
        "request": {},
        "layers": {name: {"shape": list(shape), "cost": cost} for name, cost in (("mid", 0.5), ("up", 1.0))},
        "levels": [[LEVEL, LEVEL, 50, 0.9, 0.4]],
        "data": {"path": "photos"},
        "splits": {"train": [0, TRAIN], "test": [TRAIN, count]},
        "classes": None,
        "unit_size": 130,
        "versions": {},
    }
    features = {
        f"{name}@{LEVEL}": torch.from_numpy(centres[labels] + spread * rng.normal(size=(count, *shape))).half()
        for name, spread in (("mid", 4.0), ("up", 2.0))
    }
    writer = StoreWriter(path, meta)
    for unit in writer.units:
        rows = list(unit.rows)
        tensors = {name: whole[rows] for name, whole in features.items()}
        writer.write(unit, tensors, [f"id{row}" for row in rows], rows, labels[rows].tolist(), [])
    writer.finish()
    return path


def words(store, out, processes, *more):
    return [f"store={store}", f"out={out}", "val_fraction=0.3", *more, "--nproc", processes]


def scores_in(folder):
    """Scores of results.json by name."""
    scores = json.loads((folder / "results.json").read_text())["metrics"]["scores"]
    named = {one["name"]: one for one in scores}
    assert len(named) == len(scores), "two heads have one name"
    return named


def stored_scores(folder):
    with safe_open(folder / "seed-0" / "finished.safetensors", framework="pt") as file:
        return file.get_tensor("scores")


def test_two_processes_judge_alike_and_train_alike(run, store, tmp_path):
    trained = [
        # Without dropout, and with SGD, which does not enlarge rounding, only the order of sums is left to differ.
        "trained.conv={epochs: 8, width: 8, dropout: 0, optimizer: sgd, lr: 0.5, batch_size: 64}",
        "trained.attention={epochs: 8, width: 16, depth: 1, lr: 0.01, batch_size: 64}",
        "trained.linear={epochs: 4, norm: standard, lr: 0.01, batch_size: 64}",
    ]
    more = ["heads=[logistic,knn,ridge]", "neighbours=[5]", *trained]
    run(*words(store, tmp_path / "one", 1, *more))
    two = run(*words(store, tmp_path / "two", 2, *more))
    # A launcher that starts one process and says nothing would pass the comparison.
    assert "train conv in 2 processes" in two.err
    assert len([line for line in two.err.splitlines() if "train conv" in line and "0/8" in line]) == 1
    first, second = scores_in(tmp_path / "one"), scores_in(tmp_path / "two")
    assert list(first) == list(second)
    for name in ("linear", "kNN", "ridge"):
        assert first[name] == second[name]
    task, features = make_task(FeatureStore(store), ProbeConfig(store=store, val_fraction=0.3)), FeatureStore(store)
    labels = task.labels[task.test]
    titles = {"conv": "convolutional", "attention": "attention pool", "linear": "linear, trained"}
    folders = {name: title.replace(", ", "-").replace(" ", "-") for name, title in titles.items()}
    for name, title in titles.items():
        one, other = first[title], second[title]
        assert other["val"] == pytest.approx(one["val"], abs=0.1)
        assert other["test"] == pytest.approx(one["test"], abs=0.05)
        assert one["test"] > 0.5, "chance is 0.33"
        scores = stored_scores(tmp_path / "two" / "trained" / name)
        assert scores.shape == (TEST, CLASSES)
        assert (scores.argmax(1) == labels).double().mean().item() == other["test"]
        # The weights that two processes learned, scored by one: every bit is the same, so nothing was dropped,
        # counted twice or put in another's place.
        head = load_head(tmp_path / "two" / "heads" / folders[name])
        samples = Samples(features, [(other["layer"], other["level"])], task.test, None)
        assert torch.equal(evaluate(name, head, samples, task.test, CLASSES, torch.device("cpu"))[0], scores)
    for name in ("conv", "linear"):
        pair = [load_head(tmp_path / folder / "heads" / folders[name]).state_dict() for folder in ("one", "two")]
        for key, value in pair[0].items():
            torch.testing.assert_close(value, pair[1][key], atol=2e-3, rtol=1e-3)


def test_batches_must_divide(run, store, tmp_path):
    linear = "trained.linear={epochs: 1, batch_size: 65}"
    done = run(*words(store, tmp_path / "run", 2, "heads=[ridge]", linear), check=1)
    assert "batch_size 65 does not divide among 2 processes" in done.err
