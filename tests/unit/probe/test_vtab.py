"""VTAB-1k from prepared folders of a few small images: a whole group, resumed, refused, and with two processes."""

import argparse
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diffrep import load_backbone
from diffrep.cli import vtab as verb
from diffrep.config import load_config
from diffrep.config.vtab import VtabConfig
from diffrep.data.vtab import TASKS
from diffrep.errors import ConfigError, DataError, LayerError, UnknownNameError
from diffrep.extract.job import open_backbone
from diffrep.probe.run import NAMES
from diffrep.probe.vtab import check_vtab, run_vtab, table, unfinished
from diffrep.store import FeatureStore

SPECIALIZED = ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy")
COUNTS = {"train800": 16, "val200": 8, "test": 20}


def write_task(root, name, step=18, classes=2):
    """A task whose classes differ in brightness by `step`, with as much noise."""
    rng = np.random.default_rng(list(TASKS).index(name))
    for split, count in COUNTS.items():
        folder = root / name / "images" / split
        folder.mkdir(parents=True)
        lines = []
        for number in range(count):
            label = number % classes
            value = np.clip(60 + step * label + rng.normal(0, step) + rng.normal(0, 20, (16, 16)), 0, 255)
            Image.fromarray(value.astype(np.uint8)).save(folder / f"{number:06d}.png")
            lines.append(f"images/{split}/{number:06d}.png {label}\n")
        (root / name / f"{split}.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vtab-1k")
    for number, name in enumerate((*SPECIALIZED, "dtd")):
        write_task(folder, name, step=12 + 10 * number)
    return folder


@pytest.fixture
def words(root, unet_folder, tmp_path):
    """The command's words, with changes."""

    def make(*changes):
        given = [
            f"backbone={unet_folder}", "backbone.device=cpu", f"data={root}", "data.size=16", "request.layers=blocks",
            "request.levels=[1,300]", "request.pool=mean", f"out={tmp_path / 'run'}", "probe.heads=[logistic,ncm]",
            "probe.strengths=[0.01,1.0]", "probe.device=cpu", "tasks=[eurosat]", *changes,
        ]  # fmt: skip
        return given

    return make


@pytest.fixture
def make(words):
    return lambda *changes: load_config(VtabConfig, [], words(*changes))


@pytest.fixture(scope="module")
def finished(root, unet_folder, unet, tmp_path_factory):
    """A run of the group Specialized and of one task of Natural."""
    out = tmp_path_factory.mktemp("run")
    config = VtabConfig(
        backbone=unet_folder, data={"path": root, "size": 16}, out=out, tasks=("dtd", *SPECIALIZED),
        request={"layers": "blocks", "levels": [1, 300], "pool": "mean"},
        probe={"heads": ["logistic", "ncm"], "strengths": [0.01, 1.0], "device": "cpu"},
    )  # fmt: skip
    return config, run_vtab(config, unet), out


def test_a_task_is_scored_as_vtab_1k_says(finished):
    """Chosen on val200 by fits on train800, fitted again on both, here by scikit-learn, and scored on all of test."""
    _, metrics, out = finished
    for row in metrics["tasks"]:
        store = FeatureStore(out / row["task"] / "features")
        scores = json.loads((out / row["task"] / "probe" / "results.json").read_text())["metrics"]["scores"]
        train, val, test = (store.rows(split) for split in COUNTS)
        assert row["samples"] == {"train": 16, "val": 8, "test": 20}
        linear = next(score for score in scores if score["head"] == "logistic")
        found = {}
        for layer in store.layers:
            for level in store.levels:
                for penalty in (0.01, 1.0):
                    x, y = store.numpy(layer, level).astype(np.float64), store.labels

                    def fit(rows, x=x, y=y, penalty=penalty):
                        # Of two classes scikit-learn penalises one row of weights, and a softmax has two.
                        head = LogisticRegression(C=2 / (penalty * len(rows)), max_iter=1000)
                        return make_pipeline(StandardScaler(), head).fit(x[rows], y[rows])

                    both = fit(np.concatenate([train, val]))
                    found[layer, level, penalty] = fit(train).score(x[val], y[val]), both.score(x[test], y[test])
        chosen = linear["layer"], linear["level"], linear["setting"]["penalty"]
        assert linear["val"] == max(val for val, _ in found.values()) == found[chosen][0]
        assert linear["test"] == pytest.approx(found[chosen][1])
        assert row["val"] == max(score["val"] for score in scores)
        best = next(score for score in scores if score["name"] == row["name"])
        assert (row["test"], row["val"]) == (best["test"], best["val"])


