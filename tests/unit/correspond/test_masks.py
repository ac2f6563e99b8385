"""Files of masks, and the scores of DAVIS against their definitions written out."""

import math

import numpy as np
import pytest
from PIL import Image

from diffrep.correspond.masks import (
    contour_accuracy,
    read_mask,
    region_similarity,
    score_folders,
    score_masks,
    voc_palette,
    write_mask,
)
from diffrep.errors import DataError


def blob(height, width, seed):
    """A mask with a rugged outline that touches the border at times."""
    random = np.random.default_rng(seed)
    down, across = np.mgrid[:height, :width]
    place, size = random.uniform(0.2, 0.8, 2) * (height, width), random.uniform(0.15, 0.5)
    distance = np.hypot((down - place[0]) / height, (across - place[1]) / width)
    return distance + random.normal(0, 0.03, (height, width)) < size


def contour(mask):
    """Pixels that differ from a neighbour to the right, below or across, neighbours beyond the border left out."""
    height, width = mask.shape
    return [
        (y, x)
        for y in range(height)
        for x in range(width)
        if any(
            y + dy < height and x + dx < width and mask[y, x] != mask[y + dy, x + dx]
            for dy, dx in ((0, 1), (1, 0), (1, 1))
        )
    ]


def plain_accuracy(truth, predicted, bound):
    radius = math.ceil(bound * math.hypot(*truth.shape))
    one, other = contour(predicted), contour(truth)
    near = [
        sum(min(math.dist(a, b) for b in y) <= radius for a in x) / len(x) for x, y in ((one, other), (other, one))
    ]
    return 2 * near[0] * near[1] / (near[0] + near[1]) if sum(near) else 0.0


@pytest.mark.parametrize("shape", [(23, 31), (40, 17)])
@pytest.mark.parametrize("bound", [0.008, 0.05, 0.2])
def test_contours_by_definition(shape, bound):
    for seed in range(3):
        truth, predicted = blob(*shape, seed), blob(*shape, seed + 10)
        assert contour_accuracy(truth, predicted, bound) == pytest.approx(plain_accuracy(truth, predicted, bound))
        assert contour_accuracy(truth, truth, bound) == 1


def test_empty_masks():
    empty, some = np.zeros((9, 9), bool), np.eye(9, dtype=bool)
    assert [contour_accuracy(*pair) for pair in ((empty, empty), (some, empty), (empty, some))] == [1, 0, 0]
    assert [region_similarity(*pair) for pair in ((empty, empty), (some, empty), (some, some))] == [1, 0, 1]


def test_region_by_hand():
    truth, predicted = np.zeros((2, 4, 5), bool)
    truth[1:3, 1:4], predicted[1:3, 2:5] = True, True
    assert region_similarity(truth, predicted) == 4 / 8


def test_a_video_is_scored_without_its_ends():
    truths = np.zeros((5, 8, 8), np.uint8)
    truths[:, 1:4, 1:4], truths[:, 5:7, 5:7] = 1, 2
    predictions = truths.copy()
    predictions[0] = predictions[4] = 0
    assert score_masks(truths, predictions)["J&F"] == 1, "first and last do not count"
    predictions[1:3][truths[1:3] == 1] = 0
    found = score_masks(truths, predictions)
    assert found["objects"][1] == {"J": pytest.approx(1 / 3), "F": pytest.approx(1 / 3)} | dict.fromkeys(
        ("J_recall", "F_recall"), pytest.approx(1 / 3)
    )
    assert found["objects"][2]["J"] == found["objects"][2]["J_recall"] == 1
    assert found["J"] == pytest.approx(2 / 3), "the mean over objects"
    assert found["J&F"] == pytest.approx((found["J"] + found["F"]) / 2)


def test_void_is_background():
    truths = np.zeros((3, 6, 6), np.uint8)
    truths[:, 1:3, 1:3], truths[:, 4:] = 1, 255
    predictions = truths.copy()
    assert list(score_masks(truths, predictions)["objects"]) == [1, 255]
    predictions[predictions == 255] = 0
    assert score_masks(truths, predictions, void=255)["objects"].keys() == {1}
    assert score_masks(truths, predictions, void=255)["J"] == 1


def test_masks_that_cannot_be_scored():
    masks = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(DataError, match="no object"):
        score_masks(masks, masks)
    masks[:, 0] = 1
    with pytest.raises(DataError, match=r"labels \[5\]; the first true mask has objects \[1\]"):
        score_masks(masks, np.where(masks == 1, 5, 0))
    with pytest.raises(DataError, match="3 true and 2 predicted"):
        score_masks(masks, masks[:2])
    with pytest.raises(DataError, match="at least 3"):
        score_masks(masks[:2], masks[:2])
    with pytest.raises(DataError, match=r"\(4, 4\), \(4, 5\)"):
        score_masks(masks, np.zeros((3, 4, 5), np.uint8))


def test_palette_files_keep_labels_and_colours(tmp_path):
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    labels, palette = read_mask(write_mask(tmp_path / "a.png", mask))
    np.testing.assert_array_equal(labels, mask)
    # PASCAL VOC: background, aeroplane, bicycle, bird, boat, bottle; person is 15, tv monitor 20.
    colours = np.array(palette).reshape(-1, 3)
    assert colours[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert np.array(voc_palette()).reshape(-1, 3)[[15, 20]].tolist() == [[192, 128, 128], [0, 64, 128]]
    own = [9, 8, 7] * 256
    assert read_mask(write_mask(tmp_path / "b.png", mask > 5, own))[1][:6] == own[:6]


def test_other_files_of_labels(tmp_path):
    grey = np.array([[0, 300], [70, 2]])
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "deep.png")[0], grey)
    Image.fromarray(grey > 60).save(tmp_path / "one.png")
    labels, palette = read_mask(tmp_path / "one.png")
    assert (labels.tolist(), palette) == ([[0, 1], [1, 0]], None)
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match="colours are no labels"):
        read_mask(tmp_path / "colour.png")
    with pytest.raises(DataError, match=r"missing\.png: cannot read"):
        read_mask(tmp_path / "missing.png")
    with pytest.raises(DataError, match="labels of 0 to 300"):
        write_mask(tmp_path / "c.png", grey)
    with pytest.raises(DataError, match="must be integers"):
        write_mask(tmp_path / "c.png", grey / 2)


def test_folders_are_scored_by_name(tmp_path):
    random = np.random.default_rng(0)
    masks = random.integers(0, 3, (4, 9, 9)).astype(np.uint8)
    guesses = np.where(random.random((4, 9, 9)) < 0.2, 0, masks)
    for name, stack in (("true", masks), ("guess", guesses)):
        (tmp_path / name).mkdir()
        for number, mask in enumerate(stack):
            write_mask(tmp_path / name / f"{number:05d}.png", mask)
    found = score_folders(tmp_path / "true", tmp_path / "guess")
    assert found == score_masks(masks, guesses)
    assert 0.5 < found["J"] < 1
    (tmp_path / "guess" / "00002.png").unlink()
    with pytest.raises(DataError, match="1 of 4 masks .* first '00002.png'"):
        score_folders(tmp_path / "true", tmp_path / "guess")
    with pytest.raises(DataError, match="0 of 0 masks"):
        score_folders(tmp_path / "nothing", tmp_path / "guess")
