import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffrep import FeatureRequest, run_extract, run_train
from diffrep.backbones import folders
from diffrep.backbones.encoders import open_encoder
from diffrep.backbones.fresh import new_network
from diffrep.config import (
    BackboneConfig,
    DataConfig,
    EncoderConfig,
    ExtractConfig,
    SampleConfig,
    SamplerConfig,
    TrainConfig,
    WatchConfig,
)
from diffrep.data import open_images
from diffrep.errors import ConfigError, DiffrepError, LayerError
from diffrep.metrics import FeatureStatistics, chance, cka, cknna, frechet_distance, mutual_knn, prepare
from diffrep.noise import DiscreteSchedule, FlowSchedule
from diffrep.testing import TINY_OFFICIAL, save_images
from diffrep.train.data import open_training
from diffrep.train.sample import run_sample
from diffrep.train.watch import Watch, linear_probe
from diffrep.train.watch_data import choose

CPU = torch.device("cpu")
ARGS = {"input_size": 16, "patch_size": 4, "in_channels": 1, "hidden_size": 32, "depth": 3, "num_heads": 2}
QUICK = SamplerConfig(steps=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), file)
    return EncoderConfig(source=file, model="test_efficientnet", size=64)


def model(seed=0, **changes):
    """A tiny network with classes, in which no weight is zero."""
    torch.manual_seed(seed)
    network, adapter = new_network("repa", ARGS | {"num_classes": 3} | changes)
    for weight in network.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    return adapter("tiny", network, FlowSchedule(), None, adapter.conditioner_of(network))


def train_config(out, **source):
    return TrainConfig(model={"kind": "repa", "args": ARGS}, out=out, steps=10, **source)


def watch(out, backbone, image_folder=None, aligned=("blocks.1",), store=None, **changes):
    data = {"data": DataConfig(path=image_folder, splits="train")} if store is None else {"store": store}
    train = train_config(out, **data, **changes.pop("train", {}))
    given = WatchConfig(**{"neighbours": 4, "sampler": QUICK, **changes})
    return Watch(given, train, backbone, list(aligned), open_training(train, 1), CPU, out)


def without_time(line):
    return {key: value for key, value in line.items() if key != "seconds"}


def test_every_number_of_a_line(image_folder, encoder, tmp_path):
    backbone, layers = model(), ["blocks.0", "blocks.1"]
    line = watch(tmp_path, backbone, image_folder, layers, encoder=encoder, samples=7, grid=5).measure(3)

    images = open_images(DataConfig(path=image_folder), 1)
    request = FeatureRequest(layers=layers, levels="sigma=0.1", pool="mean", dtype="float32")
    read, opened, labels, targets = {}, open_encoder(encoder, CPU), {}, {}
    for split in ("train", "test"):
        rows = list(images.splits[split])
        pixels = torch.stack([images[row] for row in rows])
        read[split] = backbone.extract(pixels, request, ids=[images.id(row) for row in rows])
        labels[split] = torch.tensor([images.label(row) for row in rows])
        targets[split] = opened(pixels).mean((2, 3))
    expected = {"step": 3}
    seen = prepare(targets["test"])
    for layer in layers:
        train, test = (read[split][layer, "sigma=0.1"] for split in ("train", "test"))
        expected[f"probe/{layer}"] = linear_probe(train, labels["train"], test, labels["test"])
        mine = prepare(test)
        expected[f"cknna/{layer}"] = cknna(mine, seen, k=4)
        expected[f"cka/{layer}"] = cka(mine, seen)
        expected[f"mutual_knn/{layer}"] = mutual_knn(mine, seen, k=4)
    expected["cknna/chance"] = chance(cknna, prepare(read["test"]["blocks.0", "sigma=0.1"]), seen, k=4)

    sample = SampleConfig(backbone="tiny", out=tmp_path / "made", sampler=QUICK, count=7, batch_size=3, grid=5)
    run_sample(sample, backbone)
    made = torch.from_numpy(np.load(tmp_path / "made" / "samples.npz")["arr_0"]).movedim(-1, 1)
    statistics = [FeatureStatistics(opened.channels) for _ in range(2)]
    statistics[0].add(opened(made / 255).mean((2, 3)))
    statistics[1].add(torch.cat(list(targets.values())))
    expected["frechet"] = frechet_distance(*statistics)
    assert line.keys() == expected.keys() | {"seconds"}
    assert without_time(line) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    grids = [Image.open(file) for file in (tmp_path / "samples" / "step-0000003.png", tmp_path / "made" / "grid.png")]
    assert np.array_equal(*map(np.asarray, grids))


