"""Files that nobody vouches for, given to the command: skipped or refused as the config says, with one line."""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep import FeatureStore
from diffrep.cli import main
from diffrep.errors import StoreError
from diffrep.testing import save_tiny


@pytest.fixture
def call(capfd):
    """Runs the command, checks its exit status, and returns what it printed."""

    def call(*words, status=0):
        capfd.readouterr()
        found = main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert found == status, out + err
        assert "Traceback" not in out + err
        return err if status == 2 else out

    return call


@pytest.fixture
def words(unet_folder, tmp_path):
    """Words of an extraction, but for its data."""
    return [f"backbone={unet_folder}", "request.layers=mid_block", "request.levels=5", f"out={tmp_path}/store"]


def packed(kind, side=16, value=None):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels if value is None else np.full_like(pixels, value)).save(file, kind)
    return file.getvalue()


def bomb():
    """Returns a PNG of 100 bytes that unpacks to 2.5 GB."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


IMAGES = {
    "a-bomb.png": bomb(),
    "b-pixel.png": packed("PNG", side=1, value=100),
    "c-lies.jpg": packed("PNG", value=50),
    "d-text.png": b"this is text\n",
    "e-cut.jpg": packed("JPEG", side=64)[:900],
    "f-good.png": packed("PNG"),
}
REASONS = {"a-bomb.png": "exceeds limit of", "d-text.png": "not an image", "e-cut.jpg": "cannot read the image"}
KEPT = [name for name in IMAGES if name not in REASONS]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, content in IMAGES.items():
        (tmp_path / "images" / name).write_bytes(content)
    return tmp_path / "images"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_are_skipped_with_a_reason(call, words, folder, tmp_path, workers):
    words = ["extract", *words, f"data={folder}", "data.size=16", "unit_size=2", f"workers={workers}"]
    call(*words, "on_error=skip")
    store = FeatureStore(tmp_path / "store")
    assert store.ids == KEPT
    assert store["mid_block", 5].isfinite().all()
    skipped = [json.loads(line) for line in (tmp_path / "store/skipped.jsonl").read_text().splitlines()]
    assert {one["id"]: REASONS[one["id"]] in one["reason"] for one in skipped} == dict.fromkeys(REASONS, True)
    call("store", "verify", tmp_path / "store")
    for name in REASONS:
        (folder / name).unlink()
    call(*words, f"out={tmp_path}/without")
    # Their batches are others, so not to the bit.
    torch.testing.assert_close(store["mid_block", 5], FeatureStore(tmp_path / "without")["mid_block", 5])


def test_the_first_of_them_stops_an_extraction(call, words, folder, tmp_path):
    told = call("extract", *words, f"data={folder}", "data.size=16", status=2)
    last = told.splitlines()[-1]  # behind the progress
    assert last.startswith("diffrep extract: error: a-bomb.png: cannot read the image: Image size (2500000000 pixels)")
    assert last.endswith("Mend it and run again, or use on_error=skip")
    assert not list((tmp_path / "store").glob("units/*/*.safetensors"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_tar_member_that_points_outside(call, words, tmp_path, stream):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("1.png", "../2.png", "3.png"):
            info = tarfile.TarInfo(name)
            info.size = len(IMAGES["f-good.png"])
            tar.addfile(info, io.BytesIO(IMAGES["f-good.png"]))
    words = ["extract", *words, f"data={tmp_path}/a.tar", "data.size=16", f"data.stream={stream}"]
    last = call(*words, status=2).splitlines()[-1]  # behind the progress
    assert last.startswith("diffrep extract: error: ")
    assert "'../2.png' has a name that points outside" in last
    if stream:  # an index of a file is of all its members, or there is none
        call(*words, "on_error=skip")
        assert FeatureStore(tmp_path / "store").ids == ["a/1", "a/3"]
        (skipped,) = map(json.loads, (tmp_path / "store/skipped.jsonl").read_text().splitlines())
        assert "has a name that points outside" in skipped["reason"]
    assert not (tmp_path.parent / "2.png").exists()


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_checkpoint_with_code(call, words, folder, tmp_path, unet_folder, form):
    marker, net = tmp_path / "ran", tmp_path / "net.pt"
    if form == "file":
        torch.save({"ema": {"x": torch.zeros(1)}, "args": Attack(marker)}, net)
        words += [f"backbone={net}", "backbone.family=dit", "backbone.config=S/2"]
    else:
        net = shutil.copytree(unet_folder, tmp_path / "net")
        (net / "unet/diffusion_pytorch_model.safetensors").unlink()
        torch.save({"x": Attack(marker)}, net / "unet/diffusion_pytorch_model.bin")
        words += [f"backbone={net}"]
    told = call("extract", *words, f"data={folder}", status=2)
    assert str(net) in told
    assert not marker.exists()
    assert not (tmp_path / "store").exists()
    torch.load(net if form == "file" else net / "unet/diffusion_pytorch_model.bin", weights_only=False)
    assert marker.exists(), "elsewhere it runs"


def test_a_published_pickle_with_code(call, tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"\x1b[2J": 1, "ema": Attack(marker)}))
    assert "it was not run" in call("convert", tmp_path / "net.pkl", tmp_path / "out", status=2)
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"\x1b[2J": 1}))
    assert "\x1b" not in call("convert", tmp_path / "net.pkl", tmp_path / "out", status=2)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def point_outside(path, secret, place):
    """Makes a store read a file that is not its own."""
    if place == "index":
        index = json.loads((path / "index.json").read_text())
        index["folders"][0]["folder"] = "../../../" + str(secret)
        (path / "index.json").write_text(json.dumps(index))
    else:
        file = path / {"unit": "units/0000/0000000.safetensors", "folder": "units/0000", "meta": "meta.json"}[place]
        if place == "folder":
            shutil.move(file, secret.with_name("moved"))
            file.symlink_to(secret.with_name("moved"))
        else:
            shutil.move(file, secret)
            file.symlink_to(secret)


@pytest.mark.parametrize("place", ["index", "unit", "folder", "meta"])
def test_a_store_that_points_outside(call, words, folder, tmp_path, place):
    for name in REASONS:
        (folder / name).unlink()
    call("extract", *words, f"data={folder}", "data.size=16")
    path = tmp_path / "store"
    whole = shutil.copytree(path, tmp_path / "whole")
    point_outside(path, tmp_path / "secret", place)
    with pytest.raises(StoreError):
        FeatureStore(path)["mid_block", 5]
    call("store", "verify", path, status=2 if place == "meta" else 1)
    for action in (["merge", whole, path], ["export", path, "--to", "npy"]):
        told = call("store", *action, "--out", tmp_path / "out", status=2)
        assert str(path) in told
        assert not list((tmp_path / "out").glob("units/*/*"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_network_that_is_none(call, words, folder, tmp_path):
    net = save_tiny("unet2d", tmp_path / "net")
    for config, told in (
        ('{"_class_name": "logging"}', "no network of class 'logging'"),
        ("[]", "must hold a JSON object"),
    ):
        (net / "unet/config.json").write_text(config)
        assert told in call("extract", *words, f"backbone={net}", f"data={folder}", status=2)
