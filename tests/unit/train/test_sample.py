import json

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from diffrep import load_backbone, run_sample
from diffrep.backbones.fingerprint import hash_of_weights
from diffrep.cli import main
from diffrep.config import SampleConfig
from diffrep.errors import ConfigError, StoreError
from diffrep.testing import save_tiny
from diffrep.train import sample


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    """Latents of 10 classes and "no class", with an autoencoder: images of 16 x 16 pixels."""
    return save_tiny("dit", tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def dit(dit_folder):
    return load_backbone(dit_folder, device="cpu")


def config(source, out, **changes):
    return SampleConfig(**{"backbone": str(source), "out": out, "count": 6, "sampler": {"steps": 2}, **changes})


def files(out):
    return {file.name: file.read_bytes() for file in sorted((out / "images").iterdir())}


def test_what_a_run_leaves(dit_folder, dit, tmp_path):
    sampler = {"method": "ddim", "steps": 4, "guidance": 3.0, "interval": [0.2, 0.8], "guided_channels": 3, "eta": 0.5}
    facts = run_sample(config(dit_folder, tmp_path, count=12, batch_size=5, grid=9, sampler=sampler), dit)
    images = files(tmp_path)
    assert list(images) == [f"{number:06d}.png" for number in range(12)]
    assert len(set(images.values())) == 12
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (12, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [*range(10), 0, 1], "balanced over the classes, without 'no class'"
        for number, pixels in enumerate(arrays["arr_0"]):
            assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / "images" / f"{number:06d}.png")))
    assert Image.open(tmp_path / "grid.png").size == (3 * 18 + 2, 3 * 18 + 2)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"] == facts and results["seed"] == 0
    expected = {"sampler": "ddim", "steps": 4, "nfe": 4, "guidance": 3.0, "interval": [0.2, 0.8], "eta": 0.5}
    expected |= {"guided_channels": 3, "labels": "balanced", "classes": 10, "codec": dit.codec.describe()}
    expected |= {"guided_calls": 3, "weights": dit.weights_hash, "variance": "eta 0.5, learned one not used"}
    expected |= {"codec_weights": hash_of_weights(dit.codec.module())}
    assert {key: facts[key] for key in expected} == expected


def test_grey_images_of_a_network_without_classes(unet_folder, unet, tmp_path):
    facts = run_sample(config(unet_folder, tmp_path), unet)
    assert Image.open(tmp_path / "images" / "000000.png").mode == "L"
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].shape == (6, 16, 16, 1)
    assert (facts["sampler"], facts["variance"], facts["clipped"]) == ("ddpm", "posterior", True)
    assert facts["codec_weights"] is None


def test_an_image_depends_on_seed_and_number_alone(unet_folder, unet, tmp_path):
    run_sample(config(unet_folder, tmp_path / "a"), unet)
    run_sample(config(unet_folder, tmp_path / "b", batch_size=4, grid=0, npz=False), unet)
    run_sample(config(unet_folder, tmp_path / "c", count=3), unet)
    run_sample(config(unet_folder, tmp_path / "c", count=6), unet)
    run_sample(config(unet_folder, tmp_path / "d", seed=1), unet)
    a, b, c, d = (files(tmp_path / name) for name in "abcd")
    assert a == b == c
    assert not set(a.values()) & set(d.values())
    assert not (tmp_path / "b" / "samples.npz").exists() and not (tmp_path / "b" / "grid.png").exists()


def test_a_run_that_was_stopped_goes_on(unet_folder, unet, tmp_path):
    run_sample(config(unet_folder, tmp_path), unet)
    whole, array = files(tmp_path), (tmp_path / "samples.npz").read_bytes()
    for number in (2, 5):
        (tmp_path / "images" / f"{number:06d}.png").unlink()
    for name in ("samples.npz", "results.json"):
        (tmp_path / name).unlink()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "images").iterdir()}
    run_sample(config(unet_folder, tmp_path), unet)
    assert files(tmp_path) == whole and (tmp_path / "samples.npz").read_bytes() == array
    assert all(file.stat().st_mtime_ns == before for file, before in kept.items()), "what is there is not made again"


