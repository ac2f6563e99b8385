import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffrep.config import ExtractConfig, FeatureRequest, validate
from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences import open_pairs
from diffrep.data.correspondences.cats import MIRRORED, head_crop
from diffrep.data.pairs import Pair, PairImage, PairSet, frames, pair_images
from diffrep.errors import ConfigError, DataError, UnknownNameError
from diffrep.extract.job import ExtractJob


def draw(file, size=(32, 24), mode="RGB"):
    """Saves noise of (W, H) pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).convert(mode).save(file)


@pytest.fixture
def listed(tmp_path):
    """A JSON of four pairs of five images in two categories, and its content, to be changed and written again."""
    for name, size, mode in (
        ("a.png", (32, 24), "RGB"),
        ("b.png", (20, 40), "L"),
        ("images/c.png", (16, 16), "RGBA"),
        ("images/d.png", (9, 7), "P"),
        ("e.png", (32, 32), "RGB"),
    ):
        draw(tmp_path / name, size, mode)
    pairs = [
        {
            "source_path": source,
            "target_path": target,
            "source_points": [[1, 2], [3, 4], [5, 6]],
            "target_points": [[2, 1], None, [6, 5]],
            "category": category,
            "keys": ["nose", "left eye", "right eye"],
            "source_bounding_box": [0, 0, 8, 8],
            "target_bounding_box": [1, 1, 9, 9],
            "viewpoint": number,
        }
        for number, (source, target, category) in enumerate(
            [
                ("a.png", "b.png", "cat"),
                ("b.png", "c.png", "cat"),
                ("c.png", "a.png", "cat"),
                ("d.png", "e.png", "dog"),
            ]
        )
    ]

    def write(**options):
        (tmp_path / "pairs.json").write_text(json.dumps(pairs))
        return open_pairs(PairsConfig(path=tmp_path, **options))

    return pairs, write, tmp_path


def test_a_json_of_pairs(listed):
    _, write, root = listed
    found = write()
    assert (found.name, [image.id for image in found.images]) == (
        root.name,
        ["a.png", "b.png", "c.png", "d.png", "e.png"],
    )
    assert found.images[2].file == root / "images" / "c.png"
    first = found.pairs[0]
    assert (first.source, first.target, first.category, first.keys) == (0, 1, "cat", ("nose", "right eye"))
    assert first.source_points.tolist() == [[1, 2], [5, 6]], "the second is not visible in the target"
    assert first.target_points.tolist() == [[2, 1], [6, 5]]
    assert (first.source_box, first.target_box) == ((0, 0, 8, 8), (1, 1, 9, 9))
    assert first.about == {"viewpoint": 0}
    assert found.dropped == {"points": 0, "pairs": 0}
    assert open_pairs(PairsConfig(path=root / "pairs.json", kind="json")).fingerprint() == found.fingerprint()


def test_a_json_with_a_name_and_symmetries(listed):
    pairs, _, root = listed
    swap = {"left eye": "right eye", "right eye": "left eye"}
    content = {"name": "mine", "pairs": pairs, "mirrored": {"cat": swap, "cow": swap}}
    (root / "other.json").write_text(json.dumps(content))
    found = open_pairs(PairsConfig(path=root / "other.json"))
    assert (found.name, found.mirrored) == ("mine", {"cat": swap}), "only of categories that are there"
    (root / "other.json").write_text(json.dumps({**content, "mirrored": {"cat": ["left eye"]}}))
    with pytest.raises(DataError, match="'mirrored' has keys and their partners for each category"):
        open_pairs(PairsConfig(path=root / "other.json"))


def test_points_outside_are_dropped_and_pairs_without_points_too(listed):
    pairs, write, _ = listed
    # Image a is 32 x 24: the border beyond the last pixel is outside.
    pairs[0]["source_points"] = [[0, 0], [1, 1], [31.5, 23.5]]
    pairs[2]["target_points"] = [[32, 0], [0, 24], [-0.5, 3]]
    pairs[3]["source_points"] = [None, None, None]
    found = write()
    assert found.dropped == {"points": 3, "pairs": 2}
    assert found.pairs[0].source_points.tolist() == [[0, 0], [31.5, 23.5]]
    assert [(pair.source, pair.target) for pair in found.pairs] == [(0, 1), (1, 2)]
    assert [image.id for image in found.images] == ["a.png", "b.png", "c.png"], "images of dropped pairs are gone"
    for pair in pairs:
        pair["target_points"] = [None, None, [99, 99]]
    with pytest.raises(DataError, match="none of the 4 pairs has a point that is visible in both images"):
        write()


def test_categories_images_sample_and_limit(listed):
    _, write, _ = listed
    assert [pair.category for pair in write(categories="dog").pairs] == ["dog"]
    assert len(write(limit=2).pairs) == 2
    # Of a, b, c, d, e: the first two share one pair, the last two another one.
    assert [image.id for image in write(images=2).images] == ["a.png", "b.png"]
    assert [image.id for image in write(images=-2).images] == ["d.png", "e.png"]
    assert [image.id for image in write(images=(1, 3)).images] == ["b.png", "c.png"]
    assert [image.id for image in write(images=2, categories="dog").images] == ["d.png", "e.png"]
    drawn = [write(sample=2, seed=seed) for seed in range(6)]
    assert {len(found.pairs) for found in drawn} == {3}
    assert len({found.fingerprint() for found in drawn}) > 1
    assert write(sample=2, seed=3).fingerprint() == drawn[3].fingerprint()
    alone = write(sample=2, seed=3, categories="cat")
    assert [pair.about for pair in alone.pairs] == [pair.about for pair in drawn[3].pairs[:2]]
    with pytest.raises(UnknownNameError, match="unknown category of .* 'cta'; did you mean 'cat'"):
        write(categories="cta")
    with pytest.raises(DataError, match="no pair is left with the chosen categories and images=1"):
        write(images=1)


def test_malformed_pairs_are_named(listed):
    pairs, write, root = listed
    wrong = [
        ("source_points", [[1, 2], [3, 4]], r"a.png -> b.png has 2 source points and 3 target points"),
        ("keys", ["nose"], "a.png -> b.png has 3 points and 1 keys"),
        ("target_points", [[1, 2, 3]], r"pairs.json, pair 0: points are a list of \[x, y\] or null"),
        ("target_points", 5, "pair 0: points are a list"),
        ("source_bounding_box", [4, 4, 4, 9], r"pair 0: the box \[4.0, 4.0, 4.0, 9.0\] has no area"),
        ("target_bounding_box", [4, 4, 9], r"pair 0: a box is \[x0, y0, x1, y1\]"),
    ]
    for key, value, message in wrong:
        whole, pairs[0][key] = pairs[0][key], value
        with pytest.raises(DataError, match=message):
            write()
        pairs[0][key] = whole
    del pairs[0]["target_path"]
    with pytest.raises(DataError, match="pair 0 lacks target_path; it has source_path"):
        write()
    for content, message in (
        ("{", "cannot read"),
        ("[1]", "is not a list of pairs"),
        ('{"a": 1}', "is not a list"),
        ("[]", "there are no pairs"),
    ):
        (root / "pairs.json").write_text(content)
        with pytest.raises(DataError, match=message):
            open_pairs(PairsConfig(path=root))


def test_missing_and_damaged_images(listed):
    _, write, root = listed
    (root / "images" / "c.png").unlink()
    (root / "e.png").unlink()
    with pytest.raises(DataError, match=r"2 of 5 images are missing; the first is '.*c.png'"):
        write()
    assert len(write(images=2).pairs) == 1, "images of pairs that are not chosen may be missing"
    (root / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="b.png: cannot read the image"):
        write(images=2)


def test_what_is_no_set_of_pairs(tmp_path):
    with pytest.raises(DataError, match="no set of pairs at"):
        open_pairs(PairsConfig(path=tmp_path / "nothing"))
    with pytest.raises(DataError, match="is no set of pairs that is known; the kinds are spair, pf-pascal"):
        open_pairs(PairsConfig(path=tmp_path))
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(DataError, match="is a file; a set of kind cub is a folder"):
        open_pairs(PairsConfig(path=tmp_path / "file.txt", kind="cub"))


def test_config_errors(listed):
    _, write, root = listed
    assert validate(PairsConfig, {"path": "x", "images": [8, 16]}).images == (8, 16)
    for values, message in (
        ({"images": 0}, "images is 0; it is a number other than 0"),
        ({"images": [5, 5]}, "two rising positions from 0 on"),
        ({"images": [-3, 5]}, "two rising positions from 0 on"),
        ({"kind": "spair", "crop_scale": 2}, "'crop_scale' is for cats, and this is spair"),
        ({"kind": "cats", "split": "test"}, "'split' is for spair, pf-pascal, cub, ap-10k, and this is cats"),
        ({"sample": 0}, "sample"),
        ({"crop_scal": 2}, "crop_scal: unknown key; did you mean 'crop_scale'"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(PairsConfig, {"path": "x", **values})
    with pytest.raises(ConfigError, match="'grid' is for hpatches, and this is json"):
        write(grid=5)
    assert validate(PairsConfig, str(root)).path == str(root)


def pair(points, **options):
    points = np.array(points, dtype=np.float64)
    return Pair(0, 1, points, options.pop("target_points", points + 1), **options)


def test_a_set_checks_its_pairs(tmp_path):
    images = [PairImage("a", tmp_path / "a"), PairImage("b", tmp_path / "b")]
    assert len(PairSet("mine", images, [pair([[1, 2]])]).pairs) == 1
    for wrong, message in (
        ([], "mine: there are no pairs"),
        (
            [pair([[1, 2]], target_points=np.zeros((2, 2)))],
            r"pair 0 \(a -> b\) has 1 source points and 2 target points",
        ),
        ([pair([[1, np.nan]])], "finite"),
        ([pair([1, 2])], r"points of shape \(2,\)"),
        ([pair([[1, 2]], keys=("a", "b"))], "1 points and 2 keys"),
        ([pair([[1, 2]], target_box=(3, 3, 3, 5))], r"a box without area, \(3, 3, 3, 5\)"),
    ):
        with pytest.raises(DataError, match=message):
            PairSet("mine", images, wrong)


POINTS = [(30, 30), (50, 30), (40, 45), (20, 20), (24, 4), (34, 16), (46, 16), (56, 4), (60, 20)]


def save_cat(file, size=(100, 80), points=POINTS):
    draw(file, size)
    words = " ".join(f"{x} {y}" for x, y in points)
    file.with_name(file.name + ".cat").write_text(f"9 {words} ")


@pytest.fixture
def cats(tmp_path):
    for name in ("CAT_00/1.jpg", "CAT_00/2.jpg", "CAT_01/3.jpg", "CAT_01/4.jpg"):
        save_cat(tmp_path / name)
    return tmp_path


def test_heads_of_cats(cats):
    found = open_pairs(PairsConfig(path=cats))
    assert len(found.images) == 4
    assert {(one.source, one.target) for one in found.pairs} == {(i, j) for i in range(4) for j in range(4) if i != j}
    # The box is 20..60 x 4..45, its longer side 41, the square's 74, around (40, 24.5) and moved into the photo.
    head = found.images[0]
    assert (head.id, head.crop) == ("CAT_00/1.jpg@3,0,77,74", (3, 0, 77, 74))
    assert head.read().size == (74, 74)
    assert head.size() == (74, 74)
    one = found.pairs[0]
    assert one.source_points.tolist() == [[x - 3, y] for x, y in POINTS]
    assert one.source_box == (17, 4, 57, 45)
    assert (one.category, one.keys[3], found.dropped["points"]) == ("cat", "left_ear_1", 0)
    assert open_pairs(PairsConfig(path=cats, crop_scale=1)).images[0].crop == (20, 4, 61, 45)


def test_the_symmetry_of_a_cat_holds_for_its_points():
    """The drawn points are symmetric about x = 40: mirroring the picture must give the partner's position."""
    found = dict(zip(MIRRORED, MIRRORED.values(), strict=True))
    keys = ["left_eye", "right_eye", "mouth", *(f"{side}_ear_{i}" for side in ("left", "right") for i in (1, 2, 3))]
    for key, (x, y) in zip(keys, POINTS, strict=True):
        partner = POINTS[keys.index(found.get(key, key))]
        assert partner == (80 - x, y)