def test_the_same_weights_give_the_same_line(image_folder, encoder, tmp_path):
    backbone = model()
    first = watch(tmp_path / "a", backbone, image_folder, encoder=encoder, samples=4)
    torch.manual_seed(5)
    lines = [first.measure(1), first.measure(2)]
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5))), "no global draws"
    lines.append(watch(tmp_path / "b", model(), image_folder, encoder=encoder, samples=4).measure(1))
    assert without_time(lines[1]) == without_time(lines[0]) | {"step": 2}
    assert without_time(lines[2]) == without_time(lines[0])
    with torch.no_grad():
        backbone.network.blocks[1].attn.qkv.weight.mul_(3)
    moved = first.measure(3)
    assert all(moved[key] != lines[0][key] for key in ("cka/blocks.1", "frechet")), "weights are read as they are now"


def test_lines_of_a_run_that_was_set_back(image_folder, tmp_path):
    watched = watch(tmp_path, model(), image_folder)
    for step in (0, 5, 10):
        watched.measure(step)
    assert watched.measured(5) and not watched.measured(6)
    watched.measure(5)
    lines = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5]
    assert set(lines[1]) == {"step", "probe/blocks.1", "seconds"}


@pytest.fixture(scope="module")
def latents(tmp_path_factory, folder_of, encoder):
    """Images, the autoencoder, and the store of its moments and of targets."""
    base = tmp_path_factory.mktemp("latents")
    images, codec = save_images(base / "images", per_class=5), folder_of("dit") / "vae"
    wanted = {"moments": True, "encoders": {"eff": encoder.model_dump(exclude_none=True)}}
    config = ExtractConfig(
        backbone=BackboneConfig(source=codec, family="prepare", config=wanted, device="cpu"),
        data=DataConfig(path=images),
        request=FeatureRequest(layers=["moments", "targets.eff"], levels="clean", noise="none", dtype="float32"),
        out=base / "store",
        unit_size=4,
    )
    run_extract(config)
    return images, codec, base / "store"


