"""Latents of other programs."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from diffrep.config import ExtractConfig, TrainConfig, validate
from diffrep.errors import ConfigError, DataError, StoreError
from diffrep.extract.job import run_extract
from diffrep.train.data import open_training
from diffrep.train.imported import import_moments, import_repa

SCALE = 0.18215


@pytest.fixture
def latents(tmp_path):
    """Five samples as REPA's preprocessing names them, in two folders."""
    generator = np.random.default_rng(0)
    labels = []
    for number in range(5):
        name = f"{number // 3:05d}/img-latents-{number:08d}.npy"
        (tmp_path / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "vae-sd" / name, np.abs(generator.normal(size=(8, 4, 4))).astype(np.float32))
        labels.append([name, 7 - number])
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return tmp_path / "vae-sd"


def test_moments_are_scaled_and_log_variances_converted():
    mean, std = torch.randn(2, 4, 3, 3), torch.rand(2, 4, 3, 3) + 0.1
    expected = torch.cat([(mean - 0.5) * SCALE, std * SCALE], 1)
    for moments, kind in ((torch.cat([mean, std], 1), "std"), (torch.cat([mean, 2 * std.log()], 1), "logvar")):
        torch.testing.assert_close(import_moments(moments, kind, SCALE, 0.5), expected)
    for moments, kind, message in (
        (torch.cat([mean, 2 * std.log()], 1), "std", "log-variances. Give kind='logvar'"),
        (torch.cat([mean, std], 1), "var", "'std' or 'logvar'"),
        (mean[:, :3], "std", "means and as many channels again"),
    ):
        with pytest.raises(ConfigError, match=message):
            import_moments(moments, kind)


def test_a_folder_of_repa(latents, tmp_path):
    store = import_repa(latents, tmp_path / "store", unit_size=2)
    data = open_training(training(store=str(store.path)), 3)
    assert (data.kind, data.shape, len(data), data.classes) == ("moments", (8, 4, 4), 5, 8)
    assert data.ids[3] == "00001/img00000003.png"
    batch = data[[4, 1], [False, False]]
    expected = torch.from_numpy(np.load(latents / "00001" / "img-latents-00000004.npy")) * SCALE
    assert torch.equal(batch["moments"][0], expected)
    assert batch["label"].tolist() == [3, 6]
    codec = store.meta["backbone"]["codec"]
    assert (codec["scale"], codec["given"]) == (SCALE, "std")
    with pytest.raises(StoreError, match="backbone.codec.given: std there, logvar now"):
        import_repa(latents, tmp_path / "store", kind="logvar", unit_size=2)


def test_targets_of_the_images_beside_them(latents, tmp_path):
    store = import_repa(latents, tmp_path / "store")
    folder = tmp_path / "images"
    for name in store.ids:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (0, 0, 9 * int(name[-5]))).save(folder / name)
    targets = targets_of(folder, tmp_path / "targets")
    data = open_training(
        training(store=str(store.path), targets=str(targets.path), align={"a": {"stored": "lite"}}), 3
    )
    assert data[[3], [False]]["targets.lite"].shape == (1, 48, 1, 1)
    (folder / store.ids[0]).unlink()
    fewer = targets_of(folder, tmp_path / "fewer")
    with pytest.raises(StoreError, match="not of the images"):
        open_training(training(store=str(store.path), targets=str(fewer.path), align={"a": {"stored": "lite"}}), 3)


def training(**keys):
    model = {"kind": "sit", "args": "S/2"}
    return validate(TrainConfig, {"model": model, "out": "run", "steps": 1} | keys)


def targets_of(folder, out):
    torch.manual_seed(0)
    file = folder.parent / "cnn.safetensors"
    save_file(timm.create_model("test_efficientnet").state_dict(), file)
    config = {"encoders": {"lite": {"source": str(file), "model": "test_efficientnet"}}}
    backbone = {"source": "pixels", "family": "prepare", "config": config, "device": "cpu"}
    request = {"layers": ["targets.lite"], "levels": ["clean"]}
    values = {"backbone": backbone, "data": str(folder), "request": request, "out": str(out)}
    return run_extract(validate(ExtractConfig, values))


def test_what_cannot_be_imported(latents, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no .npy files"):
        import_repa(tmp_path / "empty", tmp_path / "out")
    listed = json.loads((latents / "dataset.json").read_text())
    (latents / "dataset.json").write_text(json.dumps({"labels": listed["labels"][1:]}))
    with pytest.raises(DataError, match="no label of 1 files, first 00001/img-latents-00000004.npy"):
        import_repa(latents, tmp_path / "out")
    (latents / "dataset.json").write_text(json.dumps({"labels": None}))
    assert import_repa(latents, tmp_path / "unlabelled").labels is None
    np.save(latents / "00001" / "img-latents-00000003.npy", np.ones((8, 2, 2)))
    with pytest.raises(DataError, match="img-latents-00000003.npy has another shape"):
        import_repa(latents, tmp_path / "out")
    (latents / "00001" / "img-latents-00000003.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot read .*img-latents-00000003.npy"):
        import_repa(latents, tmp_path / "other")
