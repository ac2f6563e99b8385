import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from diffrep.config.pairs import PairsConfig
from diffrep.data.correspondences import open_pairs
from diffrep.data.correspondences.ap10k import KEYS
from diffrep.data.correspondences.hpatches import project
from diffrep.data.correspondences.proposal_flow import CLASSES
from diffrep.data.correspondences.spair import mirrored_keys
from diffrep.errors import BackendUnavailable, ConfigError, DataError, UnknownNameError


def draw(file, size=(40, 30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).save(file)


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text if isinstance(text, str) else json.dumps(text))


def opened(path, **options):
    return open_pairs(PairsConfig(path=path, **options))


def spair_pair(number, category, source, target, **changes):
    return {
        "pair_id": number,
        "filename": f"{number:06d}-{source}-{target}:{category}",
        "src_imname": f"{source}.jpg",
        "trg_imname": f"{target}.jpg",
        "src_imsize": [40, 30, 3],
        "trg_imsize": [40, 30, 3],
        "src_bndbox": [2, 3, 30, 28],
        "trg_bndbox": [1, 1, 20, 20],
        "category": category,
        "src_kps": [[5, 6], [7, 8], [39, 29]],
        "trg_kps": [[6, 5], [8, 7], [40, 29]],
        "kps_ids": ["0", "1", "8"],
        "mirror": 0,
        "viewpoint_variation": 2,
        "scale_variation": 1,
        "truncation": 0,
        "occlusion": 3,
        **changes,
    }


@pytest.fixture
def spair(tmp_path):
    for name in ("cat/a", "cat/b", "cat/c", "dog/a", "dog/d"):
        draw(tmp_path / "JPEGImages" / f"{name}.jpg")
    pairs = [(1, "cat", "a", "b"), (2, "cat", "b", "c"), (3, "cat", "a", "c"), (4, "dog", "d", "a")]
    for number, category, source, target in pairs:
        one = spair_pair(number, category, source, target)
        write(tmp_path / "PairAnnotation" / "test" / f"{one['filename']}.json", one)
    write(tmp_path / "PairAnnotation" / "trn" / "000001-a-c:cat.json", spair_pair(1, "cat", "a", "c"))
    return tmp_path


def test_spair(spair):
    found = opened(spair)
    assert [image.id for image in found.images] == ["cat/a.jpg", "cat/b.jpg", "cat/c.jpg", "dog/a.jpg", "dog/d.jpg"]
    assert [(one.source, one.target, one.category) for one in found.pairs] == [
        (0, 1, "cat"),
        (1, 2, "cat"),
        (0, 2, "cat"),
        (4, 3, "dog"),
    ]
    one = found.pairs[0]
    assert (one.keys, one.source_points.tolist(), one.target_points.tolist()) == (
        ("0", "1"),
        [[5, 6], [7, 8]],
        [[6, 5], [8, 7]],
    ), "x = 40 lies outside an image of 40 pixels"
    assert (one.source_box, one.target_box) == ((2, 3, 30, 28), (1, 1, 20, 20))
    assert one.about == {"mirror": 0, "viewpoint_variation": 2, "scale_variation": 1, "truncation": 0, "occlusion": 3}
    assert found.dropped == {"points": 4, "pairs": 0}
    assert found.mirrored["cat"]["0"] == "1"
    assert set(found.mirrored) == {"cat", "dog"}
    assert len(opened(spair, split="train").pairs) == 1
    assert [one.category for one in opened(spair, sample=1).pairs] == ["cat", "dog"]


def test_the_symmetries_of_spair_are_involutions_of_its_ids():
    found = mirrored_keys()
    assert len(found) == 18
    for name, swaps in found.items():
        assert all(swaps[other] == key != other for key, other in swaps.items()), name
        assert {int(key) for key in swaps} <= set(range(30)), name
    # Wheels change sides: 10 to 16 and 20 to 26 are the right and left side of a car.
    assert (found["car"]["14"], found["bus"]["25"], found["dog"].get("6")) == ("24", "15", None)


def test_bad_spair(spair):
    with pytest.raises(UnknownNameError, match="unknown split of SPair-71k 'tets'; did you mean 'test'"):
        opened(spair, split="tets")
    file = spair / "PairAnnotation" / "test" / "000009-a-b:cat.json"
    broken = spair_pair(9, "cat", "a", "b")
    del broken["kps_ids"]
    write(file, broken)
    with pytest.raises(DataError, match="000009-a-b:cat.json: the key 'kps_ids' of a SPair-71k pair is missing"):
        opened(spair)
    write(file, spair_pair(9, "cat", "a", "b", trg_bndbox=[5, 5, 5, 9]))
    with pytest.raises(DataError, match="000009-a-b:cat.json: the box .* has no area"):
        opened(spair)


