import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from diffrep import FeatureStore, run_probe
from diffrep.config import AttentionConfig, ProbeConfig
from diffrep.errors import ConfigError, DataError, DiffrepError, StoreError, UnknownNameError
from diffrep.probe import LogisticPath, Task, judge, knn_scores, make_task, stratified_split
from diffrep.probe.split import stratified_folds
from diffrep.store import StoreWriter


def blobs(count, classes=3, dim=12, spread=1.0, seed=0):
    """Gaussian clouds, one a class, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return torch.tensor(centres[labels] + spread * rng.normal(size=(count, dim))).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("dim", [5, 12, 90])
def test_every_penalty_reaches_scikit_learns_optimum(dim):
    x, y = blobs(60, dim=dim)
    penalties = (1e-3, 1e-2, 1e-1, 1.0)
    path = LogisticPath(penalties, max_iter=2000).fit(x, y, 3)
    queries, _ = blobs(20, dim=dim, seed=1)
    ours = path.scores(queries).softmax(-1)
    for i, penalty in enumerate(penalties):
        reference = LogisticRegression(C=1 / (penalty * len(x)), max_iter=10_000, tol=1e-8)
        reference.fit(((x - path.mean) / path.std).numpy(), y.numpy())
        expected = reference.predict_proba(((queries - path.mean) / path.std).numpy())
        np.testing.assert_allclose(ours[i], expected, atol=5e-3)


def test_penalties_do_not_disturb_each_other():
    x, y = blobs(60)
    together = LogisticPath((1e-2, 1.0), 500).fit(x, y, 3).scores(x)
    for i, penalty in enumerate((1e-2, 1.0)):
        alone = LogisticPath((penalty,), 500).fit(x, y, 3).scores(x)
        torch.testing.assert_close(together[i], alone[0], atol=2e-3, rtol=1e-3)


def test_constant_features_and_large_offsets():
    x, y = blobs(60)
    x = torch.cat([1000 + x, torch.full((60, 1), 7.0)], dim=1)
    path = LogisticPath((1e-2,), 200).fit(x, y, 3)
    assert torch.isfinite(path.scores(x)).all()
    assert (path.scores(x)[0].argmax(1) == y).float().mean() > 0.9
    torch.testing.assert_close(path.head(0)(x), path.scores(x)[0], atol=1e-4, rtol=1e-4)


def test_knn_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    votes = knn_scores(train, labels, torch.tensor([[2.0, 0.0]]), 2, (1, 2, 3), temperature=0.5)
    a, b, c = np.exp(np.array([1.0, 0.8, 0.0]) / 0.5)
    np.testing.assert_allclose(votes[1][0], [1, 0], atol=1e-6)
    np.testing.assert_allclose(votes[2][0], [a / (a + b), b / (a + b)], rtol=1e-5)
    np.testing.assert_allclose(votes[3][0], [a / (a + b + c), (b + c) / (a + b + c)], rtol=1e-5)
    with pytest.raises(ConfigError, match="k=5 needs at least 5 training samples, there are 4"):
        knn_scores(train, labels, train, 2, (5,))


def test_knn_chunks_change_nothing():
    x, y = blobs(50)
    whole = knn_scores(x, y, x, 3, (5,))[5]
    torch.testing.assert_close(knn_scores(x, y, x, 3, (5,), chunk=7)[5], whole)


def test_split_keeps_every_class():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    first, second = stratified_split(labels, 0.2, seed=0)
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(63))
    assert np.bincount(labels[second], minlength=4).tolist() == [10, 2, 1, 0]
    again = stratified_split(labels, 0.2, seed=0)
    assert np.array_equal(again[1], second)
    assert not np.array_equal(stratified_split(labels, 0.2, seed=1)[1], second)


def test_folds_spread_every_class():
    labels = np.array([0] * 50 + [1] * 7)
    fold = stratified_folds(labels, 5, seed=0)
    assert np.bincount(fold[labels == 0]).tolist() == [10] * 5
    assert sorted(np.bincount(fold[labels == 1], minlength=5)) == [1, 1, 1, 2, 2]


def write_store(path, levels=("t=5", "t=50"), shape=(4, 2, 2), labels="good", train=60, test=30, break_at=None):
    """A store whose second level separates the classes better than its first."""
    meta = {
        "numerics": 1,
        "backbone": {"name": "net"},
        "request": {},
        "layers": {"mid": {"shape": list(shape), "cost": 0.5}, "up": {"shape": list(shape), "cost": 1.0}},
        "levels": [[key, key, int(key[2:]), 0.9, 0.4] for key in levels],
        "data": {"path": "photos"},
        "splits": {"train": [0, train], "test": [train, train + test]},
        "classes": None,
        "unit_size": 40,
        "versions": {},
    }
    writer = StoreWriter(path, meta)
    for unit in writer.units:
        tensors = {}
        for layer in ("mid", "up"):
            for number, key in enumerate(levels):
                x, y = blobs(train + test, dim=int(np.prod(shape)), spread=(4.0, 0.5)[number], seed=number)
                tensors[f"{layer}@{key}"] = x[list(unit.rows)].view(-1, *shape)
        if break_at is not None:
            tensors[break_at][0, 0] = float("nan")
        given = {"good": y, "one": torch.zeros_like(y), "none": None}.get(labels)
        if labels == "new in test":
            given = torch.where(torch.arange(len(y)) == train, 7, y)
        if labels == "other in test":
            given = torch.where(torch.arange(len(y)) >= train, y.roll(1), y)
        rows = list(unit.rows)
        writer.write(
            unit, tensors, [f"id{r}" for r in rows], rows, None if given is None else given[rows].tolist(), []
        )
    writer.finish()
    return path


def test_the_probe_finds_the_better_level_and_writes_everything(tmp_path):
    store = write_store(tmp_path / "store")
    config = ProbeConfig(
        store=store, out=tmp_path / "run", neighbours=(3,), attention=AttentionConfig(epochs=2, width=16)
    )
    metrics = run_probe(config)
    linear, knn, attention = metrics["scores"]
    assert (linear["head"], knn["head"], attention["head"]) == ("linear", "knn", "attention")
    assert linear["level"] == "t=50"
    assert linear["test"] > 0.9
    assert linear["interval"][0] <= linear["test"] <= linear["interval"][1]
    assert len(metrics["cells"]) == 4
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(written) == {"command", "config_hash", "versions", "seed", "metrics"}
    assert written["metrics"] == json.loads(json.dumps(metrics))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "http" not in page, "the page must need nothing from elsewhere"
    assert f"{linear['test']:.3f}" in page
    assert (tmp_path / "run" / "head-linear.safetensors").exists()
    assert (tmp_path / "run" / "config.yaml").exists()
    assert run_probe(config)["scores"] == metrics["scores"], "the same seed gives the same numbers, dropout included"


def test_the_test_split_decides_nothing(tmp_path):
    """Other test labels change the score and nothing that was chosen."""
    first, second = (
        run_probe(ProbeConfig(store=write_store(tmp_path / name, labels=labels), neighbours=(3,)))
        for name, labels in (("a", "good"), ("b", "other in test"))
    )
    assert first["cells"] == second["cells"]
    for one, other in zip(first["scores"], second["scores"], strict=True):
        assert (one["layer"], one["level"]) == (other["layer"], other["level"])
        assert one["test"] > other["test"]
    task = make_task(FeatureStore(tmp_path / "a"), ProbeConfig(store="x"))
    assert not set(task.test) & set(task.fit)
    assert len(task.fit) == 60


def test_no_test_split_holds_out_a_part_of_train(tmp_path):
    store = FeatureStore(write_store(tmp_path / "store"))
    task = make_task(store, ProbeConfig(store="x", test_split=None))
    assert (len(task.train), len(task.val), len(task.test)) == (39, 9, 12)
    assert not set(task.test) & set(task.fit)


@pytest.mark.parametrize(
    ("labels", "options", "error", "text"),
    [
        ("none", {}, DataError, "no labels"),
        ("one", {}, DataError, "one class only"),
        ("new in test", {}, DataError, r"classes \[7\] are in the test split"),
        ("good", {"test_split": "val"}, UnknownNameError, "unknown split 'val'"),
        ("good", {"test_split": "train"}, ConfigError, "test_split is the training split"),
        ("good", {"neighbours": (100,)}, ConfigError, "k=100 needs at least 100"),
    ],
)
def test_stores_that_cannot_be_probed(tmp_path, labels, options, error, text):
    store = write_store(tmp_path / "store", labels=labels)
    with pytest.raises(error, match=text):
        run_probe(ProbeConfig(store=store, **options))


def test_nan_features_are_named(tmp_path):
    store = write_store(tmp_path / "store", break_at="up@t=50")
    with pytest.raises(DiffrepError, match="up@t=50 hold NaN"):
        run_probe(ProbeConfig(store=store, neighbours=(3,)))


def test_attention_needs_maps_of_the_same_samples(tmp_path):
    store = write_store(tmp_path / "store", shape=(6,))
    attention = AttentionConfig(epochs=1)
    with pytest.raises(ConfigError, match="attention pooling needs maps"):
        run_probe(ProbeConfig(store=store, neighbours=(3,), attention=attention))
    other = write_store(tmp_path / "other", test=15)
    attention = AttentionConfig(epochs=1, store=other)
    with pytest.raises(StoreError, match="different samples"):
        run_probe(ProbeConfig(store=store, neighbours=(3,), attention=attention))


def test_the_attention_heads_layer_and_level_as_users_write_them(tmp_path):
    store = write_store(tmp_path / "store")
    attention = AttentionConfig(epochs=1, width=16, layer="up", level=5)
    metrics = run_probe(ProbeConfig(store=store, neighbours=(3,), attention=attention))
    assert (metrics["scores"][-1]["layer"], metrics["scores"][-1]["level"]) == ("up", "t=5")
    for wrong in ({"layer": "nope"}, {"level": 0}):
        with pytest.raises(UnknownNameError, match="nope|'0'"):
            run_probe(ProbeConfig(store=store, neighbours=(3,), attention=AttentionConfig(epochs=1, **wrong)))


def test_judge_reads_any_features():
    x, y = blobs(90)
    task = Task(y, 3, np.arange(50), np.arange(50, 70), np.arange(70, 90))
    cell = judge("pixels", "", x, task, ProbeConfig(store="x", neighbours=(3,)))
    assert (cell.layer, cell.dim) == ("pixels", 12)
    assert cell.linear > 0.8