def test_points_that_the_photo_cuts_off(cats):
    cut = [*POINTS[:4], (24, -9), *POINTS[5:]]
    save_cat(cats / "CAT_00/1.jpg", points=cut)
    found = open_pairs(PairsConfig(path=cats))
    counts = {len(one.keys) for one in found.pairs if 0 in (one.source, one.target)}
    assert counts == {8}
    assert found.dropped == {"points": 6, "pairs": 0}
    assert all("left_ear_2" not in one.keys for one in found.pairs if one.target == 0)
    box = next(one.source_box for one in found.pairs if one.source == 0)
    assert box[1] >= 0, "the box is of the points inside"


def test_training_and_test_cats_share_none(cats):
    train = open_pairs(PairsConfig(path=cats, images=2))
    test = open_pairs(PairsConfig(path=cats, images=-2))
    assert {image.id[:8] for image in train.images} == {"CAT_00/1", "CAT_00/2"}
    assert {image.id[:8] for image in test.images} == {"CAT_01/3", "CAT_01/4"}
    assert len(test.pairs) == 2


def test_head_crops_stay_in_the_photo():
    points = np.array(POINTS, dtype=np.float64)
    assert head_crop(points, (80, 100), 100) == (0, 0, 80, 80), "never longer than the photo's shorter side"
    assert head_crop(points + (60, 40), (80, 100), 1.8) == (26, 6, 100, 80)
    assert head_crop(points - 70, (80, 100), 1) == (0, 0, 41, 41)


