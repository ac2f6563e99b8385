import numpy as np
import pytest
from PIL import Image

from diffrep.config import DataConfig, FeatureRequest, MatchConfig, WarpConfig
from diffrep.correspond.geometric import match_warps, run_warp, table
from diffrep.correspond.match import run_match
from diffrep.correspond.matcher import Matcher, pixel_matcher
from diffrep.data import open_images
from diffrep.errors import DataError, LayerError

REQUEST = {"layers": ["mid_block", "up_blocks.0"], "levels": [5], "dtype": "float32"}


@pytest.fixture
def make(unet_folder, tmp_path):
    def make(**changes):
        return MatchConfig(
            **{"backbone": str(unet_folder), "request": REQUEST, "size": 32, "out": tmp_path / "m"} | changes
        )

    return make


def test_two_images_are_matched_and_drawn(make, unet, photos, tmp_path):
    page = run_match(make(lines=5), photos / "0.png", photos / "1.png", unet)
    assert page.read_text().startswith("<!doctype html>")
    with Image.open(tmp_path / "m" / "matches.png") as picture:
        assert picture.height == 384


def test_an_image_matches_itself(make, unet, photos, tmp_path, monkeypatch):
    seen = {}
    import diffrep.correspond.match as module

    drawn = module.draw_matches

    def keep(source, target, points, found, *rest, **options):
        seen["points"], seen["found"] = points, found
        return drawn(source, target, points, found, *rest, **options)

    monkeypatch.setattr(module, "draw_matches", keep)
    run_match(make(request=REQUEST | {"noise": "none"}, points=[(3, 4), (15, 20)]), *[photos / "0.png"] * 2, unet)
    assert np.abs(seen["found"] - seen["points"]).max() <= 1


def test_mistakes(make, unet, photos, tmp_path):
    with pytest.raises(DataError, match="no such image: .*gone.png"):
        run_match(make(), photos / "0.png", photos / "gone.png", unet)
    (tmp_path / "broken.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="broken.png: cannot read the image"):
        run_match(make(), tmp_path / "broken.png", photos / "0.png", unet)
    with pytest.raises(DataError, match=r"point \(20.0, 3.0\) lies outside the first image, 20x28"):
        run_match(make(points=[(20, 3)]), photos / "0.png", photos / "1.png", unet)


def test_warps_have_exact_answers(unet, image_folder):
    """Patches of pixels find where a shift took them; noise does not."""
    images = open_images(DataConfig(path=str(image_folder), size=32, splits="test", limit=3), 1)
    matchers = [
        pixel_matcher(5, 1),
        Matcher("net", unet, FeatureRequest(["conv_in", "mid_block"], [5, 900], dtype="float32")),
    ]
    rows = match_warps(matchers, images, ("affine", "tps"), points=4)
    assert [row["kind"] for row in rows] == ["affine"] * 5 + ["tps"] * 5
    errors = {row["name"]: row["error"] for row in rows if row["kind"] == "tps"}
    assert errors["raw pixels, 5 x 5"] < errors["net, mid_block at t=900"]
    for row in rows:
        assert row["images"] == 3 and row["interval"][0] <= row["error"] <= row["interval"][1]
    again = match_warps(matchers[:1], images, ("tps",), points=4)
    assert again[0] == next(row for row in rows if row["kind"] == "tps" and row["name"] == "raw pixels, 5 x 5")


def test_the_run_writes_a_report(unet, unet_folder, image_folder, tmp_path):
    given = {"backbone": str(unet_folder), "request": REQUEST, "out": str(tmp_path / "warp"), "pictures": 3}
    config = WarpConfig(**given, data={"path": str(image_folder), "size": 16, "splits": "test", "limit": 2}, points=3)
    metrics = run_warp(config, unet)
    assert len(metrics["geometric"]) == 2 * 3
    assert len(table(metrics["geometric"]).splitlines()) == 6
    page = (tmp_path / "warp" / "report.html").read_text()
    assert "<h2>Geometric matching</h2>" in page and page.count("matches of ") == 3
    with pytest.raises(ValueError, match="write data.size"):
        WarpConfig(**given, data=str(image_folder), size=16)
    with pytest.raises(ValueError, match="odd side"):
        WarpConfig(**given, data=str(image_folder), patch=4)
    flat = config.model_copy(update={"request": FeatureRequest("time_embedding", [5])})
    with pytest.raises(LayerError, match="time_embedding"):
        run_warp(flat, unet)
