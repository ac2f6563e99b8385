import csv

import numpy as np
import pytest
import torch

from diffrep.config import AggregateConfig, CorrespondConfig, PairsConfig
from diffrep.config.correspond import DescriptorConfig
from diffrep.correspond.aggregate import run_aggregate
from diffrep.correspond.descriptor import Descriptor
from diffrep.correspond.evaluate import run_evaluate
from diffrep.correspond.training import Training, View, cells_of, on_canvas
from diffrep.data.correspondences import open_pairs
from diffrep.data.frame import frame_of
from diffrep.errors import ConfigError
from diffrep.heads import load_head

LAYERS = ["mid_block", "up_blocks.0"]


@pytest.fixture
def make(photos, unet_folder, tmp_path):
    def make(out="run", **changes):
        given = {
            "backbone": str(unet_folder),
            "pairs": str(photos),
            "val_pairs": str(photos),
            "request": {"layers": LAYERS, "levels": [5, 50], "dtype": "float32"},
            "size": 16,
            "width": 16,
            "groups": 2,
            "epochs": 12,
            "pairs_per_step": 2,
            "lr": 5e-3,
            "alpha": 0.2,
            "out": str(tmp_path / out),
        }
        return AggregateConfig(**given | changes)

    return make


def losses(out):
    files = sorted(out.glob("csv/*/metrics.csv"))
    return [float(row["train_loss"]) for file in files for row in csv.DictReader(file.open())]


def test_it_learns_and_the_evaluation_agrees(make, unet, photos, unet_folder, tmp_path):
    metrics = run_aggregate(make(), unet)
    found = losses(tmp_path / "run")
    assert found[-1] < 0.75 * found[0]
    head = load_head(tmp_path / "run" / "head")
    assert head.about["val_pck"] == metrics["val"]
    assert sum(map(sum, metrics["mixing"][0]["shares"])) == pytest.approx(1)
    assert "What the aggregation network mixes" in (tmp_path / "run" / "report.html").read_text()
    evaluated = run_evaluate(
        CorrespondConfig(
            backbone=str(unet_folder),
            pairs=str(photos),
            request={"layers": LAYERS, "levels": [5, 50], "dtype": "float32"},
            size=16,
            alphas=[0.2],
            aggregation=str(tmp_path / "run" / "head"),
            out=str(tmp_path / "evaluation"),
        ),
        unet,
    )
    (score,) = evaluated["correspondence"]["scores"]
    assert score["per_image"]["0.2"][0] == pytest.approx(metrics["val"])
    assert score["read"] == [f"{layer}@t={level}" for level in (5, 50) for layer in LAYERS]


@pytest.mark.parametrize("loss", ["sparse", "dense"])
def test_other_losses_with_flips(make, unet, tmp_path, loss):
    run_aggregate(make(loss=loss, flip=True, learn_scale=True, schedule="cosine", lr=1e-2), unet)
    found = losses(tmp_path / "run")
    assert min(found[-3:]) < found[0]


def test_live_maps_and_recomputed_activations_change_nothing(make, unet, tmp_path):
    run_aggregate(make("stored", epochs=2), unet)
    run_aggregate(make("live", epochs=2, live=True, checkpoint=True), unet)
    one, two = (load_head(tmp_path / name / "head").state_dict() for name in ("stored", "live"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-4, msg=name)
    assert not (tmp_path / "live" / "features").exists()


def test_a_stopped_run_goes_on(make, unet, tmp_path, monkeypatch):
    whole, out = run_aggregate(make("whole", epochs=4), unet), tmp_path / "run"
    judge, calls = Training.judge, []

    def stop(self):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return judge(self)

    monkeypatch.setattr(Training, "judge", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run_aggregate(make(epochs=4), unet)
    assert (out / "last.ckpt").exists() and not (out / "head").exists()
    monkeypatch.undo()
    again = run_aggregate(make(epochs=4), unet)
    one, two = (load_head(folder / "head").state_dict() for folder in (tmp_path / "whole", out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    stamp = (out / "last.ckpt").stat().st_mtime_ns
    finished = run_aggregate(make(epochs=4), unet)
    assert (out / "last.ckpt").stat().st_mtime_ns == stamp, "a finished run is not trained again"
    assert whole["val"] == again["val"] == finished["val"]
    with pytest.raises(ConfigError, match="trained otherwise .*lr: 0.005 there, 0.1 now"):
        run_aggregate(make(epochs=4, lr=0.1), unet)


def test_points_in_cells():
    frame = frame_of((20, 40), (16, 32))
    # The pixels 0 to 4 of 40 make 4 canvas pixels, which make half a cell of 8.
    cells = cells_of(on_canvas([[0.0, 0.0], [39.0, 19.0]], frame), (16, 32), (2, 4))
    torch.testing.assert_close(cells, torch.tensor([[-0.45, -0.45], [3.45, 1.45]], dtype=torch.float64))


def test_augmented_views_keep_their_points(make, unet, photos, tmp_path):
    """What lies under a point before lies under it afterwards, up to brightness and contrast."""
    pairs = open_pairs(PairsConfig(path=photos))
    config = DescriptorConfig(**{name: getattr(make(), name) for name in DescriptorConfig.model_fields})
    descriptor = Descriptor("net", config.model_copy(update={"size": 64}), pairs, tmp_path, "photos", backbone=unet)
    seen = 0
    for number in range(12):
        rng = np.random.default_rng(number)
        views = View.of_pair(descriptor, pairs.pairs[0], rng)
        again = View.of_pair(descriptor, pairs.pairs[0], np.random.default_rng(number))
        assert torch.equal(views[0].pixels, again[0].pixels)
        assert len(views[0].points) == len(views[1].points) <= 3
        if len(views[0].points) < 3:
            continue
        seen += 1
        frame = descriptor.frames[pairs.pairs[0].source]
        before = under(descriptor.images()[pairs.pairs[0].source], on_canvas(pairs.pairs[0].source_points, frame))
        after = under(views[0].pixels, views[0].points)
        gain = (after.max() - after.min()) / (before.max() - before.min())
        assert 0.5 < gain < 1.5
        torch.testing.assert_close(after - after.mean(), gain * (before - before.mean()), atol=0.12, rtol=0)
    assert seen > 3
    metrics = run_aggregate(make(augment=True, epochs=2), unet)
    assert metrics["epochs"] == 2
    with pytest.raises(ValueError, match="augment mirrors pairs already"):
        make(augment=True, flip=True)


def under(pixels, points):
    """Pixels (C, H, W) at points (K, 2), between them bilinearly."""
    grid = torch.from_numpy((points + 0.5) * 2 / np.array(pixels.shape[:0:-1]) - 1).float()
    return torch.nn.functional.grid_sample(pixels[None], grid[None, None], align_corners=False)[0, 0, 0]


def test_what_cannot_be_trained(make, photos, unet):
    with pytest.raises(ValueError, match="groups 32 does not divide a quarter of width 16"):
        make(groups=32)
    with pytest.raises(ValueError, match="leave join and aggregation out"):
        make(join=True)