def test_a_store_gives_what_its_images_give(latents, encoder, tmp_path):
    images, codec, store = latents
    backbone = model(in_channels=4, input_size=8)
    align = {"align": {"a": {"preset": "repa", "stored": "eff"}}}
    asked = {"encoder": encoder, "samples": 5, "grid": 2, "codec": codec, "store": store}
    stored = watch(tmp_path / "a", backbone, train=align, **asked).measure(0)
    shown = watch(tmp_path / "b", backbone, data=DataConfig(path=images), **asked).measure(0)
    assert without_time(stored) == pytest.approx(without_time(shown), rel=1e-4, abs=1e-5)
    assert {"probe/blocks.1", "cknna/blocks.1", "frechet"} <= stored.keys()
    pictures = [(tmp_path / name / "samples" / "step-0000000.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]
    wide = folders.load_codec(codec, CPU, torch.float32).downscale * 8
    assert Image.open(tmp_path / "a" / "samples" / "step-0000000.png").size == (2 * wide + 6, wide + 4)


def test_targets_in_a_store_of_their_own(latents, encoder, tmp_path):
    images, codec, store = latents
    wanted = {"encoders": {"other": encoder.model_dump(exclude_none=True) | {"layer": "blocks.2"}}}
    config = ExtractConfig(
        backbone=BackboneConfig(source="pixels", family="prepare", config=wanted, device="cpu"),
        data=DataConfig(path=images),
        request=FeatureRequest("targets.other", "clean", noise="none", dtype="float8_e4m3fn"),
        out=tmp_path / "targets",
        unit_size=5,
    )
    kept = run_extract(config)
    backbone = model(in_channels=4, input_size=8)
    align = {"a": {"preset": "repa", "stored": "other"}}
    asked = {"store": store, "train": {"targets": kept.path, "align": align}}
    given = watch(tmp_path / "a", backbone, encoder=encoder.model_copy(update={"layer": "blocks.2"}), **asked)
    assert torch.equal(given.test.targets, kept["targets.other", "clean"][kept.rows("test")].float().mean((2, 3)))
    shown = DataConfig(path=images)
    line = given.measure(0)
    online = watch(
        tmp_path / "b", backbone, data=shown, codec=codec, encoder=encoder.model_copy(update={"layer": "blocks.2"}),
        store=store,
    ).measure(0)  # fmt: skip
    assert without_time(line) == pytest.approx(without_time(online), abs=0.02), "eight bits change little"
    for changes, message in (
        ({"stored": "eff"}, "unknown targets in watch.stored 'eff'.*targets"),
        ({"stored": "other_flip"}, "did you mean 'other'"),
        ({"encoder": encoder}, "cached targets 'other' in .*targets were made by another encoder"),
    ):
        with pytest.raises(ConfigError, match=message):
            watch(tmp_path, backbone, **asked, **changes)


def test_samples_of_another_size_than_the_images(image_folder, encoder, tmp_path):
    larger = DataConfig(path=image_folder, size=32)
    with pytest.raises(ConfigError, match="makes samples of 16 x 16 and is measured on 32 x 32"):
        watch(tmp_path, model(), data=larger, image_folder=image_folder, encoder=encoder, samples=4)
    assert watch(tmp_path, model(), data=larger, image_folder=image_folder).measure(0)["probe/blocks.1"] > 0.5


def test_a_network_that_needs_a_class(image_folder, tmp_path):
    config = TINY_OFFICIAL["adm"] | {"num_classes": 3, "in_channels": 1, "out_channels": 2}
    network, adapter = new_network("adm", config)
    backbone = adapter("adm", network, DiscreteSchedule.linear(), None, adapter.conditioner_of(network))
    with pytest.raises(ConfigError, match="watch reads layers without a class, which adm cannot do .*; leave watch"):
        watch(tmp_path, backbone, image_folder, aligned=("middle_block",))


def test_what_is_taken_where_nothing_is_given(image_folder, encoder, tmp_path):
    align = {"align": {"a": {"preset": "repa", "encoder": encoder}}}
    watched = watch(tmp_path, model(), image_folder, aligned=(), train=align, limit=9, neighbours=3)
    assert watched.layers == ["blocks.0", "blocks.1", "blocks.2"]
    assert watched.level.sigma == pytest.approx(0.1)
    assert len(watched.test.ids) == 9 and watched.test.targets.shape == (9, open_encoder(encoder, CPU).channels)
    rows = choose(range(100, 200), 10)
    assert rows.tolist() == sorted(set(rows.tolist())) == choose(range(100, 200), 10).tolist()
    assert rows[0] >= 100 and rows[-1] < 200 and len(rows) == 10


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": "blocks.9"}, LayerError, "blocks.9"),
        ({"level": "t=1.5"}, ConfigError, "lie between 0 and 1"),
        ({"test_split": "val"}, ConfigError, "watch.test_split: unknown split 'val'"),
        ({"test_split": "train"}, ConfigError, "both 'train'"),
        ({"probe": False}, ConfigError, "watch measures nothing"),
        ({"samples": 4}, ConfigError, "no encoder"),
        ({"stored": "eff"}, ConfigError, "give watch.encoder"),
        ({"limit": 2}, ConfigError, "no two of one class"),
        ({"grid": 1, "sampler": {"method": "ddim"}}, ConfigError, "does not go with a flow"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_run(image_folder, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        watch(tmp_path, model(), image_folder, **changes)


def test_too_few_images_and_no_labels(image_folder, encoder, tmp_path):
    with pytest.raises(ConfigError, match="neighbours=18 needs 19 samples or more, and split 'test' gives 18"):
        watch(tmp_path, model(), image_folder, encoder=encoder, neighbours=18)
    for split in ("train", "test"):
        bare = tmp_path / "bare" / split
        bare.mkdir(parents=True)
        for index in range(3):
            Image.new("L", (16, 16), 40 * index).save(bare / f"{index}.png")
    with pytest.raises(ConfigError, match="one label each"):
        watch(tmp_path, model(), image_folder, data=DataConfig(path=tmp_path / "bare"))


def test_what_a_store_cannot_give(latents, encoder, tmp_path):
    images, codec, store = latents
    backbone = model(in_channels=4, input_size=8)
    for changes, message in (
        ({"test_split": "val"}, "watch.test_split is 'val'"),
        ({"stored": "ef"}, "did you mean 'eff'"),
        ({"encoder": encoder}, "watch.encoder needs images"),
        ({"grid": 2}, "give watch.codec"),
        ({"data": DataConfig(path=images)}, "give watch.codec"),
        ({"stored": "eff", "encoder": encoder.model_copy(update={"size": 32})}, "size: 64 there, 32 now"),
    ):
        with pytest.raises(ConfigError, match=message):
            watch(tmp_path, backbone, store=store, **changes)
    with pytest.raises(ConfigError, match="decodes latents of 4 channels"):
        watch(tmp_path, model(in_channels=3), store=store, codec=codec)


def test_weights_that_are_not_finite(image_folder, tmp_path):
    backbone = model()
    watched = watch(tmp_path, backbone, image_folder)
    with torch.no_grad():
        backbone.network.blocks[0].attn.qkv.weight.fill_(torch.nan)
    with pytest.raises(DiffrepError, match="NaN or infinity in layer 'blocks.1'"):
        watched.measure(1)


def test_the_probe():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 4
    centres = torch.randn(4, 12, generator=rng)
    features = centres[labels] * 0.5 + torch.randn(200, 12, generator=rng)
    train, test = slice(0, 120), slice(120, 200)
    found = linear_probe(features[train], labels[train], features[test], labels[test])
    assert found == linear_probe(3 * features[train] + 7, labels[train], 3 * features[test] + 7, labels[test])
    nearest = (features[test] - 0.5 * centres[:, None]).norm(dim=2).argmin(0)  # the best there is
    assert abs(found - (nearest == labels[test]).float().mean()) < 0.1
    shuffled = labels[torch.randperm(200, generator=rng)]
    assert linear_probe(features[train], shuffled[train], features[test], shuffled[test]) < 0.45


def test_a_run_is_measured_and_not_disturbed(image_folder, encoder, tmp_path):
    given = {
        "model": {"kind": "repa", "args": ARGS | {"num_classes": 3}},
        "data": DataConfig(path=image_folder, splits="train"),
        "align": {"a": {"preset": "repa", "encoder": encoder, "width": 8}},
        "steps": 5,
        "batch_size": 4,
        "mixed_precision": "no",
    }
    measured = WatchConfig(every=2, neighbours=4, samples=4, sampler=QUICK, grid=1)
    weights = [
        load_file(run_train(TrainConfig(**given, out=tmp_path / name, watch=asked)) / "model.safetensors")
        for name, asked in (("watched", measured), ("alone", None))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    lines = [json.loads(line) for line in (tmp_path / "watched" / "watch.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert all({"probe/blocks.0", "cka/blocks.0", "frechet"} <= line.keys() for line in lines)
    assert len({line["cka/blocks.0"] for line in lines}) == 4
