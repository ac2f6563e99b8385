import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffrep import FeatureStore
from diffrep.config import ProbeConfig, TrainedConfig
from diffrep.errors import BackendUnavailable, CheckpointError, ConfigError, DiffrepError
from diffrep.heads import load_head, matryoshka_loss, save_head
from diffrep.metrics import accuracy, mean_average_precision
from diffrep.probe import make_task
from diffrep.probe.trained import FINISHED, train_head
from diffrep.probe.trained_data import CHECKPOINT, Order, Samples
from diffrep.probe.trained_net import NORMS, evaluate, loss_sum, scores_of

GOOD = ("up", "t=50")
SMALL = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0, "hidden": 16, "nesting": (4, 8), "batch_size": 16}


def train(path, out, kind="linear", pairs=(GOOD,), seed=0, metric="accuracy", **options):
    """Trains a small head on a store and returns it with the task."""
    store = FeatureStore(path)
    task = make_task(store, ProbeConfig(store=path))
    config = TrainedConfig(**{**SMALL, "epochs": 3, **options})
    return train_head(kind, store, list(pairs), task, config, out, seed, metric), task


def score(trained, task):
    return accuracy(trained.scores.argmax(1), task.labels[task.test])


def rows_of(out):
    """The lines of all metrics files of a run folder."""
    return [row for file in sorted(out.glob("csv/*/metrics.csv")) for row in csv.DictReader(file.open())]


@pytest.mark.parametrize("kind", NORMS)
def test_every_kind_learns_and_is_saved(write_store, tmp_path, kind):
    path = write_store(tmp_path / "store")
    pairs = [("mid", "t=50"), GOOD] if kind == "difformer" else [GOOD]
    before = torch.get_rng_state()
    trained, task = train(path, tmp_path / "run", kind, pairs, epochs=20, lr=1e-2, weight_decay=0.01)
    assert torch.equal(torch.get_rng_state(), before)
    assert trained.scores.shape == (30, 3)
    assert trained.scores.dtype == torch.float32
    assert score(trained, task) > 0.75, "chance is 0.33"
    assert trained.val > 0.6
    setting = trained.setting
    assert setting["dim"] == 16 * len(pairs)
    assert setting["params"] == sum(one.numel() for one in trained.head.parameters())
    assert 1 <= setting["best_epoch"] <= setting["epochs_run"] == 20
    assert not trained.head.training
    # The saved head gives the scores that were reported.
    again = load_head(save_head(trained.head, tmp_path / "head", {}))
    store = FeatureStore(path)
    features = {pair: store[pair][task.test] for pair in pairs}
    with torch.no_grad():
        torch.testing.assert_close(scores_of(kind, again, features)[-1], trained.scores)


def test_scores_do_not_depend_on_the_training_batch_or_the_memory(write_store, tmp_path):
    """Evaluation of given weights is the same to the last bit, block by block, kept in memory or not."""
    path = write_store(tmp_path / "store", train=60, test=600)
    trained, task = train(path, tmp_path / "run", "attention", epochs=1)
    store, cpu = FeatureStore(path), torch.device("cpu")
    every = np.concatenate([task.train, task.val, task.test])
    kept, mapped = (Samples(store, [GOOD], every, None, memory) for memory in (1 << 20, 0))
    assert (kept.kept, mapped.kept) == (True, False)
    for samples in (kept, mapped):
        found = evaluate("attention", trained.head, samples, task.test, 3, cpu)
        assert torch.equal(found[0], trained.scores)
    # Any 256 neighbours of the test split give their own scores: the block is all that counts.
    block = evaluate("attention", trained.head, kept, task.test[256:512], 3, cpu)
    assert torch.equal(block[0], trained.scores[256:512])


