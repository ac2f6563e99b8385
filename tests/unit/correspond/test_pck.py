import json

import numpy as np
import pytest

from diffrep.config.protocol import get_protocol
from diffrep.correspond.pck import PCK, pck
from diffrep.correspond.protocol import layout_of
from diffrep.data.pairs import Pair
from diffrep.errors import ConfigError, DataError, UnknownNameError
from diffrep.metrics import bootstrap_interval

BOX = (10.0, 10.0, 30.0, 50.0)  # 20 wide, 40 high


def pair(count, category="cat", **more):
    points = np.stack([np.arange(count) * 10.0, np.full(count, 5.0)], axis=1)
    return Pair(
        0, 1, points, points, **{"source_box": (0, 0, 80, 20), "target_box": BOX, "category": category, **more}
    )


def off(one, distances):
    return one.target_points + np.array([[distance, 0.0] for distance in distances]).reshape(-1, 2)


@pytest.fixture
def scored():
    pairs = [pair(4), pair(1), pair(0), pair(3, "dog")]
    # 0.1 of the box is 4 pixels: right are 2 of 4, 1 of 1, and 1 of 3.
    errors = [[0, 4, 4.001, 9], [3.9], [], [-4, 5, 6]]
    return [off(one, error) for one, error in zip(pairs, errors, strict=True)], pairs


def test_three_means_at_every_alpha(scored):
    found = pck(*scored, alphas=(0.1, 0.2, 0.01))
    assert (found.pairs, found.points, found.empty) == (3, 8, 1)
    values = {
        alpha: [getattr(found, kind)[alpha].value for kind in ("per_image", "per_point", "per_class")]
        for alpha in found.alphas
    }
    assert values[0.1] == pytest.approx([(1 / 2 + 1 + 1 / 3) / 3, 4 / 8, (3 / 5 + 1 / 3) / 2])
    assert values[0.2] == pytest.approx([(3 / 4 + 1 + 1) / 3, 7 / 8, (4 / 5 + 1) / 2])
    assert values[0.01] == pytest.approx([(1 / 4 + 0 + 0) / 3, 1 / 8, (1 / 5 + 0) / 2])
    cat, dog = found.categories["cat"], found.categories["dog"]
    assert (cat.pairs, cat.points, dog.pairs, dog.points) == (2, 5, 1, 3)
    assert (cat.per_image[0.1], cat.per_point[0.1]) == pytest.approx((0.75, 0.6))
    assert (dog.per_image[0.1], dog.per_point[0.1]) == pytest.approx((1 / 3, 1 / 3))
    assert [one.tolist() for one in found.right(0.1)] == [[True, True, False, False], [True], [], [True, False, False]]
    np.testing.assert_allclose(found.distances[3], [4, 5, 6])
    np.testing.assert_array_equal(found.thresholds, [40, 40, np.nan, 40])


def test_a_point_on_the_edge_is_right_or_not_by_the_protocol():
    # 0.1 * 3 is 0.30000000000000004 and 0.7 / 7 is 0.09999999999999999: rounding must not decide.
    for length in (3.0, 7.0, 30.0, 60.0, 70.0, 90.0, 110.0):
        one = pair(1, target_box=(0, 0, length, 1))
        found = [pck([off(one, [length / 10])], [one], rules).per_point[0.1].value for rules in ("dift", "geoaware")]
        assert found == [1, 0], length


def test_threshold_lengths():
    one = pair(4)
    sizes = [(100, 200), (60, 90)]
    expected = {"target_box": 40, "source_box": 80, "image": 90, "points": 30}
    for threshold, length in expected.items():
        found = pck([one.target_points], [one], {"base": "dift", "threshold": threshold}, sizes=sizes)
        assert found.thresholds.tolist() == [length]


def test_measuring_in_the_frame_stretches_distances_and_boxes():
    one, sizes = pair(2), [(100, 200), (64, 256)]
    moved = one.target_points + [[2, 0], [0, 2]]  # the frame has 2 px for each across, and 8 down
    found = pck([moved], [one], "ldm", sizes=sizes)
    np.testing.assert_allclose(found.distances[0], [4, 16])
    np.testing.assert_allclose(found.thresholds, [max(80 * 512 / 200, 20 * 512 / 100)])
    original = pck([moved], [one], {"base": "ldm", "measure": "original"})
    np.testing.assert_allclose(original.distances[0], [2, 2])
    # A frame that keeps the aspect ratio changes nothing.
    padded = pck([moved], [one], {"base": "geoaware", "measure": "frame"}, sizes=sizes)
    assert padded.per_point == pck([moved], [one], "geoaware").per_point


