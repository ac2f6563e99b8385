"""What a run is trained on: images, stores, mirrored samples, and what does not go together."""

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from diffrep import FeatureStore
from diffrep.config import EncoderConfig, ExtractConfig, TrainConfig, validate
from diffrep.errors import ConfigError, StoreError, UnknownNameError
from diffrep.extract.job import run_extract
from diffrep.testing import save_images
from diffrep.train.data import check_targets, open_training


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    file = tmp_path_factory.mktemp("encoder") / "cnn.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), file)
    return {"source": str(file), "model": "test_efficientnet"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), per_class=3, size=32)


def extract(out, folder, source, config, **given):
    backbone = {"source": str(source), "family": "prepare", "config": config, "device": "cpu"}
    backbone |= given.pop("backbone", {})
    values = {"layers": ["blocks"], "levels": ["clean"], "noise": "none", "dtype": "float32"} | given
    values = {"backbone": backbone, "data": folder if isinstance(folder, dict) else str(folder), "request": values}
    return run_extract(validate(ExtractConfig, values | {"out": str(out), "unit_size": 4, "batch_size": 4}))


@pytest.fixture(scope="module")
def store(folder, encoder, folder_of, tmp_path_factory):
    """Moments of a VAE, and targets, with mirror images."""
    config = {"moments": True, "flip": True, "encoders": {"lite": encoder, "wide": encoder | {"layer": "blocks.4"}}}
    return extract(tmp_path_factory.mktemp("vae") / "s", folder, folder_of("unet2d-condition") / "vae", config)


@pytest.fixture(scope="module")
def pixels(folder, encoder, tmp_path_factory):
    """Pixels without mirror images, and targets."""
    return extract(tmp_path_factory.mktemp("pixels") / "s", folder, "pixels", {"encoders": {"lite": encoder}})


def training(channels=3, **keys):
    model = {"kind": "sit", "args": "S/2"}
    align = {name: {"stored": name} for name in keys.pop("stored", ())}
    values = {"model": model, "out": "run", "steps": 1, "align": align} | keys
    return open_training(
        validate(TrainConfig, {k: str(v) if k == "store" else v for k, v in values.items()}), channels
    )


PICKS = ([5, 0, 3, 5], [False, True, False, True])


def test_images(folder):
    data = training(data={"path": str(folder), "splits": ["train"]})
    assert (data.kind, data.shape, data.classes, data.labelled, len(data)) == ("image", (3, 32, 32), 3, True, 9)
    batch = data[PICKS]
    for place, (row, mirrored) in enumerate(zip(*PICKS, strict=True)):
        image = data.images[row]
        assert torch.equal(batch["image"][place], image.flip(-1) if mirrored else image)
        assert batch["label"][place] == data.images.label(row)
    assert {*batch} == {"image", "label"}
    assert data.ids[5] == data.images.id(5)
    gray = training(1, data={"path": str(folder), "splits": ["train"], "size": 16})
    assert gray.shape == gray[PICKS]["image"].shape[1:] == (1, 16, 16)