def test_the_mean_of_a_group_stands_when_all_its_tasks_do(finished):
    _, metrics, _ = finished
    tests = {row["task"]: row["test"] for row in metrics["tasks"]}
    assert list(tests) == ["dtd", *SPECIALIZED], "VTAB's order"
    assert len(set(tests.values())) > 1
    assert metrics["means"]["Specialized"]["mean"] == pytest.approx(np.mean([tests[name] for name in SPECIALIZED]))
    assert metrics["means"]["Natural"]["mean"] is metrics["means"]["all"]["mean"] is None
    assert "dtd" not in metrics["means"]["Natural"]["missing"] and len(metrics["means"]["all"]["missing"]) == 14
    heads = metrics["heads"]
    assert list(heads) == [NAMES["logistic"], NAMES["ncm"]]
    for head in heads.values():
        assert head["means"]["Specialized"]["mean"] == pytest.approx(np.mean([head["tests"][n] for n in SPECIALIZED]))


def test_the_table(finished):
    _, metrics, out = finished
    text = (out / "table.md").read_text()
    assert text == table(metrics)
    row = metrics["tasks"][0]
    assert f"| [dtd](dtd/probe/report.html) | Natural | {row['test']:.3f} |" in text
    assert f"| **Specialized** | 4 of 4 tasks | **{metrics['means']['Specialized']['mean']:.3f}** |" in text
    assert "| **All 19 tasks** | 5 of 19 tasks | **–** |" in text
    assert f"| task | {NAMES['logistic']} | {NAMES['ncm']} |" in text
    assert all((out / row["report"]).stat().st_size > 5000 for row in metrics["tasks"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {7, 4}
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"] == metrics and results["seed"] == 0


def test_finished_tasks_are_not_repeated(finished, unet, tmp_path):
    config, metrics, out = finished
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent != out}
    assert load_config(VtabConfig, [out / "config.yaml"], []) == config
    # Nothing is left to do, so neither network nor images are needed.
    gone = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "gone")})})
    assert run_vtab(gone.model_copy(update={"backbone": config.backbone.model_copy(update={"device": "cpu"})})) == (
        metrics
    )
    one = config.model_copy(update={"tasks": ("eurosat",), "batch_size": 5})
    assert run_vtab(one, unet) == metrics, "the other tasks of the folder stay in the table"
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_a_stopped_run_goes_on(make, unet, tmp_path, root, capsys):
    broken = tmp_path / "tasks"
    for name in ("eurosat", "resisc45"):
        write_task(broken, name)
    file = broken / "resisc45" / "images" / "test" / "000003.png"
    good = file.read_bytes()
    file.write_bytes(bytes(len(good)))  # of the same size, or it would be another data set
    config = make(f"data={broken}", "tasks=[resisc45,eurosat]", "unit_size=8")
    with pytest.raises(DataError, match=r"^resisc45: images/test/000003.png: cannot read the image"):
        run_vtab(config, unet)
    out = tmp_path / "run"
    partial = json.loads((out / "results.json").read_text())["metrics"]
    assert [row["task"] for row in partial["tasks"]] == ["eurosat"]
    kept = {path: path.stat().st_mtime_ns for path in (out / "eurosat").rglob("*")}
    unit = out / "resisc45" / "features" / "units" / "0000" / "0000000.safetensors"
    when = unit.stat().st_mtime_ns
    file.write_bytes(good)
    capsys.readouterr()
    metrics = run_vtab(config, unet)
    assert capsys.readouterr().out.startswith("1/1 resisc45, 44 images")
    assert [row["task"] for row in metrics["tasks"]] == ["eurosat", "resisc45"]
    assert metrics["tasks"][0] == partial["tasks"][0]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert unit.stat().st_mtime_ns == when, "finished units of an unfinished task stay"


