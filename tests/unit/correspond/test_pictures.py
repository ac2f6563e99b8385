"""Pictures of pairs show the images, and what was matched where it was matched."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.correspond.pictures import (
    RIGHT,
    WRONG,
    draw_co_pca,
    draw_grid,
    draw_match_page,
    draw_matches,
    inside,
)
from diffrep.data.frame import Frame, frame_of
from diffrep.errors import DataError

POINTS = np.array([[10.0, 10.0], [30.0, 40.0], [50.0, 20.0]])


def plain(width, height, colour=(90, 90, 90), mode="RGB"):
    return Image.new("RGB", (width, height), colour).convert(mode)


def close(pixel, colour, far=12):
    return np.abs(pixel.astype(int) - colour).max() <= far


def test_right_matches_are_green_and_wrong_ones_red():
    ends = np.array([[20.0, 70.0], [60.0, 20.0], [70.0, 60.0]])
    picture = draw_matches(plain(64, 64), plain(96, 96), POINTS, ends, np.array([True, False, True]), height=192)
    start = 192 + round(0.02 * 192)
    assert picture.shape == (192, start + 192, 3)
    assert picture.dtype == np.uint8
    for point, end, right in zip(POINTS, ends, (True, False, True), strict=True):
        colour = RIGHT if right else WRONG
        (x, y), (u, v) = (point + 0.5) * 3, (end + 0.5) * 2 + (start, 0)
        assert close(picture[int(y), int(x)], colour), "the point's disc"
        assert close(picture[int(v), int(u)], colour), "the disc or cross of its match"
        middle = picture[int((y + v) / 2) - 2 : int((y + v) / 2) + 3, int((x + u) / 2)]
        assert any(close(pixel, colour, 40) for pixel in middle), "the line between them"


def test_a_ring_shows_the_truth_of_wrong_matches_alone():
    ends, truth = POINTS.copy(), POINTS[:, ::-1].copy()
    right = np.array([True, False, True])
    without = draw_matches(plain(64, 64), plain(64, 64), POINTS, ends, right, height=192)
    found = draw_matches(plain(64, 64), plain(64, 64), POINTS, ends, right, truth, height=192)
    down, across = np.nonzero((without != found).any(2))
    x, y = (truth[1] + 0.5) * 3 + (196, 0)
    a, b = (ends[1] + 0.5) * 3 + (196, 0)
    assert min(x, a) - 6 < across.min() < across.max() < max(x, a) + 6
    assert min(y, b) - 6 < down.min() < down.max() < max(y, b) + 6
    ring = found[int(y) - 4 : int(y) + 5, int(x) - 4 : int(x) + 5].reshape(-1, 3)
    assert any(close(pixel, (255, 255, 255), 30) for pixel in ring)


def test_without_truth_each_match_has_its_hue():
    picture = draw_matches(plain(64, 64), plain(64, 64), POINTS, POINTS, height=192)
    centres = [picture[int((y + 0.5) * 3), int((x + 0.5) * 3)].tolist() for x, y in POINTS]
    assert len({tuple(colour) for colour in centres}) == 3
    assert draw_matches(plain(64, 64), plain(64, 64), POINTS[:0], POINTS[:0]).shape == (256, 517, 3)


def test_images_away_from_the_lines_are_theirs():
    random = np.random.default_rng(0)
    left = Image.fromarray(random.integers(0, 255, (40, 30, 3), dtype=np.uint8))
    right = Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8))
    picture = draw_matches(left, right, np.array([[2.0, 1.0]]), np.array([[30.0, 1.0]]), height=40)
    np.testing.assert_array_equal(picture[8:, :30], np.asarray(left)[8:])
    np.testing.assert_array_equal(picture[8:, 32:], np.asarray(right)[8:])
    assert (picture[8:, 30:32] == 128).all()


def test_lines_are_smooth():
    picture = draw_matches(plain(80, 80, (0, 0, 0)), plain(80, 80, (0, 0, 0)), POINTS[:1], POINTS[1:2] + 30, height=80)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20, "edges have shades"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "LA"])
def test_images_of_any_mode(mode):
    image = Image.fromarray(np.full((32, 32), 300, np.uint16)) if mode == "I;16" else plain(32, 32, mode=mode)
    assert draw_matches(image, plain(32, 32), POINTS[:1], POINTS[:1]).shape == (256, 517, 3)


def test_points_and_images_that_do_not_fit():
    left, right = plain(64, 64), plain(64, 64)
    with pytest.raises(DataError, match=r"target points are \(2, 2\); finite \(3, 2\)"):
        draw_matches(left, right, POINTS, POINTS[:2])
    with pytest.raises(DataError, match=r"true points are \(1, 2\)"):
        draw_matches(left, right, POINTS, POINTS, truth=POINTS[:1])
    with pytest.raises(DataError, match="finite"):
        draw_matches(left, right, POINTS, np.full((3, 2), np.nan))
    with pytest.raises(DataError, match=r"\(2,\) says which matches are right; \(3,\)"):
        draw_matches(left, right, POINTS, POINTS, np.array([True, False]))
    with pytest.raises(DataError, match="mode 'F'"):
        draw_matches(Image.new("F", (8, 8)), right, POINTS, POINTS)
    with pytest.raises(DataError, match="at least one"):
        draw_grid([])


def test_grid():
    pictures = [np.full((high, wide, 3), shade, np.uint8) for high, wide, shade in ((4, 6, 1), (8, 2, 2), (3, 3, 3))]
    grid = draw_grid(pictures, columns=2, gap=5, background=200)
    assert grid.shape == (8 + 5 + 3, 6 + 5 + 2, 3)
    for shade, picture in enumerate(pictures, 1):
        assert (grid == shade).all(2).sum() == picture[..., 0].size
    assert (grid[2:6, :6] == 1).all(), "in the middle of its row"
    assert draw_grid(pictures[:1], columns=3).shape == (4, 6, 3)


def test_equal_features_have_equal_colours():
    """The second map is the first one mirrored and twice as strong, so its colours are the first's mirrored."""
    one = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(0))
    frame = frame_of((64, 64), (128, 128))
    picture = draw_co_pca((one, 2 * one.flip(2)), (frame, frame), height=64)
    assert picture.shape == draw_matches(plain(64, 64), plain(64, 64), POINTS, POINTS, height=64).shape
    np.testing.assert_array_equal(picture[:, :64], picture[:, 65 + 1 :][:, ::-1])
    assert len(np.unique(picture[:, :64].reshape(-1, 3), axis=0)) > 30
    with pytest.raises(DataError, match="same channels"):
        draw_co_pca((one, one[:5]), (frame, frame))