@pytest.fixture
def pascal(tmp_path):
    from scipy.io import savemat

    home = tmp_path / "PF-dataset-PASCAL"
    for number, name in enumerate(("a", "b", "c")):
        draw(home / "JPEGImages" / f"{name}.jpg")
        marks = {
            "kps": [[1.0 + number, 2], [np.nan, np.nan] if number == 2 else [3, 4], [5, 6]],
            "bbox": [[1, 2, 30, 20]],
        }
        (home / "Annotations" / "cat").mkdir(parents=True, exist_ok=True)
        savemat(home / "Annotations" / "cat" / f"{name}.mat", marks)
    folder = "PF-dataset-PASCAL/JPEGImages"
    write(
        tmp_path / "test_pairs_pf_pascal.csv",
        "source_image,target_image,class,XA,YA,XB,YB\n"
        f"{folder}/a.jpg,{folder}/b.jpg,8,1;3.5,2;4,2;3,1;9\n"
        f"{folder}/b.jpg,{folder}/c.jpg,8,1;50,2;4,2;3,1;9\n",
    )
    write(
        home / "trn_pairs.csv",
        "source_image,target_image,class,flip\n"
        f"{folder}/a.jpg,{folder}/b.jpg,8,0\n{folder}/a.jpg,{folder}/b.jpg,8,1\n{folder}/b.jpg,{folder}/c.jpg,8,0\n",
    )
    return tmp_path


def test_pf_pascal(pascal):
    found = opened(pascal)
    assert [image.id for image in found.images] == ["a.jpg", "b.jpg", "c.jpg"]
    assert (found.name, [len(one.source_points) for one in found.pairs]) == ("pf-pascal", [2, 1])
    one = found.pairs[0]
    assert (one.category, one.keys, one.source_points.tolist()) == ("cat", (), [[1, 2], [3.5, 4]])
    assert one.target_points.tolist() == [[2, 1], [3, 9]]
    assert one.source_box == (1, 2, 30, 20)
    train = opened(pascal / "PF-dataset-PASCAL", split="train")
    assert len(train.pairs) == 2, "the mirrored row is left out"
    assert [pair.keys for pair in train.pairs] == [("0", "1", "2"), ("0", "2")]
    assert train.pairs[1].target_points.tolist() == [[3, 2], [5, 6]]
    assert len(CLASSES) == 20


