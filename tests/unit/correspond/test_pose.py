import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate, normalize

from diffrep.config.protocol import get_protocol
from diffrep.correspond.matching import prepare
from diffrep.correspond.pose import partners_of, pose_distance
from diffrep.correspond.predict import predict
from diffrep.data.frame import frame_of
from diffrep.data.pairs import Pair
from diffrep.errors import ConfigError, DataError

SIZE = (24, 36)
EARS = {"cat": {"left": "right", "right": "left"}}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def side(features, rules, mask=None):
    return prepare(features, frame_of(SIZE, None), get_protocol(rules), mask)


def pair(keys, category="cat"):
    points = np.arange(2.0 * len(keys)).reshape(-1, 2)
    return Pair(0, 1, points, points, category=category, keys=tuple(keys))


def test_partners():
    assert partners_of(pair(["right", "nose", "left"]), EARS).tolist() == [2, 1, 0]
    assert partners_of(pair(["left", "nose"]), EARS).tolist() == [-1, 1]
    assert partners_of(pair(["left", "right"], "dog"), EARS).tolist() == [-1, -1]
    assert partners_of(Pair(0, 1, np.zeros((2, 2)), np.zeros((2, 2)), category="cat"), EARS).tolist() == [-1, -1]
    for wrong in ({"left": "right"}, {"left": "right", "right": "nose"}):
        with pytest.raises(DataError, match="two keys must turn into each other"):
            partners_of(pair(["left", "right"]), {"cat": wrong})


@pytest.mark.parametrize("pose", ["nn", "mutual"])
@pytest.mark.parametrize("grid", [None, 9])
def test_distances_are_those_of_loops(pose, grid):
    rules = {"name": "mine", "pose": pose, "grid": grid}
    maps = [drawn(1, 5, 6, 8), drawn(2, 5, 7, 4)]
    cells = [interpolate(one[None], (grid, grid), mode="bilinear")[0] if grid else one for one in maps]
    first, second = (normalize(one, dim=0).flatten(1).T.double() for one in cells)
    kept = []
    for number, one in enumerate(first):
        distances = (second - one).norm(dim=1)
        best = distances.argmin()
        if pose == "nn" or (first - second[best]).norm(dim=1).argmin() == number:
            kept.append(distances[best].item())
    assert len(kept) < len(first) or pose == "nn"
    assert pose_distance(*(side(one, rules) for one in maps)) == pytest.approx(np.mean(kept), abs=1e-6)


def test_masks_choose_the_cells():
    rules = {"name": "mine", "pose": "nn"}
    one, other = drawn(3, 5, 4, 6), drawn(4, 5, 4, 6)
    mask = np.zeros(SIZE, dtype=bool)
    mask[6:18, 12:30] = True  # cells of 6 pixels: rows 1 and 2, columns 2 to 4
    first, second = (normalize(part[:, 1:3, 2:5], dim=0).flatten(1).T for part in (one, other))
    expected = torch.cdist(first.double(), second.double()).min(1).values.mean().item()
    assert pose_distance(side(one, rules, mask), side(other, rules, mask)) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(DataError, match="the target's mask covers no cell"):
        pose_distance(side(one, rules, mask), side(other, rules, np.zeros(SIZE, dtype=bool)))


@pytest.mark.parametrize("centre", [0.0, 0.5])
@pytest.mark.parametrize("pose", ["nn", "mutual"])
def test_a_mirrored_target_is_matched_from_the_mirrored_source(pose, centre):
    # The mirrored source is the target, but for the points' names: what was at the left ear is now the right one.
    rules = {"name": "mine", "pose": pose, "grid": 12, "centre": centre}
    turned = drawn(5, 16, 12, 12)
    source, target = side(drawn(6, 16, 12, 12), rules), side(turned, rules)
    cells = np.array([[2, 3], [8, 4], [5, 9], [1, 1]])
    points = (cells + centre) * (3, 2)
    partners = np.array([1, 0, 2, -1])
    found = predict(source, target, points, side(turned, rules), partners)
    plain = predict(
        side(drawn(6, 16, 12, 12), rules | {"pose": "none"}), side(turned, rules | {"pose": "none"}), points
    )
    expected = (np.stack([11 - cells[[1, 0, 2], 0], cells[[1, 0, 2], 1]], axis=1) + centre) * (3, 2)
    np.testing.assert_allclose(found[:3], expected)
    np.testing.assert_allclose(found[3], plain[3])  # its other side is not known
    # A mirror image that is farther from the target changes nothing.
    away = predict(side(turned, rules), target, points, source, partners)
    np.testing.assert_allclose(away, points)


def test_pose_alignment_needs_the_mirror_image():
    one = side(drawn(7, 5, 4, 4), {"name": "mine", "pose": "nn"})
    for more in ({"mirror": one}, {"partners": np.zeros(1, dtype=int)}):
        with pytest.raises(ConfigError, match="needs the mirrored source's map and each point's partner"):
            predict(one, one, np.zeros((1, 2)), **more)