def test_other_settings_are_refused(finished, make, unet, root):
    config, metrics, out = finished
    other = config.model_copy(update={"request": make("request.levels=[5]").request})
    with pytest.raises(ConfigError, match=r"other settings \(request.levels: \[1, 300\] there, \[5\] now\)"):
        run_vtab(other, unet)
    assert json.loads((out / "results.json").read_text())["metrics"] == metrics


def test_other_weights_are_refused(finished, unet, unet_folder, root, tmp_path):
    """The source may be the same folder whose weights were trained on: a table of both would be of neither."""
    config, metrics, out = finished
    shutil.copytree(out, tmp_path / "run")
    other = load_backbone(unet_folder, device="cpu")
    other.network.conv_in.bias.data += 1
    mixed = config.model_copy(update={"out": str(tmp_path / "run")})
    (tmp_path / "run" / "eurosat" / "done.json").unlink()
    before = unet.weights_hash
    with pytest.raises(ConfigError, match=rf"\(weights: {before} there, {other.weights_hash} now\); use another out"):
        run_vtab(mixed, other)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"] == metrics
    # A plan reads no weights, and compares the rest.
    light = open_backbone(config.backbone.model_copy(update={"device": "meta"}))
    assert list(check_vtab(mixed, unfinished(mixed), light)) == ["eurosat"]
    with pytest.raises(ConfigError, match=r"other settings \(cond: None there, 3 now\)"):
        check_vtab(mixed.model_copy(update={"cond": 3}), ["eurosat"], light)
    assert run_vtab(mixed, unet) == metrics


def test_missing_folders(make, unet, root, tmp_path):
    with pytest.raises(DataError, match=r"14 of 19 task folders are not in .*: caltech101, cifar, .*smallnorb_ele;"):
        run_vtab(make("tasks=null"), unet)
    with pytest.raises(DataError, match=r"1 of 2 task folders .*: kitti; prepare them, or name those to run in tasks"):
        run_vtab(make("tasks=[eurosat,kitti]"), unet)
    with pytest.raises(UnknownNameError, match="unknown VTAB task 'eurosatt'; did you mean 'eurosat'"):
        run_vtab(make("tasks=[eurosatt]"), unet)
    assert not (tmp_path / "run").exists(), "told before anything is written"


def test_what_cannot_work_is_told_first(make, unet, tmp_path):
    folder = tmp_path / "tasks"
    for name in ("eurosat", "resisc45"):
        write_task(folder, name)
    lines = folder / "resisc45" / "train800.txt"
    good = lines.read_text()
    changes = f"data={folder}", "tasks=[eurosat,resisc45]"
    with pytest.raises(LayerError, match="up_blocks"):
        run_vtab(make(*changes, "request.layers=up_block.0"), unet)
    lines.write_text(good + "images/train800/000099.png 0\n")
    with pytest.raises(DataError, match=r"^resisc45: .*train800.txt, line 17: there is no file"):
        run_vtab(make(*changes), unet)
    lines.write_text("".join(f"{line[:-1]}0\n" for line in good.splitlines()))
    with pytest.raises(DataError, match="^resisc45: the training samples hold one class only"):
        run_vtab(make(*changes), unet)
    assert not (tmp_path / "run").exists()


def test_config(make):
    with pytest.raises(ConfigError, match=r"data.size is required"):
        make("data.size=null")
    for change in ("data.kind=folder", "data.splits=[test]"):
        with pytest.raises(ConfigError, match="kind and splits are those of VTAB-1k"):
            make(change)
    with pytest.raises(ConfigError, match="tasks names one twice"):
        make("tasks=[dtd,dtd]")
    with pytest.raises(ConfigError, match="probe: store, val_split, metric: VTAB-1k settles splits and metric"):
        make("probe.val_split=test", "probe.store=x", "probe.metric=mean_per_class")
    with pytest.raises(ConfigError, match="tasks: .* at least 1 item"):
        make("tasks=[]")
    with pytest.raises(ConfigError, match="probe.head: unknown key; did you mean 'heads'"):
        make("probe.head=knn")
    assert make("tasks=dtd").tasks == ("dtd",)