def test_maps_of_padded_images_are_cut():
    """A wide image in the middle of a square canvas: the map's upper and lower quarters are beyond it."""
    frame = frame_of((32, 64), (64, 64), "pad")
    assert inside(frame) == (0, 0.25, 1, 0.75)
    cells = torch.zeros(3, 8, 8)
    cells[0, :2], cells[0, 6:], cells[1, 2:6, :4], cells[2, 2:6, 4:] = 1, 1, 1, 1
    picture = draw_co_pca((cells, cells), (frame, frame), height=32)
    left = picture[:, :64].reshape(-1, 3)
    assert len(np.unique(left, axis=0)) == 2, "the colour of the border is not there"
    assert inside(Frame((10, 10), (10, 10), (1.0000001, 1.0), (0.0, 0.0))) == (0, 0, 1, 1)


def test_the_page_holds_both_images(tmp_path):
    frames = (frame_of((20, 30), (32, 32), "pad"), frame_of((40, 40), (32, 32)))
    maps = tuple(torch.randn(12, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2))
    images = (plain(30, 20, mode="L"), plain(40, 40, mode="RGBA"))
    error = draw_match_page(tmp_path / "page.html", images, maps, frames, ("one.jpg", "<two>"), "mid_block @ t=20")
    page = (tmp_path / "page.html").read_text()
    assert 0 < error < 0.01
    assert "one.jpg" in page
    assert "&lt;two&gt;" in page
    assert "mid_block @ t=20: maps of 8×8 and 8×8 cells with 12 channels" in " ".join(page.split())