def test_intervals_are_over_pairs_and_repeat():
    random = np.random.default_rng(0)
    pairs = [pair(5, "cat" if number % 3 else "dog") for number in range(60)]
    # Points of a pair are right or wrong together, so that points do not count as independent.
    predictions = [off(one, [0 if random.random() < 0.5 else 99] * 5) for one in pairs]
    found = pck(predictions, pairs, alphas=[0.1])
    for kind in ("per_image", "per_point", "per_class"):
        value, low, high = getattr(found, kind)[0.1]
        assert low < value < high
        assert 0.2 < high - low < 0.32  # 2 * 1.96 * sqrt(0.25 / 60) is 0.25; over 300 points it would be 0.11
    assert pck(predictions, pairs, alphas=[0.1]).per_image == found.per_image
    assert pck(predictions, pairs, alphas=[0.1], seed=1).per_class != found.per_class
    rows = np.stack(
        [[right.sum(), len(right), one.category == "dog"] for right, one in zip(found.right(0.1), pairs, strict=True)]
    )

    def per_class(rows):
        dogs = rows[:, 2] == 1
        return np.mean([part[:, 0].sum() / part[:, 1].sum() for part in (rows[dogs], rows[~dogs])])

    for kind, statistic in (
        ("per_image", lambda rows: np.mean(rows[:, 0] / rows[:, 1])),
        ("per_point", lambda rows: rows[:, 0].sum() / rows[:, 1].sum()),
        ("per_class", per_class),
    ):
        expected = bootstrap_interval(rows, resamples=300, statistic=statistic)
        assert getattr(pck(predictions, pairs, alphas=[0.1], resamples=300), kind)[0.1][1:] == pytest.approx(expected)


def test_text_has_the_protocols_name_with_every_number(scored):
    found = pck(*scored, "hyperfeatures")
    lines = found.text().splitlines()
    assert len(lines) == 5
    assert all(line.startswith("hyperfeatures") for line in lines)
    assert "3 pairs, 8 points (1 pairs without points left out)" in lines[1]
    assert lines[2].startswith("hyperfeatures PCK@0.1: per image 61.11 % [")
    assert "per point* 50.00 % [" in lines[2]
    assert found.headline is found.per_point


def test_plain_values_are_json(scored):
    found = pck(*scored, {"base": "dift", "average": "class"})
    plain = json.loads(json.dumps(found.to_plain()))
    assert plain["protocol"] == "dift with average=class"
    assert get_protocol(plain["rules"]) == found.protocol
    assert plain["per_class"]["0.1"] == list(found.headline[0.1]) == list(found.per_class[0.1])
    assert plain["categories"]["dog"] == {
        "per_image": {"0.1": 1 / 3, "0.05": 0.0, "0.01": 0.0},
        "per_point": {"0.1": 1 / 3, "0.05": 0.0, "0.01": 0.0},
        "pairs": 1,
        "points": 3,
    }


def test_annotated_points_come_back_from_the_cells():
    for rules in ("dift", "hyperfeatures", "geoaware", "probe3d", "ldm"):
        layout = layout_of(get_protocol(rules), (75, 110))
        cells = np.array([[0, 0], [30, 20], [45, 37]])
        points = layout.annotate(cells)
        again = layout.annotate(layout.lookup(points)) if rules != "probe3d" else points
        np.testing.assert_allclose(again, points, atol=1e-9)
        np.testing.assert_allclose(layout.mirror(layout.mirror(points)), points, atol=1e-9)
    assert layout_of(get_protocol("dift"), (75, 110)).mirror(np.array([[0.0, 3.0]])).tolist() == [[109, 3]]
    assert layout_of(get_protocol("geoaware"), (75, 110)).mirror(np.array([[0.0, 3.0]])).tolist() == [[110, 3]]


def test_bad_input(scored):
    predictions, pairs = scored
    with pytest.raises(UnknownNameError, match="unknown protocol 'geo'"):
        pck(predictions, pairs, "geo")
    with pytest.raises(DataError, match="3 predictions for 4 pairs"):
        pck(predictions[:3], pairs)
    with pytest.raises(DataError, match=r"pair 1: predictions of shape \(4, 2\) for points of shape \(1, 2\)"):
        pck([predictions[0], predictions[0], *predictions[2:]], pairs)
    with pytest.raises(DataError, match="finite ones"):
        pck([predictions[0] * np.nan, *predictions[1:]], pairs)
    for alphas in ((), (0.1, 0.0), (-1.0,), (np.nan,)):
        with pytest.raises(ConfigError, match="alphas must be above 0"):
            pck(predictions, pairs, alphas=alphas)
    for rules in ("ldm", {"base": "dift", "threshold": "image"}):
        with pytest.raises(ConfigError, match=r"needs the images' sizes; give sizes=\[\(H, W\), ...\]"):
            pck(predictions, pairs, rules)
    with pytest.raises(ConfigError, match="1 sizes for pairs of 2 images"):
        pck(predictions, pairs, "ldm", sizes=[(10, 10)])
    with pytest.raises(DataError, match="pair 0 has no target box, which the protocol 'dift' measures by"):
        pck([np.zeros((1, 2))], [pair(1, target_box=None)])
    with pytest.raises(DataError, match="pair 0: the points by which the protocol .* has no extent"):
        pck([np.zeros((1, 2))], [pair(1)], {"base": "dift", "threshold": "points"})
    with pytest.raises(DataError, match="none of the 1 pairs has a point"):
        pck([np.zeros((0, 2))], [pair(0)])


def test_the_result_is_a_value(scored):
    assert isinstance(pck(*scored), PCK)
    with pytest.raises(AttributeError):
        pck(*scored).pairs = 3