def test_the_best_epoch_is_kept(write_store, tmp_path):
    path = write_store(tmp_path / "store", spread=6.0)
    out = tmp_path / "run"
    trained, task = train(path, out, "mlp", pairs=[("up", "t=5")], epochs=8, lr=3e-2)
    values = [float(row["val"]) for row in rows_of(out)]
    assert len(values) == 8
    assert len(set(values)) > 1
    assert trained.setting["best_epoch"] == 1 + values.index(max(values))
    assert trained.val == pytest.approx(max(values))
    found = evaluate(
        "mlp", trained.head, Samples(FeatureStore(path), [("up", "t=5")], task.val, None), task.val, 3, "cpu"
    )
    assert accuracy(found[0].argmax(1), task.labels[task.val]) == trained.val


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from diffrep import FeatureStore
from diffrep.config import ProbeConfig, TrainedConfig
from diffrep.probe import make_task
from diffrep.probe.trained import train_head
path, out, config = Path(sys.argv[2]), Path(sys.argv[3]), TrainedConfig.model_validate_json(sys.argv[4])
store = FeatureStore(path)
task = make_task(store, ProbeConfig(store=path))
train_head("attention", store, [("up", "t=50")], task, config, out, 0, "accuracy")
"""


def test_a_killed_run_ends_as_if_it_had_not_been(write_store, tmp_path):
    path, out = write_store(tmp_path / "store"), tmp_path / "killed"
    options = {"epochs": 30, "dropout": 0.2, "flip": True, "checkpoint_every": 4, "lr": 3e-3}
    config = TrainedConfig(**{**SMALL, **options}).model_dump_json()
    command = [sys.executable, "-c", SCRIPT, os.getcwd(), str(path), str(out), config]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (out / CHECKPOINT).exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / FINISHED).exists(), "the run ended before it was killed"
    done = torch.load(out / CHECKPOINT, weights_only=True)["epoch"] + 1
    assert done % 4 == 0
    resumed, _ = train(path, out, "attention", **options)
    whole, _ = train(path, tmp_path / "whole", "attention", **options)
    assert resumed.val == whole.val
    assert resumed.setting == whole.setting
    assert torch.equal(resumed.scores, whole.scores)
    weights = whole.head.state_dict()
    for name, value in resumed.head.state_dict().items():
        assert torch.equal(value, weights[name]), name
    # The resumed run went on from the checkpoint: its log begins after it, and equals the other's.
    after = [row for row in rows_of(out) if int(row["epoch"]) > done]
    assert after[-(30 - done) :] == rows_of(tmp_path / "whole")[done:]


def test_a_finished_run_is_not_trained_again(write_store, tmp_path):
    path, out = write_store(tmp_path / "store"), tmp_path / "run"
    options = {"epochs": 40, "patience": 3, "lr": 3e-2}
    first, task = train(path, out, **options)
    ran = first.setting["epochs_run"]
    assert ran == first.setting["best_epoch"] + 3 < 40, "it stopped three epochs after the best"
    stamp = (out / CHECKPOINT).stat().st_mtime_ns
    second, _ = train(path, out, **options)
    assert torch.equal(first.scores, second.scores)
    assert (first.val, first.setting) == (second.val, second.setting)
    # Killed between the last epoch and the result: early stopping is not forgotten.
    (out / FINISHED).unlink()
    third, _ = train(path, out, **options)
    assert torch.equal(first.scores, third.scores)
    assert (third.val, third.setting) == (first.val, first.setting)
    assert (out / CHECKPOINT).stat().st_mtime_ns == stamp
    assert len(rows_of(out)) == ran


def test_a_folder_of_another_run_is_refused(write_store, tmp_path):
    path, out = write_store(tmp_path / "store"), tmp_path / "run"
    train(path, out)
    with pytest.raises(ConfigError, match="trained otherwise .*lr: 0.001 there, 0.5 now"):
        train(path, out, lr=0.5)
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        train(path, out, seed=1)
    with pytest.raises(ConfigError, match="read: .*up@t=50.* there, .*mid@t=50.* now"):
        train(path, out, pairs=[("mid", "t=50")])
    with pytest.raises(ConfigError, match="features: "):
        train(write_store(tmp_path / "other", spread=1.0), out)
    train(path.rename(tmp_path / "moved"), out, checkpoint_every=2)  # neither changes a number
    (out / FINISHED).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read .*finished.safetensors.*delete it"):
        train(tmp_path / "moved", out)
    (out / FINISHED).unlink()
    (out / CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read the checkpoint .*last.ckpt.*delete it"):
        train(tmp_path / "moved", out)


def test_a_loss_that_is_not_finite(write_store, tmp_path):
    path, out = write_store(tmp_path / "store"), tmp_path / "run"
    with pytest.raises(DiffrepError, match="loss of the head 'mlp' is nan in epoch 1; lower lr"):
        train(path, out, "mlp", optimizer="sgd", lr=1e30)
    trained, _ = train(path, out, "mlp", optimizer="sgd", lr=0.1)
    assert trained.setting["lr"] == 0.1, "a run that came to nothing does not hold its folder"


def test_features_that_are_not_finite(write_store, tmp_path):
    path = write_store(tmp_path / "store", break_at="up@t=50")
    with pytest.raises(DiffrepError, match="up@t=50 hold NaN or infinity in 3 of 90 samples"):
        train(path, tmp_path / "run")


@pytest.mark.parametrize(
    ("shape", "kind", "options", "text"),
    [
        ((6,), "attention", {}, r"'attention' reads maps .*up is stored as \(6,\); extract with request.pool=none"),
        ((6,), "conv", {}, "reads maps"),
        ((6,), "difformer", {}, "reads maps"),
        ((4, 6), "diffssl-attention", {}, "reads maps"),
        ((6,), "mlp", {"flip": True}, "flip=true mirrors maps"),
        ((4, 6), "mlp", {"pool": 2}, "stored as tokens"),
        ((4, 2, 2), "attention", {"norm": "standard"}, "norm=standard is not possible for the head 'attention'"),
        ((4, 2, 2), "difformer", {"norm": "standard"}, "it takes layer, batch, none"),
        ((4, 2, 2), "linear", {"precision": "16-mixed"}, "needs a GPU"),
        ((4, 2, 2), "linear", {"batch_size": 1}, "two samples at a time.*leave a step of 1"),
        ((4, 2, 2), "matryoshka", {"nesting": (8, 4)}, "nesting must ascend"),
    ],
)
def test_heads_that_cannot_be_trained(write_store, tmp_path, shape, kind, options, text):
    path = write_store(tmp_path / "store", shape=shape)
    with pytest.raises(ConfigError, match=text):
        train(path, tmp_path / "run", kind, **options)
    assert not (tmp_path / "run").exists()


def test_one_map_at_a_time(write_store, tmp_path):
    path = write_store(tmp_path / "store")
    pairs = [("mid", "t=50"), GOOD]
    with pytest.raises(ConfigError, match="reads one layer and level, not mid@t=50, up@t=50; kind=difformer"):
        train(path, tmp_path / "run", "conv", pairs)
    flat, task = train(path, tmp_path / "run", "linear", pairs)
    store = FeatureStore(path)
    side_by_side = torch.cat([store[pair][task.test].flatten(1) for pair in pairs], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(flat.head(side_by_side), flat.scores)


def test_loggers(write_store, tmp_path):
    path, out = write_store(tmp_path / "store"), tmp_path / "run"
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(BackendUnavailable, match=r"pip install 'diffrep\[trackers\]'"):
            train(path, out, loggers=("csv", "tensorboard"))
        trained, _ = train(path, out)
    else:
        trained, _ = train(path, out, loggers=("csv", "tensorboard"))
        assert list(out.glob("tensorboard/*/events*"))
    rows = rows_of(out)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert max(float(row["val"]) for row in rows) == pytest.approx(trained.val)
    assert float(rows[-1]["lr"]) < float(rows[0]["lr"])
    train(path, tmp_path / "silent", loggers=())
    assert not (tmp_path / "silent" / "csv").exists()


def test_multi_label(write_store, tmp_path):
    path = write_store(tmp_path / "store", labels="several")
    trained, task = train(path, tmp_path / "run", "mlp", metric="map", epochs=20, lr=1e-2, label_smoothing=0.1)
    assert trained.scores.shape == (30, 2)
    assert trained.val > 0.9
    assert mean_average_precision(trained.scores, task.labels[task.test]).mean > 0.9


@pytest.mark.parametrize("tied", [False, True])
def test_matryoshka_reports_every_length(write_store, tmp_path, tied):
    path = write_store(tmp_path / "store")
    trained, task = train(path, tmp_path / "run", "matryoshka", epochs=15, lr=1e-2, nesting=(1, 4, 32), tied=tied)
    lengths = trained.setting["lengths"]
    assert list(lengths) == ["1", "4", "32"], "the projection may be longer than the features"
    assert lengths["32"]["test"] == score(trained, task)
    assert lengths["32"]["val"] == trained.val
    assert lengths["1"]["test"] < lengths["32"]["test"]


def test_losses():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(7, 4, generator=generator) for _ in range(3)]
    labels = torch.randint(4, (7,), generator=generator)
    torch.testing.assert_close(loss_sum(scores, labels, 0.0) / 7, matryoshka_loss(scores, labels))
    smooth = F.cross_entropy(scores[0], 0.8 * F.one_hot(labels, 4) + 0.05, reduction="sum")
    torch.testing.assert_close(loss_sum(scores[:1], labels, 0.2), smooth)
    several = torch.randint(2, (7, 4), generator=generator)
    for smoothing in (0.0, 0.2):
        target = several * (1 - smoothing) + smoothing / 2
        expected = 7 * F.binary_cross_entropy(scores[0].sigmoid(), target)
        torch.testing.assert_close(loss_sum(scores[:1], several, smoothing), expected)


def test_standard_norm_is_that_of_the_training_samples(write_store, tmp_path):
    path = write_store(tmp_path / "store")
    trained, task = train(path, tmp_path / "run", "linear", norm="standard")
    features = FeatureStore(path)[GOOD][task.train].flatten(1)
    torch.testing.assert_close(trained.head.mean, features.mean(0))
    torch.testing.assert_close(trained.head.std, features.std(0, correction=0))


OPTIONS = {
    "mlp": {"hidden": 8, "norm": "layer"},
    "attention": {"width": 8, "depth": 2, "heads": 4, "dropout": 0.3, "pool": 1},
    "conv": {"width": 8},
    "difformer": {"norm": "none"},
    "diffssl-attention": {"width": 8},
    "matryoshka": {"tied": True},
    "linear": {
        "flip": True,
        "optimizer": "sgd",
        "lr": 1e-2,
        "weight_decay": 10.0,
        "label_smoothing": 0.2,
        "batch_size": 8,
        "precision": "bf16-mixed",
        "epochs": 2,
    },
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_option_changes_what_is_learned(write_store, tmp_path, kind):
    path = write_store(tmp_path / "store")
    plain, _ = train(path, tmp_path / "plain", kind, epochs=1)
    for option, value in OPTIONS[kind].items():
        other, _ = train(path, tmp_path / option, kind, **{"epochs": 1, option: value})
        assert not torch.allclose(plain.scores, other.scores, atol=1e-6), option


def test_the_order_shows_every_sample_once_an_epoch():
    rows = np.arange(100, 161)
    order = Order(rows, 20, seed=3)
    assert (order.steps, order.smallest) == (4, 15)
    epochs = [[order.step(epoch, step) for step in range(4)] for epoch in (0, 1)]
    for parts in epochs:
        assert [len(part) for part in parts] == [16, 15, 15, 15]
        assert np.array_equal(np.sort(np.concatenate(parts)), rows)
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    assert np.array_equal(Order(rows, 20, seed=3).step(1, 2), epochs[1][2])
    assert not np.array_equal(Order(rows, 20, seed=4).step(1, 2), epochs[1][2])


def test_samples_are_read_by_position(write_store, tmp_path):
    store = FeatureStore(write_store(tmp_path / "store"))
    whole, rows = store[GOOD], np.array([85, 3, 41, 40, 39, 3])
    for memory in (1 << 20, 0):
        plain = Samples(store, [GOOD], rows, None, memory)
        assert plain.kept == bool(memory)
        assert torch.equal(plain.read(rows)[GOOD], whole[rows])
        pooled = Samples(store, [GOOD, ("mid", "t=5")], np.arange(90), 1, memory)
        assert pooled.shapes[GOOD] == (4, 1, 1)
        torch.testing.assert_close(pooled.read(rows)[GOOD], whole[rows].mean((2, 3), keepdim=True))