def test_pf_pascal_without_its_annotations(pascal, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(BackendUnavailable, match=r"\.mat files, which scipy reads: pip install scipy"):
        opened(pascal)
    (pascal / "PF-dataset-PASCAL" / "Annotations").rename(pascal / "elsewhere")
    found = opened(pascal)
    assert (found.pairs[0].source_box, found.pairs[0].target_box) == (None, None)
    with pytest.raises(BackendUnavailable, match="points of training pairs"):
        opened(pascal, split="train")


def test_bad_pf_pascal(pascal):
    with pytest.raises(UnknownNameError, match="unknown split of PF-PASCAL 'val'; known: train, test"):
        opened(pascal, split="val")
    file = pascal / "test_pairs_pf_pascal.csv"
    lines = file.read_text().splitlines()
    for row, message in (
        (lines[1].replace(",8,", ",21,"), "row 2: class '21'; PASCAL VOC's classes are 1 to 20"),
        (lines[1].replace("1;3.5", "1"), "row 2: XA and YA are not equally many numbers"),
        (lines[1].replace("1;3.5", "1;x"), "row 2: XA and YA are not equally many numbers"),
        (
            lines[1].replace(",2;3,", ",2;3;4,").replace(",1;9", ",1;9;9"),
            "a.jpg -> b.jpg has 2 source points and 3 target",
        ),
        (lines[1] + ",5", "row 2: 8 columns where the header has 7"),
    ):
        write(file, f"{lines[0]}\n{row}\n")
        with pytest.raises(DataError, match=message):
            opened(pascal)
    write(file, "a,b\n1,2\n")
    with pytest.raises(DataError, match=r"has the columns \['a', 'b'\]; a list of PF-PASCAL has source_image"):
        opened(pascal)
    write(pascal / "PF-dataset-PASCAL" / "Annotations" / "cat" / "a.mat", "no matlab")
    with pytest.raises(DataError, match="cannot read kps and bbox of .*a.mat"):
        opened(pascal, split="train")


@pytest.fixture
def willow(tmp_path):
    for name in ("car(G)/1.png", "car(G)/2.png", "duck(S)/3.png", "duck(S)/4.png"):
        draw(tmp_path / "PF-dataset" / name)
    header = ["imageA", "imageB", *(f"{axis}{side}{i}" for side in "AB" for axis in "XY" for i in range(1, 11))]
    values = [*range(1, 11), *range(11, 21), *range(2, 12), *range(12, 22)]
    with open(tmp_path / "test_pairs_pf.csv", "w", newline="") as text:
        table = csv.writer(text)
        table.writerow(header)
        table.writerow(["PF-dataset/car(G)/1.png", "PF-dataset/car(G)/2.png", *values])
        table.writerow(["PF-dataset/duck(S)/3.png", "PF-dataset/duck(S)/4.png", *values])
    return tmp_path


def test_pf_willow(willow):
    found = opened(willow)
    assert (found.name, found.images[0].id) == ("pf-willow", "car(G)/1.png")
    one = found.pairs[0]
    assert one.source_points.tolist() == [[i, i + 10] for i in range(1, 11)]
    assert one.target_points.tolist() == [[i, i + 10] for i in range(2, 12)]
    assert one.target_box == (2, 12, 11, 21), "the box of the ten points"
    assert [pair.category for pair in found.pairs] == ["car(G)", "duck(S)"]
    with pytest.raises(ConfigError, match="'split' is for spair, pf-pascal, cub, ap-10k, and this is pf-willow"):
        opened(willow, split="test")
    file = willow / "test_pairs_pf.csv"
    write(file, file.read_text().replace(",21\n", ",x\n"))
    with pytest.raises(DataError, match="row 2: could not convert string to float"):
        opened(willow)
    write(file, "imageA,imageB\na,b\n")
    with pytest.raises(DataError, match="has 2 columns; a list of PF-WILLOW has 42"):
        opened(willow)


@pytest.fixture
def cub(tmp_path):
    names = {
        1: "001.Albatross/a.jpg",
        2: "001.Albatross/b.jpg",
        3: "001.Albatross/c.jpg",
        4: "002.Auk/d.jpg",
        5: "002.Auk/e.jpg",
    }
    for name in names.values():
        draw(tmp_path / "images" / name)
    write(tmp_path / "images.txt", "".join(f"{n} {name}\n" for n, name in names.items()))
    write(tmp_path / "train_test_split.txt", "1 0\n2 0\n3 1\n4 0\n5 0\n")
    write(tmp_path / "bounding_boxes.txt", "".join(f"{n} 2.0 3.0 20.0 10.0\n" for n in names))
    write(tmp_path / "parts" / "parts.txt", "1 back\n2 left eye\n3 right eye\n")
    places = [(n, part, 5.0 * part, 2.0 * n, int((n, part) != (2, 3))) for n in names for part in (1, 2, 3)]
    write(tmp_path / "parts" / "part_locs.txt", "".join(" ".join(map(str, place)) + "\n" for place in places))
    return tmp_path


def test_cub(cub):
    found = opened(cub)
    assert [(one.source, one.target) for one in found.pairs] == [(0, 1), (1, 0), (2, 3), (3, 2)], "test images"
    one = found.pairs[0]
    assert (one.category, one.keys, one.source_box) == ("001.Albatross", ("back", "left eye"), (2, 3, 22, 13))
    assert one.source_points.tolist() == [[5, 2], [10, 2]], "the right eye is hidden in the second image"
    assert found.mirrored["002.Auk"] == {"left eye": "right eye", "right eye": "left eye"}
    assert len(opened(cub, split="all").pairs) == 6 + 2
    assert [pair.category for pair in opened(cub, split="all", sample=2, seed=4).pairs] == ["001.Albatross"] * 2 + [
        "002.Auk"
    ] * 2
    with pytest.raises(DataError, match="there are no pairs"):
        opened(cub, split="train")  # a single image
    with pytest.raises(UnknownNameError, match="unknown split of CUB-200-2011 'tst'"):
        opened(cub, split="tst")


def test_bad_cub(cub):
    for name, content, message in (
        ("bounding_boxes.txt", "1 2.0 3.0 0.0 10.0\n", "image 1: the box .* has no area"),
        ("bounding_boxes.txt", "1 2.0 3.0\n", "image 1: a box is x, y, width, height here"),
        (
            "bounding_boxes.txt",
            "2 2.0 3.0 4.0 5.0\n",
            r"image 1 \(001.Albatross/a.jpg\) lacks its split, its box or its parts",
        ),
        ("images.txt", "one a.jpg\n", "expected a number and a text"),
        ("parts/part_locs.txt", "1 9 0 0 1\n", "is not image, part, x, y, visible"),
    ):
        whole = (cub / name).read_text()
        write(cub / name, content)
        with pytest.raises(DataError, match=message):
            opened(cub)
        write(cub / name, whole)
    (cub / "parts" / "parts.txt").unlink()
    with pytest.raises(DataError, match="cannot read .*parts.txt"):
        opened(cub)


def animal(number, image, category, hidden=()):
    flags = [0 if i in hidden else 2 for i in range(17)]
    keypoints = [
        value for i, flag in enumerate(flags) for value in (2 * i + number if flag else 0, i if flag else 0, flag)
    ]
    return {"id": number, "image_id": image, "category_id": category, "bbox": [1, 2, 30, 20], "keypoints": keypoints}


@pytest.fixture
def ap10k(tmp_path):
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 60, "height": 40} for i in range(1, 8)]
    for one in images:
        draw(tmp_path / "data" / one["file_name"], (60, 40))
    content = {
        "images": images,
        "categories": [
            {"id": 1, "name": "antelope", "supercategory": "Bovidae"},
            {"id": 2, "name": "bison", "supercategory": "Bovidae"},
            {"id": 3, "name": "fox", "supercategory": "Canidae"},
        ],
        # Image 6 has two animals; of the animal of image 7 only two points are visible.
        "annotations": [
            animal(1, 1, 1),
            animal(2, 2, 1, hidden=(0, 16)),
            animal(3, 3, 2),
            animal(4, 4, 3),
            animal(5, 5, 3),
            animal(6, 6, 1),
            animal(7, 6, 1),
            animal(8, 7, 1, hidden=range(2, 17)),
        ],
    }
    write(tmp_path / "annotations" / "ap10k-test-split1.json", content)
    return tmp_path, content