def test_images_that_differ_in_size(tmp_path):
    for name, side in (("a", 16), ("b", 24)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    data = training(data={"path": str(tmp_path), "splits": ["all"]})
    assert not data.labelled
    with pytest.raises(ConfigError, match="differ in size.*data.size"):
        data[[0, 1], [False, False]]


def test_a_store(store):
    data = training(store=store.path, stored=("lite", "wide"), flip=True)
    assert (data.kind, data.shape, data.classes, data.mirror) == ("moments", (8, 16, 16), 3, True)
    assert data.target_channels == {"lite": 48, "wide": 64}
    batch, rows = data[PICKS], store.rows("train")
    assert {*batch} == {"moments", "targets.lite", "targets.wide", "label"}
    for place, (row, mirrored) in enumerate(zip(*PICKS, strict=True)):
        for name in ("moments", "targets.lite", "targets.wide"):
            assert torch.equal(batch[name][place], store[f"{name}_flip" if mirrored else name, "clean"][rows[row]])
        assert batch["label"][place] == store.labels[rows[row]]
    assert data.ids == [store.ids[row] for row in rows]
    test = training(store=store.path, store_split="test")
    assert {*test[[0], [False]]} == {"moments", "label"}
    assert torch.equal(test[[0], [False]]["moments"][0], store["moments", "clean"][store.rows("test")[0]])


def test_pixels_are_mirrored_as_they_are(pixels):
    data = training(store=pixels.path, flip=True)
    batch = data[PICKS]["latents"]
    rows = pixels.rows("train")[PICKS[0]]
    expected = pixels["latents", "clean"][rows]
    assert torch.equal(batch[[1, 3]], expected[[1, 3]].flip(-1))
    assert torch.equal(batch[[0, 2]], expected[[0, 2]])


def test_targets_in_a_store_of_their_own(store, folder, encoder, tmp_path):
    config = {"flip": True, "encoders": {"lite": encoder}}
    layers = ["targets.lite", "targets.lite_flip"]
    narrow = extract(tmp_path / "eight", folder, "pixels", config, layers=layers, dtype="float8_e4m3fn")
    data = training(store=store.path, targets=str(narrow.path), stored=("lite",), flip=True)
    batch = data[PICKS]
    assert batch["targets.lite"].dtype == torch.float8_e4m3fn
    exact = training(store=store.path, stored=("lite",), flip=True)[PICKS]
    assert torch.equal(batch["targets.lite"].float(), exact["targets.lite"].to(torch.float8_e4m3fn).float())
    assert torch.equal(batch["moments"], exact["moments"])
    assert data.describe() != training(store=store.path, stored=("lite",)).describe()
    with pytest.raises(ConfigError, match="too coarse"):
        extract(tmp_path / "latents", folder, "pixels", {}, dtype="float8_e4m3fn")
        training(store=tmp_path / "latents")


def test_targets_of_other_images(store, encoder, tmp_path):
    others = save_images(tmp_path / "others", per_class=3, size=48)
    stored = extract(tmp_path / "t", others, "pixels", {"encoders": {"lite": encoder}}, layers=["targets.lite"])
    with pytest.raises(StoreError, match="not of the images in .*: images: "):
        training(store=store.path, targets=str(stored.path), stored=("lite",))


def test_a_loader_gives_what_indexing_gives(store):
    data = training(store=store.path, stored=("lite",), flip=True)
    order = [PICKS, ([1, 2], [True, True])]
    for workers in (0, 1):
        loader = DataLoader(data, sampler=order, batch_size=None, num_workers=workers)
        for picks, batch in zip(order, loader, strict=True):
            expected = data[picks]
            assert {*batch} == {*expected}
            assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert torch.equal(pickle.loads(pickle.dumps(data))[PICKS]["moments"], data[PICKS]["moments"])


def test_what_a_set_says_of_itself(store, pixels, folder):
    described = training(store=store.path).describe()
    assert described == json.loads(json.dumps(described))
    assert described == training(store=store.path).describe()
    others = [training(store=pixels.path), training(store=store.path, store_split="test")]
    assert all(one.describe() != described for one in others)
    images = training(data={"path": str(folder), "splits": ["train"]}).describe()
    assert images == json.loads(json.dumps(images))
    assert images != training(data={"path": str(folder), "splits": ["train"], "limit": 4}).describe()


def test_what_cannot_be_trained_on(store, pixels, folder, tmp_path):
    for keys, error, message in (
        ({"store": store.path, "store_split": "trian"}, UnknownNameError, "did you mean 'train'"),
        ({"store": store.path, "stored": ("lit",)}, UnknownNameError, "unknown targets 'lit'; did you mean 'lite'"),
        ({"store": pixels.path, "stored": ("lite",), "flip": True}, ConfigError, "layers targets.lite_flip, which"),
        (
            {"store": store.path, "stored": ("lite_flip",)},
            UnknownNameError,
            "unknown targets 'lite_flip'; did you mean",
        ),
        ({"store": tmp_path / "none"}, StoreError, "no feature store"),
    ):
        with pytest.raises(error, match=message):
            training(**keys)
    data = training(store=pixels.path, stored=("lite",))
    assert not data.mirror
    with pytest.raises(ConfigError, match="backbone.config.flip=true"):
        data[PICKS]
    patches = {"source": "pixels", "family": "pixels", "device": "cpu", "config": {"side": 1}}
    values = {"backbone": patches, "data": str(folder), "unit_size": 9}
    request = {"layers": ["patches"], "levels": ["clean"]}
    other = run_extract(validate(ExtractConfig, values | {"request": request, "out": str(tmp_path / "patches")}))
    with pytest.raises(ConfigError, match="neither latents nor moments, but patches"):
        training(store=other.path)
    for name, request, message in (
        ("noised", {"layers": ["latents"], "levels": ["0.5"]}, "t=0.5, with noise"),
        ("pooled", {"layers": ["latents"], "levels": ["clean"], "pool": "mean"}, "no map; extract it with pool=none"),
    ):
        backbone = {"source": "pixels", "family": "prepare", "device": "cpu"}
        values = {"backbone": backbone, "data": str(folder), "request": request, "out": str(tmp_path / name)}
        with pytest.raises(ConfigError, match=message):
            training(store=run_extract(validate(ExtractConfig, values)).path)


def test_cached_targets_and_the_encoder_they_should_come_from(store, encoder):
    check_targets(store, "lite", validate(EncoderConfig, encoder))
    with pytest.raises(ConfigError, match="(?s)other preprocessing.*layer: blocks.4 there, blocks.3 now$"):
        check_targets(store, "wide", validate(EncoderConfig, encoder))
    with pytest.raises(ConfigError, match="(?s)other preprocessing.*size: native there, 64 now$"):
        check_targets(store, "lite", validate(EncoderConfig, encoder | {"size": 64}))
    with pytest.raises(UnknownNameError, match="did you mean 'lite'"):
        check_targets(store, "lit", validate(EncoderConfig, encoder))


def test_cached_targets_of_an_encoder_in_half_precision(folder, encoder, tmp_path):
    half = {"encoders": {"lite": encoder}}
    store = extract(tmp_path / "s", folder, "pixels", half, layers=["targets.lite"], backbone={"dtype": "bfloat16"})
    check_targets(store, "lite", validate(EncoderConfig, encoder))
    with pytest.raises(ConfigError, match="(?s)other preprocessing.*size: native there, 64 now$"):
        check_targets(store, "lite", validate(EncoderConfig, encoder | {"size": 64}))


def test_labels_count_classes(tmp_path):
    pictures = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=pictures, train_labels=np.array([0, 5, 1, 1]))
    assert training(data={"path": str(tmp_path / "a.npz"), "splits": ["train"]}).classes == 6
    np.savez(tmp_path / "c.npz", train_images=pictures, train_labels=np.array([0, -1, 1, -1]))
    with pytest.raises(ConfigError, match="2 of 4 labels are no classes, such as -1; classes here are 0 to 1"):
        training(data={"path": str(tmp_path / "c.npz"), "splits": ["train"]})
    several = np.eye(4, dtype=np.int64)
    np.savez(tmp_path / "b.npz", train_images=pictures, train_labels=several)
    data = training(data={"path": str(tmp_path / "b.npz"), "splits": ["train"]})
    assert (data.classes, data.labelled) == (None, False)
    assert {*data[[0], [False]]} == {"image"}
    stored = FeatureStore(extract(tmp_path / "s", tmp_path / "b.npz", "pixels", {}).path)
    assert training(store=stored.path).labels is None
