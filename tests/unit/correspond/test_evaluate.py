import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffrep import FeatureRequest, FeatureStore
from diffrep.config import CorrespondConfig, PairsConfig, load_config
from diffrep.correspond.evaluate import run_evaluate, table
from diffrep.data.correspondences import open_pairs
from diffrep.data.pairs import pair_images
from diffrep.errors import CheckpointError, ConfigError, UnknownNameError

LAYERS = ["mid_block", "up_blocks.0"]


@pytest.fixture
def make(photos, unet_folder, tmp_path):
    def make(**changes):
        given = {
            "backbone": str(unet_folder),
            "pairs": str(photos),
            "request": {"layers": LAYERS, "levels": [5, 50], "dtype": "float32"},
            "size": 16,
            "alphas": [0.1, 0.3],
            "out": str(tmp_path / "run"),
            "pictures": 2,
        }
        return CorrespondConfig(**given | changes)

    return make


def plain_loop(pairs, maps):
    """Predicts as DIFT's script does: both maps at the images' sizes, one key point at a time."""
    found = []
    for pair in pairs.pairs:
        sizes = [pairs.images[one].size() for one in (pair.source, pair.target)]
        source, target = (
            F.interpolate(maps[one][None].double(), size, mode="bilinear")[0]
            for one, size in zip((pair.source, pair.target), sizes, strict=True)
        )
        points = []
        for x, y in pair.source_points.astype(int):
            cosine = torch.einsum("c,chw->hw", F.normalize(source[:, y, x], dim=0), F.normalize(target, dim=0))
            place = int(cosine.argmax())
            points.append((place % sizes[1][1], place // sizes[1][1]))
        found.append(np.array(points, dtype=float))
    return found


def test_every_cell_is_matched_as_the_usual_loop_does(make, unet, unet_folder, photos, tmp_path):
    metrics = run_evaluate(make(), unet)
    names = [score["name"] for score in metrics["correspondence"]["scores"]]
    assert names == [f"{unet_folder.name}, {layer} at t={t}" for layer in LAYERS for t in (5, 50)]
    pairs = open_pairs(PairsConfig(path=photos))
    images = pair_images(pairs, 1, 16, "resize")
    ids = [images.id(number) for number in range(len(images))]
    request = FeatureRequest(LAYERS, [5, 50], dtype="float32")
    features = unet.extract(torch.stack([images[number] for number in range(len(images))]), request, ids=ids)
    with np.load(tmp_path / "run" / "predictions.npz") as stored:
        counts = stored["counts"]
        for name in names:
            layer, level = name.rpartition(", ")[2].split(" at ")
            expected = plain_loop(pairs, features[layer, level])
            assert counts.tolist() == [len(one) for one in expected]
            assert (np.abs(stored[f"{name}|dift"] - np.concatenate(expected)).max(1) < 1).mean() > 0.95
    (folder,) = (tmp_path / "run" / "features").iterdir()
    assert len(FeatureStore(folder)) == 4, "each image is read once"


def test_numbers_do_not_depend_on_the_batch_and_a_second_run_reads_nothing(make, unet, tmp_path):
    first = run_evaluate(make(), unet)
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "features").rglob("*.safetensors")}
    again = run_evaluate(make(), unet)
    assert stamps == {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "features").rglob("*.safetensors")}
    other = run_evaluate(make(batch_size=3, unit_size=3, out=str(tmp_path / "other")), unet)
    assert first["correspondence"]["scores"] == again["correspondence"]["scores"]
    assert first["correspondence"]["scores"] == other["correspondence"]["scores"]


def test_several_descriptors_and_protocols(make, unet, tmp_path):
    metrics = run_evaluate(
        make(
            name="joined",
            join=True,
            beside={
                "pixels": {
                    "backbone": {"source": "pixels", "family": "pixels", "config": {"channels": 1, "side": 3}},
                    "request": {"layers": "patches", "levels": "clean"},
                }
            },
            protocols=["dift", {"base": "geoaware", "threshold": "image"}, {"base": "dift", "pose": "mutual"}],
        ),
        unet,
    )
    scores = metrics["correspondence"]["scores"]
    assert [one["name"] for one in scores] == ["joined"] * 3 + ["pixels"] * 3
    assert [one["protocol"] for one in scores[:3]] == [
        "dift",
        "geoaware with threshold=image",
        "dift with pose=mutual",
    ]
    assert len(scores[0]["read"]) == 4
    assert set(scores[0]["categories"]) == {"cat", "dog"}
    lines = table(metrics).splitlines()
    assert len(lines) == 6 and all("per image" in line for line in lines)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Correspondence</h2>" in page and page.count("matches of ") == 2
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["correspondence"]["scores"] == scores
    # Mirror images are read for the pose alone, and by one descriptor each.
    assert len(list((tmp_path / "run" / "features").iterdir())) == 4


def test_padding_keeps_the_aspect(make, unet):
    scores = {}
    for fit in ("resize", "pad"):
        found = run_evaluate(make(fit=fit, join=True, out=make().out + fit), unet)
        scores[fit] = found["correspondence"]["scores"][0]["per_point"]
    assert scores["resize"] != scores["pad"]


def test_what_does_not_go_together(make, unet, tmp_path):
    with pytest.raises(ValueError, match="matched on whole maps"):
        make(request={"layers": "mid_block", "levels": 5, "pool": 2})
    with pytest.raises(ValueError, match="pairs are of given images"):
        make(request={"layers": "mid_block", "levels": "generation 1/4", "noise": "generation"})
    with pytest.raises(ValueError, match="take one of them"):
        make(join=True, aggregation="x")
    with pytest.raises(ValueError, match="has the name of the first descriptor"):
        make(name="a", beside={"a": {"backbone": "cifar-unet"}})
    words = ["backbone=x", "pairs=x", "out=x", "request.layers=a", "request.levels=1", "protocols=dfit"]
    with pytest.raises(ConfigError, match="did you mean 'dift'"):
        load_config(CorrespondConfig, [], words)
    with pytest.raises(CheckpointError, match="no head at|holds no whole head"):
        run_evaluate(make(aggregation=str(tmp_path)), unet)
    with pytest.raises(UnknownNameError, match="family"):
        run_evaluate(make(beside={"b": {"backbone": {"source": str(tmp_path), "family": "pixel"}}}), unet)
