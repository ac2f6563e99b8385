import csv
import json

import numpy as np
import pytest
import torch

from diffrep import FeatureStore, run_probe
from diffrep.config import (
    DataConfig,
    ExtractConfig,
    FeatureRequest,
    LowDataConfig,
    ProbeConfig,
    SGDConfig,
    TrainedConfig,
)
from diffrep.errors import ConfigError, DataError, DiffrepError, StoreError, UnknownNameError
from diffrep.extract.job import ExtractJob
from diffrep.heads import load_head
from diffrep.probe import Reading, Task, judge, make_task, readings
from diffrep.probe.scores import cost_of
from diffrep.probe.sweep import choose

ALL_HEADS = ("logistic", "sgd", "ridge", "knn", "ncm")
SGD = SGDConfig(norms=("standard", "batch"), lrs=(0.1, 1.0), epochs=3, batch_size=16)


def config(store, **options):
    return ProbeConfig(store=store, **{"neighbours": (3,), "sgd": SGD, **options})


def test_the_probe_finds_the_better_level_and_writes_everything(write_store, tmp_path):
    store = write_store(tmp_path / "store")
    wanted = config(
        store, out=tmp_path / "run", heads=ALL_HEADS, trained={"attention": TrainedConfig(epochs=2, width=16)}
    )
    metrics = run_probe(wanted)
    by_head = {score["head"]: score for score in metrics["scores"]}
    assert set(by_head) == {*ALL_HEADS, "attention"}
    linear = by_head["logistic"]
    assert linear["level"] == "t=50"
    assert linear["test"] > 0.9
    assert linear["interval"][0] <= linear["test"] <= linear["interval"][1]
    assert linear["tests"] == [linear["test"]]
    assert linear["error"] is None
    assert (linear["dim"], linear["bytes"], linear["flops"]) == (16, 32, None)
    assert linear["forwards"] in (0.5, 1.0)
    assert len(metrics["cells"]) == 4 * len(ALL_HEADS)
    assert all(cell["interval"][0] <= cell["val"] <= cell["interval"][1] for cell in metrics["cells"])
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(written) == {"command", "config_hash", "versions", "seed", "metrics"}
    assert written["metrics"] == json.loads(json.dumps(metrics))
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{linear['test']:.3f}" in page
    assert (tmp_path / "run" / "config.yaml").exists()
    rows = list(csv.DictReader((tmp_path / "run" / "trials.csv").open()))
    # 4 penalties, 4 ridges, 1 k, 2 metrics, 2 norms x 2 rates: none may fall out because it looks like another.
    assert len(rows) == 4 * (4 + 4 + 1 + 2 + 4)
    assert len({(row["layer"], row["level"], row["head"], row["setting"]) for row in rows}) == len(rows)
    again = run_probe(wanted)
    assert again["scores"] == metrics["scores"], "the same seed gives the same numbers, dropout included"


def test_the_saved_head_is_the_scored_one(write_store, tmp_path):
    path = write_store(tmp_path / "store")
    metrics = run_probe(config(path, out=tmp_path / "run"))
    store, linear = FeatureStore(path), metrics["scores"][0]
    head = load_head(tmp_path / "run" / "heads" / "linear")
    assert head.about["layers"] == [linear["layer"]]
    test = store.rows("test")
    predicted = head(store[linear["layer"], linear["level"]][test]).argmax(1)
    assert (predicted.numpy() == store.labels[test]).mean() == linear["test"]
    arrays = np.load(tmp_path / "run" / "arrays.npz")
    assert np.array_equal(arrays["predicted.0"], predicted)
    assert np.array_equal(arrays["labels"], store.labels[test])
    assert arrays["ids"].tolist() == [store.ids[row] for row in test]


def test_combinations_and_poolings_are_read_once_each(write_store, tmp_path):
    store = FeatureStore(write_store(tmp_path / "store"))
    found = readings(store, config("x", combine=("single", "layers", "levels", "all"), pools=("stored", 1, 2, 8)))
    # 2 x 2 alone, 2 + 2 joined along one way, 1 along both; 2 and 8 cells a side are what is stored.
    assert len(found) == 2 * (4 + 2 + 2 + 1)
    assert {one.combine for one in found} == {"single", "layers", "levels", "all"}
    widths = {(one.combine, one.pool): one.read(store).shape[1] for one in found}
    assert widths["single", None] == 16
    assert widths["single", 1] == 4
    assert widths["all", None] == 64
    one = next(one for one in found if one.combine == "layers" and one.pool == 1)
    expected = torch.cat([store[layer, one.level].mean((2, 3)) for layer in ("mid", "up")], dim=1)
    torch.testing.assert_close(one.read(store), expected)