def test_ap10k(ap10k):
    root, _ = ap10k
    found = opened(root)
    assert [(one.source, one.target, one.category) for one in found.pairs] == [
        (0, 1, "antelope"),
        (1, 0, "antelope"),
        (2, 3, "fox"),
        (3, 2, "fox"),
    ]
    one = found.pairs[0]
    assert (len(one.keys), one.keys[0], one.source_box) == (15, "right_eye", (1, 2, 31, 22))
    assert one.source_points[0].tolist() == [3, 1]
    assert found.mirrored["fox"]["left_back_paw"] == "right_back_paw"
    assert "nose" not in found.mirrored["fox"]
    species = opened(root, subset="cross-species")
    assert {one.category for one in species.pairs} == {"Bovidae"}
    names = [(species.images[one.source].id[-5], species.images[one.target].id[-5]) for one in species.pairs]
    assert sorted(names) == [("1", "3"), ("2", "3"), ("3", "1"), ("3", "2")]
    families = opened(root, subset="cross-family", split="test")
    assert ({one.category for one in families.pairs}, len(families.pairs)) == ({"all"}, 2 * 3 * 2)
    with pytest.raises(UnknownNameError, match="unknown split of AP-10K 'train'; known: test"):
        opened(root, split="train")


def test_bad_ap10k(ap10k):
    root, content = ap10k
    file = root / "annotations" / "ap10k-test-split1.json"
    for key, value, message in (
        ("keypoints", [1, 2, 2], "annotation 1: 3 numbers of key points; 17 points with x, y, v are needed"),
        ("bbox", [1, 2, 0, 5], "annotation 1: the box .* has no area"),
        ("image_id", 99, "the key 99 of a COCO annotation is missing"),
    ):
        first = {**content["annotations"][0], key: value}
        write(file, {**content, "annotations": [first, *content["annotations"][1:]]})
        with pytest.raises(DataError, match=message):
            opened(root)


