"""Matching and PCK of DIFT, Diffusion Hyperfeatures and GeoAware-SC on one set of features, number for number."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffrep.config.protocol import get_protocol
from diffrep.correspond import predict
from diffrep.correspond.matching import mutual_nearest_neighbours, prepare
from diffrep.correspond.pck import pck
from diffrep.correspond.pose import partners_of, pose_distance
from diffrep.correspond.predict import Question, predict_all
from diffrep.correspond.protocol import layout_of
from diffrep.data.frame import frame_of
from diffrep.data.pairs import Pair

ALPHAS = (0.1, 0.05, 0.01)
# GeoAware-SC's table for cats, on the keys that some image of the set has: it takes others for their own mirror image.
CAT = {"0": "1", "1": "0", "2": "3", "3": "2", "11": "12", "12": "11"}
DOG = {"0": "1", "1": "0", "2": "3", "3": "2", "4": "5", "5": "4", "11": "12", "12": "11"}


class Synthetic:
    """The annotated set, and predictions under any protocol."""

    def __init__(self, folder):
        notes = json.loads((folder / "pck_annotations.json").read_text())
        self.names = list(notes["images"])
        self.sizes = [(one["height"], one["width"]) for one in notes["images"].values()]
        self.labels = [one["filename"] for one in notes["pairs"]]
        self.pairs = [self.pair(one) for one in notes["pairs"]]
        self.features = {name: torch.from_numpy(one) for name, one in np.load(folder / "pck_features.npz").items()}
        self.expected = json.loads((folder / "pck_expected.json").read_text())

    def pair(self, one):
        return Pair(
            source=self.names.index(one["src_imname"].removesuffix(".jpg")),
            target=self.names.index(one["trg_imname"].removesuffix(".jpg")),
            source_points=np.array(one["src_kps"], dtype=np.float64),
            target_points=np.array(one["trg_kps"], dtype=np.float64),
            source_box=tuple(one["src_bndbox"]),
            target_box=tuple(one["trg_bndbox"]),
            category=one["category"],
            keys=tuple(one["kps_ids"]),
        )

    def side(self, image, protocol, suffix=""):
        # A map covers what the protocol's own code took it for: the stretched image, or the padded square.
        frame = layout_of(protocol, self.sizes[image]).frame
        if protocol.fit == "resize":
            frame = frame_of(self.sizes[image], (96, 96))
        return prepare(self.features[self.names[image] + suffix], frame, protocol)

    def predict(self, protocol, mirrored=None):
        sides = [self.side(image, protocol) for image in range(len(self.names))]
        flips = [self.side(image, protocol, "_flip") for image in range(len(self.names))] if mirrored else None
        return predict_all(
            Question(
                sides[pair.source],
                sides[pair.target],
                pair.source_points,
                flips[pair.source] if flips else None,
                partners_of(pair, mirrored) if mirrored else None,
            )
            for pair in self.pairs
        )


@pytest.fixture(scope="module")
def synthetic(golden):
    return Synthetic(golden / "correspondence")


def test_dift(synthetic):
    predictions = synthetic.predict(get_protocol("dift"))
    for label, found in zip(synthetic.labels, predictions, strict=True):
        assert found.tolist() == synthetic.expected["dift"]["pred_xy"][label]
    scores = pck(predictions, synthetic.pairs, "dift", ALPHAS)
    ours = {"All": (scores.per_image[0.1].value, scores.per_point[0.1].value)}
    ours |= {name: (one.per_image[0.1], one.per_point[0.1]) for name, one in scores.categories.items()}
    for name, values in ours.items():
        for average, value in zip(("image", "point"), values, strict=True):
            assert round(value * 100, 2) == synthetic.expected["dift"]["printed"][f"{name} per {average} PCK@0.1"]


@pytest.mark.parametrize(("run", "load"), [("load64_out12", 64), ("load12_out12_paper_train_size", 12)])
def test_hyperfeatures(synthetic, run, load):
    expected = synthetic.expected["hyperfeatures"][run]
    protocol = get_protocol({"base": "hyperfeatures", "size": load})
    predictions = synthetic.predict(protocol)
    for label, pair, found in zip(synthetic.labels, synthetic.pairs, predictions, strict=True):
        height, width = synthetic.sizes[pair.target]
        cells = np.rint(found[:, ::-1] * load / (height, width))
        assert cells.tolist() == expected["pred_yx_load_frame"][label]
        np.testing.assert_allclose(cells[:, ::-1] * (width / load, height / load), found, atol=1e-9)
    for kind, threshold in (("img", "image"), ("bbox", "target_box")):
        rules = {"base": "hyperfeatures", "size": load, "threshold": threshold}
        scores = pck(predictions, synthetic.pairs, rules, [0.1], synthetic.sizes)
        assert scores.headline[0.1].value == pytest.approx(expected[f"per_point_pck_{kind}"], abs=1e-12)
        shares = [right.mean() for right in scores.right(0.1)]
        assert shares == pytest.approx(expected[f"sample_pck_{kind}"], abs=1e-12)


def geoaware(run):
    how, threshold = run.split(".")[:2]
    return {
        "base": "geoaware-soft" if how.startswith("soft") else "geoaware",
        "threshold": {"bbox": "target_box", "img840": "image"}[threshold],
        "average": run.rsplit("_", 1)[1],
    }


@pytest.mark.parametrize(
    ("run", "atol"),
    [(f"argmax.{t}.per_{a}", 1e-3) for t in ("bbox", "img840") for a in ("image", "point")]
    + [(f"softwin7.bbox.per_{a}", 0.02) for a in ("image", "point")],
)
def test_geoaware(synthetic, run, atol):
    expected, protocol = synthetic.expected["geoaware"][run], get_protocol(geoaware(run))
    predictions = synthetic.predict(protocol)
    check_geoaware(synthetic, expected, protocol, predictions, atol)


def test_geoaware_pose_alignment(synthetic, monkeypatch):
    expected = synthetic.expected["geoaware"]["argmax.flip_mutualnn.bbox.per_image"]
    protocol = get_protocol({"base": "geoaware", "pose": "mutual"})
    noted = []

    def noting(source, target):
        noted.append(pose_distance(source, target))
        return noted[-1]

    monkeypatch.setattr(predict, "pose_distance", noting)
    predictions = synthetic.predict(protocol, {"cat": CAT, "dog": DOG})
    turned, plain = noted[::2], noted[1::2]
    theirs = expected["mutual_nn_dist_[orig,flip]_per_pair"]
    np.testing.assert_allclose(np.stack([plain, turned], axis=1), theirs, atol=2e-5)
    check_geoaware(synthetic, expected, protocol, predictions, 1e-3)


def check_geoaware(synthetic, expected, protocol, predictions, atol):
    points = expected["pred_xy_in_padded_840_frame"]
    for pair, found in zip(synthetic.pairs, predictions, strict=True):
        theirs = points[f"{synthetic.names[pair.source]}->{synthetic.names[pair.target]}"]
        framed = layout_of(protocol, synthetic.sizes[pair.target]).frame.to_canvas(found)
        np.testing.assert_allclose(framed, [theirs[key] for key in pair.keys], atol=atol)
    scores = pck(predictions, synthetic.pairs, protocol, ALPHAS, synthetic.sizes)
    for alpha in ALPHAS:
        assert scores.headline[alpha].value == pytest.approx(expected[f"pck@{alpha:.2f}"], abs=1e-6)
    for line in expected["per_category_log"]:
        name, shares = line.split("...")
        printed = [float(part.split(": ")[1].rstrip("%")) for part in shares.split(" | ")]
        ours = getattr(scores.categories[name], f"per_{protocol.average}")
        assert [round(ours[alpha] * 100, 2) for alpha in ALPHAS] == pytest.approx(printed, abs=0.011)


def test_a_truly_padded_picture_scores_the_same(synthetic):
    # The picture's short side is rounded to whole pixels, which GeoAware-SC's points are not: at most 0.5 of 840.
    protocol = get_protocol("geoaware")
    sides = [
        prepare(synthetic.features[name], frame_of(size, (960, 960), "pad"), protocol)
        for name, size in zip(synthetic.names, synthetic.sizes, strict=True)
    ]
    predictions = predict_all(
        Question(sides[pair.source], sides[pair.target], pair.source_points) for pair in synthetic.pairs
    )
    scores = pck(predictions, synthetic.pairs, protocol)
    assert scores.per_image[0.1].value == pytest.approx(
        synthetic.expected["geoaware"]["argmax.bbox.per_image"]["pck@0.10"], abs=1e-6
    )


def test_mutual_nearest_neighbours(synthetic, golden):
    sets = load_file(golden / "correspondence" / "mnn_descriptors.safetensors")
    for metric, expected in synthetic.expected["dift"]["mnn"].items():
        assert mutual_nearest_neighbours(sets["desc_a"], sets["desc_b"], metric).tolist() == expected