def test_each_way_to_combine_is_scored(write_store, tmp_path):
    metrics = run_probe(config(write_store(tmp_path / "store"), combine=("single", "layers", "all"), finalists=1))
    names = [score["name"] for score in metrics["scores"]]
    assert names == [
        "linear",
        "linear, all layers",
        "linear, all",
        "kNN",
        "kNN, all layers",
        "kNN, all",
    ]
    whole = metrics["scores"][2]
    assert (whole["layer"], whole["level"], whole["forwards"], whole["bytes"]) == (
        "all layers",
        "all levels",
        2.0,
        128,
    )


def test_the_test_split_decides_nothing(write_store, tmp_path):
    """Other test labels change the score and nothing that was chosen."""
    first, second = (
        run_probe(config(write_store(tmp_path / name, labels=labels), heads=ALL_HEADS))
        for name, labels in (("a", "good"), ("b", "other in test"))
    )
    assert first["cells"] == second["cells"]
    for one, other in zip(first["scores"], second["scores"], strict=True):
        assert (one["layer"], one["level"], one["setting"]) == (other["layer"], other["level"], other["setting"])
        assert one["test"] > other["test"]
    task = make_task(FeatureStore(tmp_path / "a"), config("x"))
    assert not set(task.test) & set(task.fit)
    assert len(task.fit) == 60


def test_splits(write_store, tmp_path):
    store = FeatureStore(write_store(tmp_path / "store"))
    task = make_task(store, config("x", test_split=None))
    assert (len(task.train), len(task.val), len(task.test)) == (39, 9, 12)
    assert not set(task.test) & set(task.fit)
    other = make_task(store, config("x", test_split=None), seed=5)
    assert np.array_equal(task.test, other.test), "seeds repeat the choice, not the test"
    assert not np.array_equal(task.val, other.val)
    named = make_task(store, config("x", val_split="test", test_split=None))
    assert np.array_equal(named.val, store.rows("test"))


def test_seeds_repeat_the_whole_choice(write_store, tmp_path):
    store = write_store(tmp_path / "store", spread=2.0)
    metrics = run_probe(config(store, heads=("logistic", "sgd"), seeds=3, trained={"mlp": TrainedConfig(epochs=1)}))
    for score in metrics["scores"]:
        assert len(score["tests"]) == 3
        assert score["test"] == pytest.approx(np.mean(score["tests"]))
        assert score["error"] == pytest.approx(np.std(score["tests"], ddof=1) / 3**0.5)
    assert metrics["samples"]["seeds"] == 3
    single = run_probe(config(store, heads=("logistic", "sgd"), seed=2, out=tmp_path / "second"))
    assert single["scores"][1]["test"] == metrics["scores"][1]["tests"][2]


def test_few_samples(write_store, tmp_path):
    low = LowDataConfig(shots=(1, 5), fractions=(0.5,), tries=3)
    metrics = run_probe(config(write_store(tmp_path / "store"), heads=ALL_HEADS, low_data=low))
    rows = metrics["low_data"]
    assert [row["train"] for row in rows if row["head"] == "logistic"] == ["1 per class", "5 per class", "50 %"]
    assert [row["samples"] for row in rows if row["head"] == "knn"] == [3, 15, 30]
    assert {row["head"] for row in rows} == {"logistic", "knn", "ncm"}
    for row in rows:
        assert len(row["values"]) == 3
        assert row["mean"] == pytest.approx(np.mean(row["values"]))
    assert rows[2]["mean"] >= rows[0]["mean"]


def test_mean_per_class_and_classes_without_test_samples(write_store, tmp_path):
    store = write_store(tmp_path / "store", labels="class 2 not in test")
    with pytest.raises(DataError, match=r"classes \[2\] of the training split have no test sample.*missing=allow"):
        run_probe(config(store))
    metrics = run_probe(config(store, missing="allow", metric="mean_per_class"))
    assert metrics["metric"] == "mean_per_class"
    score = metrics["scores"][0]
    assert score["test"] == pytest.approx(score["mean_per_class"])


def test_multi_label(write_store, tmp_path):
    store = write_store(tmp_path / "store", labels="several")
    metrics = run_probe(
        config(
            store,
            heads=("logistic", "sgd", "ridge", "knn"),
            trained={"linear": TrainedConfig(epochs=30, lr=0.05, batch_size=16)},
        )
    )
    assert metrics["metric"] == "map"
    assert [score["test"] > 0.8 for score in metrics["scores"]] == [True] * 5
    assert metrics["scores"][0]["top5"] is None
    assert metrics["gallery"] == []
    with pytest.raises(ConfigError, match="nearest class mean needs one label"):
        run_probe(config(store, heads=("ncm",)))