def test_bad_cats(cats):
    (cats / "CAT_00/1.jpg.cat").write_text("8 1 2 3")
    with pytest.raises(DataError, match="1.jpg.cat: expected '9 x0 y0 ... x8 y8'"):
        open_pairs(PairsConfig(path=cats))
    (cats / "CAT_00/1.jpg.cat").write_text("2 1 2 3 4")
    with pytest.raises(DataError, match="1.jpg.cat has 2 points; a head has 9"):
        open_pairs(PairsConfig(path=cats))
    save_cat(cats / "CAT_00/1.jpg")
    (cats / "CAT_00/1.jpg").unlink()
    with pytest.raises(DataError, match="1.jpg.cat has no photo beside it, '1.jpg'"):
        open_pairs(PairsConfig(path=cats))


def test_each_image_is_extracted_once_onto_its_canvas(listed, unet, tmp_path):
    _, write, _ = listed
    found = write()
    images = pair_images(found, unet.image_channels, 16, "pad")
    assert (len(images), images.id(3)) == (5, "d.png")
    placed = frames(found, 16, "pad")
    assert placed[1].offset == (4, 0)
    assert images[1][:, :, :4].max() == images[1][:, :, 12:].max() == 0 < images[1][:, :, 4:12].max()
    config = ExtractConfig(
        backbone="unused",
        data=found.images[0].file.parent,
        request=FeatureRequest(unet.blocks()[0], 100),
        out=tmp_path / "store",
        unit_size=2,
    )
    store = ExtractJob(config, unet, images).run()
    assert store.ids == [image.id for image in found.images]
    assert store[unet.blocks()[0], 100].shape[0] == 5
    assert store.meta["transform"] == {"channels": unet.image_channels, "size": 16, "fit": "pad"}
    assert images.fingerprint() == pair_images(write(limit=4), 1, 16).fingerprint()
    assert images.fingerprint() != pair_images(write(categories="cat"), 1, 16).fingerprint()


def test_an_unreadable_image_of_a_pair_is_named_once(listed):
    _, write, root = listed
    found = write()
    (root / "b.png").write_bytes((root / "b.png").read_bytes()[:60])
    with pytest.raises(DataError, match="^b.png: cannot read the image"):
        pair_images(found, 3, 16)[1]
    with pytest.raises(DataError, match="^b.png: cannot read the image"):
        found.images[1].read()
    gone = replace(found.images[1], file=root / "gone.png")
    with pytest.raises(DataError, match="^b.png: cannot read the image"):
        gone.size()


def test_fingerprints_follow_points_and_crops(listed, cats):
    pairs, write, _ = listed
    first = write().fingerprint()
    pairs[0]["source_points"][0] = [1, 3]
    assert write().fingerprint() != first
    narrow, wide = (open_pairs(PairsConfig(path=cats, kind="cats", crop_scale=scale)) for scale in (1.2, 1.6))
    assert narrow.fingerprint() != wide.fingerprint()
    assert pair_images(narrow, 3, 16).fingerprint() != pair_images(wide, 3, 16).fingerprint()