def test_the_array_alone(unet_folder, unet, tmp_path):
    run_sample(config(unet_folder, tmp_path / "all"), unet)
    facts = run_sample(config(unet_folder, tmp_path / "array", png=False, grid=4), unet)
    assert sorted(file.name for file in (tmp_path / "array").iterdir()) == [
        "config.yaml", "grid.png", "request.json", "results.json", "samples.npz",
    ]  # fmt: skip
    arrays = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("all", "array")]
    assert np.array_equal(*arrays)
    written = (tmp_path / "array" / "samples.npz").stat().st_mtime_ns
    assert run_sample(config(unet_folder, tmp_path / "array", png=False, grid=4), unet) == facts
    assert (tmp_path / "array" / "samples.npz").stat().st_mtime_ns == written, "a finished run has nothing to add"


def test_two_runs_of_one_request(unet_folder, unet, tmp_path, monkeypatch):
    """The second is finished while the first still makes images, and has taken the PNG files away."""
    given = config(unet_folder, tmp_path / "out", png=False, batch_size=4)
    run_sample(config(unet_folder, tmp_path / "alone", batch_size=4), unet)
    whole = sample.make_images
    batches = []

    def slow(*given_):
        batches.append(given_)
        if len(batches) == 2:
            monkeypatch.setattr(sample, "make_images", whole)
            run_sample(given, unet)
        return whole(*given_)

    monkeypatch.setattr(sample, "make_images", slow)
    run_sample(given, unet)
    assert len(batches) == 2
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.yaml", "grid.png", "request.json", "results.json", "samples.npz",
    ]  # fmt: skip
    assert np.array_equal(*(np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("out", "alone")))


def test_folders_of_other_images_are_refused(unet_folder, unet, tmp_path):
    run_sample(config(unet_folder, tmp_path), unet)
    with pytest.raises(ConfigError, match=r"another request \(sampler.steps: 2 there, 3 now; seed: 0 there, 1 now\)"):
        run_sample(config(unet_folder, tmp_path, sampler={"steps": 3}, seed=1), unet)
    other = load_backbone(save_tiny("unet2d", tmp_path / "other", seed=5), device="cpu")
    with pytest.raises(ConfigError, match=f"backbone.weights: {unet.weights_hash} there, {other.weights_hash} now"):
        run_sample(config(unet_folder, tmp_path), other)
    with pytest.raises(ConfigError, match="more than count=3 images, up to number 000005"):
        run_sample(config(unet_folder, tmp_path, count=3), unet)
    (tmp_path / "foreign" / "images").mkdir(parents=True)
    Image.new("L", (4, 4)).save(tmp_path / "foreign" / "images" / "cat.png")
    with pytest.raises(ConfigError, match="holds images that were not made here"):
        run_sample(config(unet_folder, tmp_path / "foreign"), unet)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match="run holds the results of another command"):
        run_sample(config(unet_folder, tmp_path / "run"), unet)
    assert (tmp_path / "run" / "results.json").read_text() == "{}"
    (tmp_path / "images" / "000003.png").write_bytes(b"not a PNG")
    with pytest.raises(StoreError, match="000003.png: .* delete it and run again"):
        run_sample(config(unet_folder, tmp_path), unet)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")], "nothing half written stays"


def labels_of(out):
    return np.load(out / "samples.npz")["arr_1"].tolist()