@pytest.mark.parametrize(
    ("labels", "options", "error", "text"),
    [
        ("none", {}, DataError, "no labels"),
        ("one", {}, DataError, "one class only"),
        ("new in test", {}, DataError, r"classes \[7\] are among the test samples"),
        ("negative", {}, DataError, "holds the label -1"),
        ("good", {"test_split": "val"}, UnknownNameError, "unknown split 'val'"),
        ("good", {"test_split": "train"}, ConfigError, "a split has one role"),
        ("good", {"val_split": "test"}, ConfigError, "a split has one role"),
        ("good", {"neighbours": (100,)}, ConfigError, "k=100 needs at least 100"),
        ("good", {"low_data": LowDataConfig(shots=(21,))}, ConfigError, "21 samples of each class"),
        ("good", {"trained": {"kNN": TrainedConfig(kind="mlp")}}, ConfigError, "trained.kNN has the name of a head"),
        ("good", {"low_data": LowDataConfig(heads=("ridge",))}, ConfigError, "low_data.heads names 'ridge'"),
    ],
)
def test_stores_that_cannot_be_probed(write_store, tmp_path, labels, options, error, text):
    store = write_store(tmp_path / "store", labels=labels)
    with pytest.raises(error, match=text):
        run_probe(config(store, **options))


def test_a_named_validation_split_needs_every_class(write_store, tmp_path):
    # Roles turned round: the test part, which lacks a class, is what is chosen on.
    store = write_store(tmp_path / "store", labels="class 2 not in test")
    roles = {"val_split": "test", "test_split": None}
    with pytest.raises(DataError, match=r"classes \[2\] of the training split have no validation sample"):
        run_probe(config(store, **roles))
    assert run_probe(config(store, missing="allow", **roles))["samples"]["val"] == 30


def test_one_draw_of_few_samples_has_no_standard_error(write_store, tmp_path):
    low = LowDataConfig(shots=(2,), fractions=(), tries=1)
    metrics = run_probe(config(write_store(tmp_path / "store"), low_data=low))
    assert [(row["samples"], row["error"], len(row["values"])) for row in metrics["low_data"]] == [(6, None, 1)] * 2


def test_heads_that_diverge_are_not_chosen(write_store, tmp_path):
    store = write_store(tmp_path / "store")
    for labels in ("good", "several"):
        store = write_store(tmp_path / labels, labels=labels)
        wild = SGDConfig(norms=("none",), lrs=(0.5, 1e38), scale_lr=False, epochs=20, batch_size=16)
        metrics = run_probe(config(store, heads=("sgd",), sgd=wild))
        assert metrics["scores"][0]["setting"]["lr"] == 0.5
        rows = list(csv.DictReader((tmp_path / labels / "probe" / "trials.csv").open()))
        assert {row["validation"] for row in rows if "1e+38" in row["setting"]} == {"-inf"}
        with pytest.raises(DiffrepError, match="sgd diverged on mid@t=5 with every setting"):
            run_probe(config(store, heads=("sgd",), sgd=wild.model_copy(update={"lrs": (1e38,)})))


def test_a_trained_linear_head_stands_beside_the_logistic_regression(write_store, tmp_path):
    trained = {"linear": TrainedConfig(epochs=2)}
    metrics = run_probe(config(write_store(tmp_path / "store"), out=tmp_path / "run", trained=trained))
    assert [score["name"] for score in metrics["scores"]] == ["linear", "kNN", "linear, trained"]
    assert sorted(one.name for one in (tmp_path / "run" / "heads").iterdir()) == ["linear", "linear-trained"]


def test_the_interval_of_several_seeds_is_of_their_mean(write_store, tmp_path):
    store = write_store(tmp_path / "store", spread=24.0)
    for metric in ("accuracy", "mean_per_class"):
        score = run_probe(config(store, heads=("sgd",), seeds=3, metric=metric, finalists=1))["scores"][0]
        assert len(set(score["tests"])) > 1, "seeds that agree show nothing"
        assert score["interval"][0] < np.mean(score["tests"]) < score["interval"][1]


def test_nan_features_are_named(write_store, tmp_path):
    store = write_store(tmp_path / "store", break_at="up@t=50")
    with pytest.raises(DiffrepError, match="up@t=50 hold NaN or infinity in 3 of 90"):
        run_probe(config(store))


