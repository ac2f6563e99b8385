"""The search, on the bundled images and a tiny network: who stays, what is extracted, and what it costs."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffrep import FeatureStore, load_backbone
from diffrep.config import validate
from diffrep.config.search import SearchConfig
from diffrep.errors import ConfigError, DataError, DiffrepError, StoreError
from diffrep.extract.job import ExtractJob
from diffrep.probe.race import Rung, groups, ladder, members, survivors
from diffrep.probe.rung import JointStore, extract_together
from diffrep.probe.search import Search, run_search
from diffrep.probe.task import Task
from diffrep.testing import tiny_backbone

LAYERS = ["conv_in", "down_blocks.0", "mid_block", "up_blocks.1"]
LEVELS = [5, 300, 900]
DATA = {"path": "fashion-demo", "size": 16, "limit": {"train": 180, "test": 40}}


def make(folder, out, **changes):
    values = {
        "backbone": str(folder),
        "data": DATA,
        "request": {"layers": LAYERS, "levels": LEVELS, "pool": 4, "dtype": "float32"},
        "out": str(out),
        "first": 50,
        "keep": 3,
        "unit_size": 50,
        "head": "ridge",
        "probe": {"heads": ["ridge"], "ridges": [0.1, 1.0], "missing": "allow", "folds": 2},
    }
    return validate(SearchConfig, values | changes)


def make_and_run(folder, out, **changes):
    return run_search(make(folder, out, **changes))


@pytest.fixture(scope="module")
def counted(unet_folder, tmp_path_factory):
    """A search that was run to its end, its metrics, and the FLOPs and rows that really went through the network."""
    backbone = load_backbone(unet_folder, device="cpu")
    spent = watch(backbone)
    config = make(unet_folder, tmp_path_factory.mktemp("search"))
    search = Search(config, backbone)
    return search, search.run(), spent


def watch(backbone):
    """Counts what the network really does, around its `capture`."""
    spent = Counter()
    capture = backbone.capture

    def counting(x, time, layers, *arguments, **options):
        # The counter knows no formula for the CPU's fused attention.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            found = capture(x, time, layers, *arguments, **options)
        spent["flops"] += counter.get_total_flops()
        spent["forwards"] += len(x)
        return found

    backbone.capture = counting
    return spent


def stores_of(search, number):
    folder = search.out / "rungs" / str(number)
    return {store.name: FeatureStore(store) for store in sorted(folder.iterdir()) if store.is_dir()}


def test_rungs_shrink_by_the_factor_until_few_are_left(unet_folder, tmp_path):
    config = make(unet_folder, tmp_path, first=100, factor=3, keep=2)
    assert ladder(config, 56, 10_000) == [Rung(100, 56, 19), Rung(300, 19, 7), Rung(900, 7, 3), Rung(2700, 3, 2)]
    # Where the samples end first, the last rung cuts to what is kept.
    assert ladder(config, 56, 900) == [Rung(100, 56, 19), Rung(300, 19, 2)]


def test_rungs_may_be_given():
    values = {"backbone": "b", "data": "d", "out": "o", "request": {"levels": [5]}, "rungs": [50, 60, 400], "keep": 4}
    config = validate(SearchConfig, values)
    assert config.request.layers == ("blocks",)
    assert ladder(config, 16, 400) == [Rung(50, 16, 8), Rung(60, 8, 4)]
    assert ladder(config, 100, 400) == [Rung(50, 100, 50), Rung(60, 50, 25), Rung(400, 25, 4)]
    assert validate(SearchConfig, values | {"first": 500}) == config, "rungs win over the first of a config file"
    values["rungs"] = None
    assert validate(SearchConfig, values).first == validate(SearchConfig, values | {"first": None}).first == 1000
    assert ladder(validate(SearchConfig, values | {"first": 70}), 16, 400)[0] == Rung(70, 16, 8)


@pytest.mark.parametrize("several", [False, True])
def test_rungs_are_nested_and_hold_every_class_in_its_share(several):
    rng = np.random.default_rng(0)
    labels = rng.choice(5, 600, p=[0.5, 0.3, 0.1, 0.08, 0.02])
    labels = np.eye(5, dtype=np.int64)[labels] | (rng.random((600, 5)) < 0.02) if several else labels
    rows = rng.permutation(600)
    task = Task(torch.from_numpy(labels), 5, np.sort(rows[:400]), np.sort(rows[400:500]), rows[500:], several)
    before = (set(), set())
    for size in range(31, 501, 7):
        train, val = members(task, size, seed=3)
        assert len(train) + len(val) == size
        assert abs(len(val) - size / 5) <= 1
        assert before[0] <= set(train) <= set(task.train)
        assert before[1] <= set(val) <= set(task.val)
        before = (set(train), set(val))
        for part, whole in ((train, task.train), (val, task.val)):
            shares = [np.eye(5)[labels[p]].mean(0) if not several else labels[p].mean(0) for p in (part, whole)]
            assert (shares[0] > 0).all()
            if not several:
                assert np.abs(shares[0] - shares[1]).max() * len(part) < 2
    assert not np.array_equal(members(task, 100, seed=3)[0], members(task, 100, seed=4)[0])


def test_the_best_stay_and_equals_are_taken_in_order():
    cells = [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    assert survivors(cells, [0.5, 0.9, 0.9, 0.9], 2) == [("a", "2"), ("b", "1")]


def test_levels_with_the_same_layers_share_a_request():
    cells = [("a", "1"), ("a", "2"), ("b", "2"), ("a", "3"), ("b", "3"), ("b", "4")]
    assert groups(cells) == [(("a",), ("1",)), (("a", "b"), ("2", "3")), (("b",), ("4",))]


def test_flops_are_those_that_the_network_really_spent(counted):
    search, metrics, spent = counted
    cost, rungs = metrics["search"]["cost"], metrics["search"]["rungs"]
    assert spent["flops"] == cost["flops"] == sum(rung["flops"] for rung in rungs) + cost["ranking_flops"]
    assert spent["forwards"] == sum(rung["forwards"] for rung in rungs) + 50 * len(LEVELS)
    assert [rung["samples"] for rung in rungs] == [50, 100, 180]
    # The full grid, run for comparison.
    full = load_backbone(search.config.backbone.source, device="cpu")
    really = watch(full)
    ExtractJob(search.extract.model_copy(update={"out": str(search.out / "full")}), full).run()
    assert really["flops"] == cost["full_flops"]
    assert cost["share"] == pytest.approx(spent["flops"] / really["flops"])
    assert rungs[-1]["flops"] < really["flops"]


def test_only_new_samples_of_cells_in_the_race_are_extracted(counted):
    search, metrics, _ = counted
    rungs, seen = metrics["search"]["rungs"], set()
    for number, rung in enumerate(rungs, 1):
        stores = {name: store for name, store in stores_of(search, number).items() if name != "again"}
        cells = [(layer, level) for s in stores.values() for layer in s.layers for level in s.levels]
        assert sorted(cells) == sorted((cell["layer"], cell["level"]) for cell in rung["cells"])
        ids = [set(store.ids) for store in stores.values()]
        assert all(one == ids[0] for one in ids)
        assert not ids[0] & seen
        seen |= ids[0]
        assert number == len(rungs) or not any(name.startswith("test:") for name in seen)
    assert len(seen) == 220


def test_the_best_stay_by_their_validation_scores(counted):
    rungs = counted[1]["search"]["rungs"]
    assert [len(rung["cells"]) for rung in rungs] == [12, 6, 3]
    for rung, following in zip(rungs, rungs[1:], strict=False):
        kept = [cell["val"] for cell in rung["cells"] if cell["kept"]]
        left = [cell["val"] for cell in rung["cells"] if not cell["kept"]]
        assert min(kept) >= max(left)
        named = [(cell["layer"], cell["level"]) for cell in rung["cells"] if cell["kept"]]
        assert named == [(cell["layer"], cell["level"]) for cell in following["cells"]]
    # A cell that is better than the others at every size wins: noise drowns the images at t=900.
    assert counted[1]["search"]["winner"]["level"] != "t=900"


def test_joint_features_are_those_of_one_extraction(counted):
    search, metrics, _ = counted
    full = FeatureStore(search.out / "full")
    parts = [[store for name, store in stores_of(search, number).items() if name != "again"] for number in (1, 2, 3)]
    cells = [(cell["layer"], cell["level"]) for cell in metrics["search"]["rungs"][-1]["cells"]]
    joint = JointStore(parts, search.images, cells, search.out)
    assert joint.ids == full.ids
    assert np.array_equal(joint.labels, full.labels)
    for cell in cells:
        torch.testing.assert_close(joint.tensor(*cell), full[cell], atol=1e-5, rtol=1e-4)


def test_the_run_folder_is_that_of_a_probe_with_the_race_in_it(counted):
    search, metrics, _ = counted
    results = json.loads((search.out / "results.json").read_text())
    assert results["metrics"]["search"] == json.loads(json.dumps(metrics["search"]))
    score = metrics["scores"][0]
    winner = metrics["search"]["winner"]
    assert (score["layer"], score["level"]) == (winner["layer"], winner["level"])
    assert 0.1 < score["test"] < 1
    page = (search.out / "report.html").read_text()
    assert "<h2>The search</h2>" in page
    assert "Without labels" in page
    assert "first: 50" in (search.out / "config.yaml").read_text()
    assert len(list((search.out / "heads").iterdir())) == 1


def test_a_search_goes_on_without_repeating(counted, unet_folder, tmp_path):
    backbone, once = load_backbone(unet_folder, device="cpu"), counted[2]
    config = make(unet_folder, tmp_path)
    spent, capture = watch(backbone), backbone.capture

    def stopping(*arguments, **options):
        if spent["forwards"] > 400:
            raise KeyboardInterrupt
        return capture(*arguments, **options)

    backbone.capture = stopping
    with pytest.raises(KeyboardInterrupt):
        run_search(config, backbone)
    assert 0 < spent["forwards"] < once["forwards"]
    backbone.capture = capture
    # A batch of the unit in which it was stopped is all that is done again; how large batches are may change.
    metrics = run_search(config.model_copy(update={"batch_size": 48}), backbone)
    assert once["forwards"] <= spent["forwards"] <= once["forwards"] + 50 * len(LEVELS)
    assert metrics["search"] == counted[1]["search"]
    before = dict(spent)
    assert run_search(config, backbone)["scores"] == metrics["scores"]
    assert spent == before
    with pytest.raises(ConfigError, match="head: ridge there, knn now"):
        run_search(make(unet_folder, tmp_path, head="knn"), backbone)
    with pytest.raises(StoreError, match=r"backbone\.weights"):
        run_search(config, load_backbone(unet_folder, device="cpu", init_seed=1))


def test_each_image_is_encoded_once_for_all_groups(tmp_path):
    backbone = tiny_backbone("unet2d-condition", tmp_path / "net")
    cond = tmp_path / "cond.safetensors"
    from safetensors.torch import save_file

    save_file({"cond": torch.randn(5, 12, generator=torch.Generator().manual_seed(0))}, cond)
    values = {"layers": ["down_blocks.0", "mid_block"], "levels": [5, 300], "pool": "mean", "dtype": "float32"}
    data = {"path": "fashion-demo", "size": 16, "limit": {"train": 100, "test": 40}}
    config = make(tmp_path / "net", tmp_path / "out", data=data, request=values, cond=str(cond), keep=2, batch_size=7)
    search, seen = Search(config, backbone), Counter()

    def counting(_, inputs, __):
        if inputs[0].device.type != "meta":  # plans run on a copy without data
            seen["images"] += len(inputs[0])

    backbone.codec.vae.encoder.register_forward_hook(counting)
    rows = search.images.subset(range(20))
    layers = values["layers"]
    requests = {
        "one": replace(config.request, layers=tuple(layers[:1]), levels=(5,)),
        "other": replace(config.request, layers=tuple(layers), levels=(300,)),
    }
    together = extract_together(search.extract, backbone, rows, requests, tmp_path / "together")
    assert seen["images"] == 20
    other = search.extract.model_copy(update={"request": requests["other"], "out": str(tmp_path / "alone")})
    alone = ExtractJob(other, backbone, rows).run()
    assert seen["images"] == 40
    for layer in layers:
        torch.testing.assert_close(together[1][layer, 300], alone[layer, 300])


def test_ranking_agrees_with_hand_computed_numbers(counted):
    search, metrics, _ = counted
    ranking = metrics["search"]["ranking"]
    assert [(row["layer"], row["level"]) for row in ranking] == search.cells
    stores = stores_of(search, 1)
    row = ranking[4]
    a, b = (stores[name][row["layer"], row["level"]].flatten(1).double() for name in ("0", "again"))
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    assert row["alignment"] == pytest.approx((a - b).square().sum(1).mean().item())
    assert row["alignment"] > 1e-4
    distances = torch.pdist(a).square()
    assert row["uniformity"] == pytest.approx((-2 * distances).exp().mean().log().item(), rel=1e-6)
    assert row["score"] == pytest.approx(-row["alignment"] - row["uniformity"])
    pick = metrics["search"]["pick"]
    assert pick["score"] == max(row["score"] for row in ranking)
    assert -1 <= metrics["search"]["spearman"] <= 1
    assert any(pick["layer"] in note and "label-free" in note for note in metrics["notes"])


def test_images_without_labels_are_ranked_alone(unet_folder, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (16, 16), np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    data = {"path": str(tmp_path / "photos"), "size": 16}
    probe = {"train_split": "all", "test_split": None}
    request = {"layers": ["conv_in", "mid_block"], "levels": ["clean", 100]}
    given = {"data": data, "probe": probe, "request": request, "first": 10}
    with pytest.raises(DataError, match="has no labels.*ranking=only"):
        make_and_run(unet_folder, tmp_path / "a", **given)
    metrics = make_and_run(unet_folder, tmp_path / "b", **given, ranking="only")
    found = metrics["search"]
    assert found["rungs"] == [] and found["winner"] is None and found["spearman"] is None
    assert len(found["ranking"]) == 4
    assert [row["alignment"] == 0 for row in found["ranking"]] == [True, False, True, False]
    assert found["cost"]["share"] == pytest.approx(10 / 12 * 1.5)
    assert "no accuracy was measured" in metrics["notes"][0]
    assert "Without labels" in (tmp_path / "b" / "report.html").read_text()
    with pytest.raises(ConfigError, match="no two noise draws"):
        make_and_run(unet_folder, tmp_path / "c", **given | {"request": request | {"levels": ["clean"]}})


def test_an_unreadable_image_can_be_skipped(unet_folder, image_folder, tmp_path):
    import shutil

    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "train" / "class1" / "2.png").write_bytes(b"no image")
    changes = {"data": str(folder), "rungs": [16], "request": {"layers": LAYERS[:2], "levels": [5, 300], "pool": 2}}
    values = make(unet_folder, tmp_path / "a", on_error="skip", keep=2).model_dump() | changes
    metrics = run_search(validate(SearchConfig, values))
    assert metrics["samples"]["train"] + metrics["samples"]["val"] == 17
    with pytest.raises(DataError, match="2.png"):
        run_search(validate(SearchConfig, values | {"on_error": "stop", "out": str(tmp_path / "b")}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": 181}, r"rung of 181 samples is asked for and there are 180"),
        ({"first": 12}, r"has 9 to fit on and 3 to choose on, too few.*at least 4\d samples"),
        ({"keep": 12}, r"keep=12 would keep the whole grid of 12 cells"),
        ({"request": {"layers": "mid_block", "levels": 5}}, r"one layer at one level"),
        ({"factor": 1}, r"factor: Input should be greater than or equal to 2"),
        ({"rungs": [50, 50]}, r"rungs must rise"),
        ({"rungs": []}, r"rungs: .* at least 1 item"),
        (
            {"data": DATA | {"splits": ["train"]}},
            r"data\.splits is \['train'\], and .* reads \['train', 'test'\]",
        ),
        ({"data": DATA | {"splits": ["train", "test"]}, "ranking": "only"}, r"this search reads \['train'\]"),
        ({"data": DATA | {"limit": {"trian": 180}}}, r"unknown split in data.limit 'trian'"),
        ({"head": "attention"}, r"head: Input should be 'logistic', 'ridge' or 'knn'"),
        ({"head": "knn", "probe": {"neighbours": 50, "missing": "allow"}}, r"k=50 needs as many.*has 39"),
        ({"probe": {"store": "x"}}, r"probe\.store is the search's own"),
        ({"probe": {"trained": {"mlp": {}}}}, r"probe\.trained needs what a search does not extract"),
        ({"probe": {"train_split": "training"}}, r"unknown split 'training'"),
        ({"request": {"layers": "mid_blok", "levels": [5, 9]}}, r"mid_blok"),
    ],
)
def test_mistakes_are_told_before_any_work(unet_folder, tmp_path, changes, message):
    with pytest.raises(DiffrepError, match=message):
        Search(make(unet_folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_splits_that_the_roles_name_too_are_taken(unet_folder, tmp_path):
    search = Search(make(unet_folder, tmp_path, data=DATA | {"splits": ["test", "train"]}))
    assert {name: len(rows) for name, rows in search.images.splits.items()} == {"train": 180, "test": 40}
    # Nothing of a split that a ranking without labels does not read is opened, nor is its limit a mistake.
    search = Search(make(unet_folder, tmp_path, ranking="only"))
    assert {name: len(rows) for name, rows in search.images.splits.items()} == {"train": 180}


def test_features_that_are_not_finite_end_it(tmp_path):
    backbone = tiny_backbone("unet2d", tmp_path / "net")
    backbone.network.mid_block.resnets[0].conv2.bias.data[0] = float("nan")
    with pytest.raises(DiffrepError, match=r"mid_block@t=\d+ are not finite"):
        run_search(make(tmp_path / "net", tmp_path / "out"), backbone)


def test_dry_run_tells_upper_bounds(counted):
    search, metrics, _ = counted
    lines = search.text().splitlines()
    assert lines[0] == "grid      4 layers x 3 levels, 12 cells"
    named = [line.split(",")[0] for line in lines[1:4]]
    assert named == ["rung 1    50 samples", "rung 2    100 samples", "all       220 samples"]
    assert lines[4].startswith("ranking   50 samples, 12 cells again")
    assert "660 forwards" in lines[-1]
    bound = [int(line.split("at most ")[1].split(" forwards")[0].replace(",", "")) for line in lines[1:6]]
    assert bound[:3] == [150, 150, 360]
    assert all(rung["forwards"] <= most for rung, most in zip(metrics["search"]["rungs"], bound, strict=False))
    assert bound[4] == sum(bound[:4])