def test_labels(dit_folder, dit, tmp_path):
    run_sample(config(dit_folder, tmp_path / "three", classes=3), dit)
    run_sample(config(dit_folder, tmp_path / "list", labels=[7, 2]), dit)
    run_sample(config(dit_folder, tmp_path / "random", labels="random"), dit)
    run_sample(config(dit_folder, tmp_path / "more", labels="random", count=8), dit)
    null = run_sample(config(dit_folder, tmp_path / "null", labels="none"), dit)
    assert labels_of(tmp_path / "three") == [0, 1, 2] * 2
    assert labels_of(tmp_path / "list") == [7, 2] * 3
    random, more = labels_of(tmp_path / "random"), labels_of(tmp_path / "more")
    assert more[:6] == random and len(set(more)) > 2 and set(more) <= {*range(10)}
    assert null["labels"] == "none" and np.load(tmp_path / "null" / "samples.npz").files == ["arr_0"]
    shared = [number for number, label in enumerate(labels_of(tmp_path / "list")) if label == number % 3]
    listed, three, none = (files(tmp_path / name) for name in ("list", "three", "null"))
    assert [name for name in listed if listed[name] == three[name]] == [f"{number:06d}.png" for number in shared]
    assert not set(none.values()) & set(three.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [3, 11]}, "labels outside 0 to 10: 3 to 11"),
        ({"classes": 11}, "classes=11: .* has 10, from 0 to 9"),
        ({"classes": 3, "labels": [1]}, "classes=3 is the number of classes that 'balanced' and 'random' take"),
        ({"labels": "none", "sampler": {"guidance": 2}}, "sampler.guidance=2 leads from 'no class' to a class"),
        ({"png": False, "npz": False, "grid": 0}, "png, npz and grid are all off"),
        ({"sampler": {"method": "sde"}}, "sampler.method=sde does not go with a discrete schedule"),
    ],
)
def test_mistakes_are_found_before_any_work(dit_folder, dit, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_sample(config(dit_folder, tmp_path / "out", **changes), dit)
    assert not (tmp_path / "out").exists()


def test_networks_without_classes(unet_folder, unet, tmp_path):
    with pytest.raises(ConfigError, match="takes no class labels, got labels=random; leave labels out"):
        run_sample(config(unet_folder, tmp_path / "out", labels="random"), unet)
    with pytest.raises(ConfigError, match="is unconditional, so nothing can guide it"):
        run_sample(config(unet_folder, tmp_path / "out", sampler={"guidance": 2}), unet)
    run_sample(config(unet_folder, tmp_path / "out", labels="none"), unet)


def test_latents_need_their_autoencoder(tmp_path):
    folder = save_tiny("sit", tmp_path / "sit")
    with pytest.raises(ConfigError, match="makes latents of 4 channels .* give backbone.codec"):
        run_sample(config(folder, tmp_path / "out"))
    vae = save_tiny("dit", tmp_path / "dit") / "vae"
    facts = run_sample(config(folder, tmp_path / "out", backbone={"source": folder, "codec": vae, "device": "cpu"}))
    assert facts["codec"]["kind"] == "AutoencoderKL" and facts["sampler"] == "euler"
    with pytest.raises(ConfigError, match="without an autoencoder that turns them to images"):
        run_sample(config("pixels", tmp_path / "none", backbone={"source": "pixels", "family": "prepare"}))
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValidationError, match="at least 1"):
        config(folder, tmp_path / "empty", labels=[])


def test_edm(tmp_path):
    folder = save_tiny("edm", tmp_path / "edm")
    sampler = {"steps": 3, "guidance": 1.5, "churn": 1}
    facts = run_sample(
        config(folder, tmp_path / "out", sampler=sampler, labels=[4]), load_backbone(folder, device="cpu")
    )
    assert (facts["sampler"], facts["nfe"], facts["guided_calls"], facts["churn"]) == ("heun", 5, 5, 1)
    assert labels_of(tmp_path / "out") == [4] * 6


@pytest.mark.mp
def test_the_command_on_two_processes(dit_folder, tmp_path, two_processes, monkeypatch, capsys):
    words = [f"backbone={dit_folder}", "backbone.device=cpu", "count=7", "sampler.steps=3", "batch_size=2"]
    assert main(["sample", *words, f"out={tmp_path / 'one'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "one" / "grid.png")
    monkeypatch.setattr("diffrep.dist.launch", two_processes.launch)
    assert main(["sample", *words, f"out={tmp_path / 'two'}", "--nproc", "2"]) == 0
    assert "in 2 processes" in capsys.readouterr().err
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert all(
        torch.equal(*pair) for pair in zip(*(arrays_of(tmp_path / name) for name in ("one", "two")), strict=True)
    )


def arrays_of(out):
    with np.load(out / "samples.npz") as arrays:
        return [torch.from_numpy(arrays[name]) for name in arrays.files]