def test_trained_heads_need_the_same_samples(write_store, tmp_path):
    store = write_store(tmp_path / "store", shape=(6,))
    with pytest.raises(ConfigError, match="maps"):
        run_probe(config(store, trained={"attention": TrainedConfig(epochs=1)}))
    other = write_store(tmp_path / "other", test=15)
    with pytest.raises(StoreError, match="75 samples .* 90, 75 of them in both"):
        run_probe(config(store, trained={"mlp": TrainedConfig(store=other)}))
    for wrong in ({"layers": "nope"}, {"levels": 0}):
        with pytest.raises(UnknownNameError, match="nope|'0'"):
            run_probe(config(store, trained={"mlp": TrainedConfig(**wrong)}))
    same = write_store(tmp_path / "same", shape=(6,))
    with pytest.raises(ConfigError, match="reads one layer and level and .* holds several"):
        run_probe(config(store, trained={"mlp": TrainedConfig(store=same)}))


def test_layers_and_levels_of_trained_heads_as_users_write_them(write_store, tmp_path):
    store = write_store(tmp_path / "store")
    one = TrainedConfig(kind="attention", epochs=1, width=16, layers="up", levels=5)
    many = TrainedConfig(epochs=1, width=16, pool=2)
    metrics = run_probe(config(store, trained={"mine": one, "difformer": many}))
    mine, difformer = metrics["scores"][-2:]
    assert (mine["name"], mine["head"], mine["layer"], mine["level"]) == ("mine", "attention", "up", "t=5")
    assert (difformer["layer"], difformer["level"]) == ("mid + up", "t=5 + t=50")
    assert difformer["forwards"] == 2.0


def test_judge_and_choose_read_any_features(blobs):
    x, y = blobs(90)
    task = Task(y, 3, np.arange(50), np.arange(50, 70), np.arange(70, 90))
    wanted = config("x", strengths=(1e-3, 1e-1))
    one, neighbours = judge(Reading("pixels", ""), x, task, wanted, 0)
    assert (one.reading.layer, one.dim, neighbours.setting) == ("pixels", 12, {"k": 3})
    assert one.val > 0.8
    noise = torch.randn(90, 12, generator=torch.Generator().manual_seed(0))
    lucky = judge(Reading("noise", ""), noise, task, wanted, 0)[0]
    features = {"pixels": x, "noise": noise}
    chosen = choose(lambda reading: features[reading.layer], [lucky, one], "logistic", task, wanted, 0)
    assert chosen.reading.layer == "pixels"


def test_the_report_shows_the_images_that_the_store_was_made_from(tmp_path):
    from diffrep import run_extract

    extract = ExtractConfig(
        backbone="fashion-unet",
        data={"path": "fashion-demo", "size": 32, "fit": "pad", "limit": {"train": 60, "test": 30}},
        request={"layers": ["mid_block"], "levels": [10], "pool": 1},
        out=tmp_path / "store",
    )
    store = run_extract(extract)
    assert store.meta["costs"]["network_flops"] > 1e6
    metrics = run_probe(config(store.path, missing="allow", finalists=1))
    assert metrics["notes"] == []
    arrays = np.load(tmp_path / "store" / "probe" / "arrays.npz")
    rows = {row for group in metrics["gallery"] for row in group["rows"]}
    assert set(arrays["thumbnail_rows"].tolist()) == rows
    assert arrays["thumbnails"].shape == (len(rows), 32, 32, 3)
    share = metrics["scores"][0]["forwards"]
    assert metrics["scores"][0]["flops"] == pytest.approx(share * store.meta["costs"]["network_flops"])
    (tmp_path / "store" / "config.yaml").unlink()
    assert "no test images" in run_probe(config(store.path, missing="allow", finalists=1))["notes"][0]


def test_the_images_of_a_remote_store_are_found(unet, image_folder, tmp_path):
    request = FeatureRequest("mid_block", [100], pool="mean")
    out = f"memory://{tmp_path.name}/store"
    ExtractJob(ExtractConfig(backbone="net", data=str(image_folder), request=request, out=out), unet).run()
    metrics = run_probe(config(out, out=tmp_path / "run", missing="allow", heads=["knn"]))
    assert metrics["gallery"]
    assert not any("no test images" in note for note in metrics["notes"])


def test_levels_of_a_trajectory_share_what_leads_to_them(unet, image_folder, tmp_path):
    request = FeatureRequest("mid_block", ["inversion 1/4", "inversion 2/4"], noise="inversion", pool="mean")
    data = DataConfig(path=str(image_folder), limit=2)
    job = ExtractJob(ExtractConfig(backbone="net", data=data, request=request, out=str(tmp_path / "store")), unet)
    store, plan = job.run(), job.plan()
    share = plan.costs["mid_block"]
    both = cost_of([("mid_block", level) for level in store.levels], store)
    assert both.flops == pytest.approx(plan.flops)
    assert both.forwards == pytest.approx(2 + share)
    assert cost_of([("mid_block", "inversion 1/4")], store).forwards == pytest.approx(1 + share)
