"""Latents that are made once: the features are those of the images, to the bit, and no image is read again."""

import shutil
import threading

import pytest
import torch

from diffrep import FeatureRequest, FeatureStore, load_backbone
from diffrep.config import ExtractConfig, validate
from diffrep.data import open_images
from diffrep.errors import ConfigError, DataError, StoreError
from diffrep.extract.job import ExtractJob
from diffrep.extract.latents import LatentFeed, open_latents
from diffrep.store import list_units
from diffrep.testing import save_images, save_tiny

SIZE = {"size": 16}


@pytest.fixture(scope="module")
def net(folder_of):
    return folder_of("dit")


@pytest.fixture(scope="module")
def backbone(net):
    return load_backbone(net, device="cpu")


@pytest.fixture(scope="module")
def extract(backbone):
    return lambda config, loaded=None: ExtractJob(config, loaded or backbone).run()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images, of which one cannot be read."""
    folder = save_images(tmp_path_factory.mktemp("latents") / "images", per_class=4)
    (folder / "train" / "class1" / "2.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def ruined(images):
    """The same names and sizes, which identify a set, and no image."""
    folder = shutil.copytree(images, images.parent / "ruined")
    for file in folder.rglob("*.png"):
        file.write_bytes(b"\0" * file.stat().st_size)
    return {"path": str(folder)} | SIZE


@pytest.fixture(scope="module")
def config(net, images):
    """Makes a config; keys of the request come with `request_`."""

    def make(out, **keys):
        request = {"layers": ["blocks.1"], "levels": [10, 300], "dtype": "float32"}
        request |= {key.removeprefix("request_"): keys.pop(key) for key in list(keys) if key.startswith("request_")}
        given = {"backbone": {"source": str(net), "device": "cpu"}, "data": {"path": str(images)} | SIZE}
        given |= {"request": request, "out": str(out), "batch_size": 4, "unit_size": 7, "on_error": "skip"}
        return validate(ExtractConfig, given | keys, "config")

    return make


@pytest.fixture(scope="module")
def plain(config, extract, images):
    return extract(config(images.parent / "plain"))


@pytest.fixture(scope="module")
def latents(config, extract, images):
    """A store of latents, made for features that lie beside it in `kept`."""
    extract(config(images.parent / "kept", latents=str(images.parent / "latents")))
    return images.parent / "latents"


def equal(first, second):
    assert first.ids == second.ids
    for layer in first.layers:
        for level in first.levels:
            assert torch.equal(first[layer, level], second[layer, level])


def test_features_are_those_of_the_images(plain, latents):
    kept, stored = FeatureStore(latents.parent / "kept"), FeatureStore(latents)
    equal(kept, plain)
    assert kept.meta == plain.meta
    assert (kept.path / "skipped.jsonl").read_text() == (plain.path / "skipped.jsonl").read_text()
    assert (stored.layers, len(stored), stored["latents", "clean"].dtype) == (["latents"], 23, torch.float32)


def test_no_image_is_read_again(config, extract, backbone, images, ruined, latents, tmp_path):
    request = {"request_layers": ["blocks"], "request_levels": ["clean"]}
    kept = extract(config(tmp_path / "kept", latents=str(latents), data=ruined, batch_size=3, unit_size=5, **request))
    opened = open_images(config("x").data, 3)
    rows = [row for row in range(24) if opened.id(row) in set(kept.ids)]
    expected = backbone.extract(torch.stack([opened[row] for row in rows]), config("x", **request).request)
    assert len(kept) == 23
    torch.testing.assert_close(kept["blocks.2", "clean"], expected["blocks.2", "clean"], atol=1e-5, rtol=1e-5)


def test_moments(config, extract, ruined, plain, tmp_path):
    sampled = {"request_posterior": "sample", "pad": True}
    moments = {"latents": str(tmp_path / "moments")}
    kept = extract(config(tmp_path / "kept", **sampled, **moments))
    equal(kept, extract(config(tmp_path / "plain", **sampled)))
    assert FeatureStore(tmp_path / "moments").layers == ["moments"]
    mode = extract(config(tmp_path / "mode", data=ruined, **moments))  # which they serve, too
    torch.testing.assert_close(mode["blocks.1", 300], plain["blocks.1", 300], atol=1e-5, rtol=1e-5)


def test_latents_that_were_begun_are_finished(config, extract, plain, tmp_path):
    latents = tmp_path / "latents"
    with pytest.raises(DataError, match="class1/2.png"):
        extract(config(tmp_path / "kept", latents=str(latents), on_error="stop", unit_size=2))
    begun = {file: file.stat().st_ino for file in latents.rglob("*.safetensors")}
    assert begun
    with pytest.raises(StoreError, match="not finished"):
        FeatureStore(latents)
    kept = extract(config(tmp_path / "kept", latents=str(latents), unit_size=2))
    assert {file: file.stat().st_ino for file in begun} == begun
    assert kept.ids == plain.ids
    torch.testing.assert_close(kept["blocks.1", 300], plain["blocks.1", 300], atol=1e-5, rtol=1e-5)


def test_latents_of_something_else(config, extract, net, images, latents, tmp_path):
    other = save_tiny("dit", tmp_path / "other", seed=1) / "vae"
    moved = save_images(tmp_path / "moved", per_class=5)
    for number, (backbone, data, message) in enumerate(
        (
            ({"codec": str(other)}, {"path": str(images), "size": 16}, "backbone.codec_weights: "),
            ({"dtype": "bfloat16"}, {"path": str(images), "size": 16}, "codec_dtype: float32 there, bfloat16 now"),
            (None, {"path": str(moved), "size": 16}, "data.fingerprint: "),
            (None, {"path": str(images), "size": 24}, "transform.size: 16 there, 24 now"),
        )
    ):
        changed = config(tmp_path / str(number), latents=str(latents), data=data)
        loaded = None if backbone is None else load_backbone(net, device="cpu", **backbone)
        with pytest.raises(StoreError, match=f"(?s)holds other latents.*{message}"):
            extract(changed, loaded)
    with pytest.raises(StoreError, match="no moments, which posterior=sample takes,.*but latents"):
        extract(config(tmp_path / "sampled", latents=str(latents), request_posterior="sample"))


def test_latents_from_a_training_set(config, extract, net, plain, tmp_path):
    """What family "prepare" made for other ends serves here too, where it is as fine."""
    prepare = load_backbone(net / "vae", family="prepare", device="cpu")
    request = {"layers": ["blocks"], "levels": ["clean"], "noise": "none"}
    for dtype in ("float16", "float32"):
        extract(
            config(tmp_path / dtype).model_copy(update={"request": FeatureRequest(**request, dtype=dtype)}), prepare
        )
    with pytest.raises(StoreError, match="request.dtype: float16 there, float32 now"):
        extract(config(tmp_path / "refused", latents=str(tmp_path / "float16")))
    equal(extract(config(tmp_path / "served", latents=str(tmp_path / "float32"))), plain)


def test_who_has_no_latents(config, extract, backbone, unet, tmp_path):
    given = config(tmp_path / "a", request_layers=["blocks"], latents=str(tmp_path / "latents"))
    with pytest.raises(ConfigError, match="takes the images as they are and has no codec; leave latents out"):
        extract(given, unet)
    with pytest.raises(ConfigError, match="sets that are listed; leave latents out, or data.stream"):
        open_latents(given.latents, given, backbone, object())
    assert not (tmp_path / "latents").exists()


def test_the_feed(config, backbone, images, latents):
    given = config("a", latents=str(latents))
    opened = open_images(given.data.model_copy(update={"size": None}), 3)
    feed = LatentFeed(opened, FeatureStore(latents), 4)
    units = list_units(opened.splits, 9)
    found = list(feed(units[:2]))
    assert [(unit.number, batch and batch.samples) for unit, batch in found] == [
        (0, 4), (0, 4), (0, 1), (0, None), (1, 3), (1, None)
    ]  # fmt: skip
    batches = [batch for _, batch in found if batch is not None]
    assert [sizes for batch in batches for sizes in batch.sizes] == [(16, 16)] * 4
    assert [problem[0] for batch in batches for problem in batch.problems] == ["train/class1/2.png"]
    batch = batches[0]
    assert batch.images is None and batch.posterior.std is None
    expected = backbone.codec.encode(torch.stack([opened[row] for row in batch.rows])).mean
    assert torch.equal(batch.posterior.mean, expected)
    assert batch.labels == [opened.label(row) for row in batch.rows]
    begun = feed(units)
    next(begun)
    begun.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("diffrep-latents")]


def test_a_sample_that_the_latents_lack(config, latents, tmp_path):
    renamed = save_images(tmp_path / "renamed", per_class=4)
    (renamed / "train" / "class0" / "0.png").rename(renamed / "train" / "class0" / "00.png")
    others = open_images(config("a", data={"path": str(renamed)} | SIZE).data, 3)
    with pytest.raises(StoreError, match="does not hold the sample 'train/class0/00.png'"):
        list(LatentFeed(others, FeatureStore(latents), 4)(list_units(others.splits, 9)))