def test_prepared_pairs_of_ap10k(ap10k):
    """The folders that GeoAware-SC's notebook writes, with paths relative to that project."""
    root, _ = ap10k
    for number in (1, 2):
        name = f"Bovidae/antelope/{number}"
        draw(root / "JPEGImages" / f"{name}.jpg", (60, 40))
        write(root / "ImageAnnotation" / f"{name}.json", {**animal(number, number, 1), "width": 60, "height": 40})
    folder = "data/ap-10k/ImageAnnotation/Bovidae/antelope"
    pair = {"src_json_path": f"{folder}/1.json", "trg_json_path": f"{folder}/2.json"}
    write(root / "PairAnnotation" / "test" / "000001-1-2:antelope.json", pair)
    write(
        root / "PairAnnotation" / "test_cross_species" / "000001-2-1:Bovidae.json",
        dict(zip(pair, list(pair.values())[::-1], strict=True)),
    )
    found = opened(root)
    assert [image.id for image in found.images] == ["Bovidae/antelope/1.jpg", "Bovidae/antelope/2.jpg"]
    assert [(one.source, one.target, one.category, one.keys) for one in found.pairs] == [(0, 1, "antelope", KEYS)]
    crossed = opened(root, subset="cross-species").pairs
    assert [(one.source, one.target, one.category) for one in crossed] == [(1, 0, "Bovidae")]
    with pytest.raises(UnknownNameError, match="unknown split of AP-10K, cross-family 'test'; known: none"):
        opened(root, subset="cross-family")
    write(root / "PairAnnotation" / "test" / "000001-1-2:antelope.json", {"src_json_path": f"{folder}/1.json"})
    with pytest.raises(DataError, match="the key 'trg_json_path' of a prepared pair is missing"):
        opened(root)


@pytest.fixture
def hpatches(tmp_path):
    matrices = {"v_wall": [[0.9, 0.1, 3], [-0.05, 1.1, -2], [0.001, -0.002, 1]], "i_fog": np.eye(3).tolist()}
    for name, matrix in matrices.items():
        for number in range(1, 7):
            draw(tmp_path / name / f"{number}.ppm", (60, 40) if number == 1 else (50, 44))
        for number in range(2, 7):
            write(tmp_path / name / f"H_1_{number}", "\n".join(" ".join(map(str, row)) for row in matrix))
    return tmp_path, np.array(matrices["v_wall"])


def test_hpatches(hpatches):
    root, matrix = hpatches
    found = opened(root, grid=4)
    assert (len(found.pairs), [one.category for one in found.pairs]) == (10, ["illumination"] * 5 + ["viewpoint"] * 5)
    fog = found.pairs[0]
    assert (found.images[fog.source].id, found.images[fog.target].id) == ("i_fog/1.ppm", "i_fog/2.ppm")
    assert fog.source_points[0].tolist() == [7, 4.5], "the centre of the first of 4 x 4 cells of 15 x 10 pixels"
    assert fog.source_points.tolist() == fog.target_points.tolist()
    assert len(fog.source_points) == 12, "the last column, x = 52, leaves an image of 50 pixels"
    wall = found.pairs[-1]
    assert wall.about == {"homography": matrix.tolist()}
    x, y = wall.source_points[5]
    u, v, w = matrix @ (x, y, 1)
    np.testing.assert_allclose(wall.target_points[5], (u / w, v / w))
    assert (wall.target_points < (50, 44)).all()
    assert opened(root, categories="viewpoint").images[0].id == "v_wall/1.ppm"


def test_points_behind_the_camera_are_not_visible(hpatches):
    turned = np.array([[1.0, 0, 0], [0, 1, 0], [-0.1, 0, 1]])
    there = project(turned, np.array([[0.0, 3], [20, 3]]))
    assert there[0].tolist() == [0, 3]
    assert np.isnan(there[1]).all()
    root, _ = hpatches
    write(root / "v_wall" / "H_1_3", "1 2 3")
    with pytest.raises(DataError, match="cannot read the homography .*H_1_3"):
        opened(root)


def test_too_many_pairs_are_refused_before_they_are_made(ap10k, monkeypatch):
    from diffrep.data.correspondences import catalogue, listing

    root, _ = ap10k
    monkeypatch.setattr(catalogue, "MOST_PAIRS", 3)
    with pytest.raises(ConfigError, match="ap-10k has 4 pairs here, and 3 can be held; draw some with sample=N"):
        opened(root)
    assert len(opened(root, sample=1).pairs) == 2
    monkeypatch.setattr(listing, "MOST_IMAGES", 2)
    with pytest.raises(ConfigError, match="3 images are too many to pair with each other .at most 2.; read a smaller"):
        opened(root)