def test_classes_that_training_lacks_cost_their_samples(make, unet, tmp_path):
    """As in SUN397, whose 397 classes are not all among 800 images."""
    folder = tmp_path / "tasks"
    write_task(folder, "sun397", step=60)
    file = folder / "sun397" / "test.txt"
    words = f"data={folder}", "tasks=sun397", "probe.heads=[knn,ncm,ridge,logistic]", "probe.neighbours=3"
    known = run_vtab(make(*words), unet)["heads"]
    with np.load(tmp_path / "run" / "sun397" / "probe" / "arrays.npz") as arrays:
        right = [arrays[f"predicted.{number}"] == arrays["labels"] for number in range(len(known))]
    lines = file.read_text().splitlines()
    lines[:4] = [f"{line.rpartition(' ')[0]} {5 + number}" for number, line in enumerate(lines[:4])]
    file.write_text("\n".join(lines) + "\n")
    unknown = run_vtab(make(*words, f"out={tmp_path / 'other'}"), unet)["heads"]
    for hits, (name, head) in zip(right, unknown.items(), strict=True):
        assert head["tests"]["sun397"] == pytest.approx(hits[4:].sum() / 20), name
        assert known[name]["tests"]["sun397"] == pytest.approx(hits.mean()), name
        assert hits[:4].any(), "some of them were right before"
    lines = (folder / "sun397" / "val200.txt").read_text().splitlines()
    (folder / "sun397" / "val200.txt").write_text("\n".join([*lines[:-1], f"{lines[-1][:-1]}9"]) + "\n")
    assert run_vtab(make(*words, f"out={tmp_path / 'val'}"), unet)["tasks"][0]["val"] <= 7 / 8


def test_a_limit_is_noted(make, unet):
    metrics = run_vtab(make("data.limit.test=10", "probe.heads=ncm"), unet)
    assert metrics["tasks"][0]["samples"]["test"] == 10
    assert "data.limit is {'test': 10}: these are not the scores of VTAB-1k." in table(metrics)
    assert "Every head" not in table(metrics), "one head needs one table"


def test_a_baseline_is_never_the_score_of_a_task(make, unet):
    metrics = run_vtab(make("request.levels=[999]", "probe.baselines=pixels"), unet)
    (row,) = metrics["tasks"]
    *heads, baseline = metrics["heads"]
    assert baseline == f"{NAMES['logistic']} on raw pixels"
    assert metrics["heads"][baseline]["tests"]["eurosat"] > row["test"], "almost nothing but noise is left at t=999"
    assert row["name"] in heads


def run_verb(words):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(words))


def test_the_verb(words, capsys, tmp_path):
    assert run_verb([*words("tasks=[eurosat,resisc45]"), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert plan.startswith("eurosat\nsplits    train800 16, val200 8, test 20\n") and "\nresisc45\n" in plan
    assert not (tmp_path / "run").exists()
    assert run_verb(words("probe.heads=ncm")) == 0
    printed = capsys.readouterr().out
    assert "| [eurosat](eurosat/probe/report.html) | Specialized | 0." in printed
    assert printed.endswith(f"table: {tmp_path / 'run' / 'table.md'}\n")


BOTH = """
import sys
from diffrep import dist
from diffrep.config import load_config
from diffrep.config.vtab import VtabConfig
from diffrep.probe.vtab import run_vtab
found = run_vtab(load_config(VtabConfig, [], sys.argv[1:]))
assert dist.state().num_processes == 2
assert bool(found) == dist.state().is_main_process
dist.teardown()
"""


@pytest.mark.mp
def test_two_processes(words, unet, make, tmp_path, two_processes):
    """The same table, each written by one process."""
    changes = "tasks=[eurosat,resisc45]", "unit_size=6"
    done = two_processes.run(*words(*changes), source=BOTH)
    assert done.codes == [0, 0], done.err
    both = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert both == run_vtab(make(*changes, f"out={tmp_path / 'one'}"), unet)
