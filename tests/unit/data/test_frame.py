import numpy as np
import pytest
import torch
from PIL import Image

from diffrep.data.frame import Canvas, Frame, frame_of, place
from diffrep.errors import ConfigError, DataError


def spot(size, at, sigma=3.0):
    """Draws a bright blob whose centre is `at`, with the corner of the image at (0, 0)."""
    x, y = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    return Image.fromarray((255 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 2 / sigma**2)).astype(np.uint8))


def centre(tensor):
    height, width = tensor.shape[-2:]
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    weights = tensor[0].double().numpy()
    return np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()


@pytest.mark.parametrize("fit", ["resize", "pad"])
@pytest.mark.parametrize("original", [(40, 90), (90, 41), (64, 64), (130, 77)])
def test_a_blob_lands_where_the_frame_says(fit, original):
    frame = frame_of(original, (64, 64), fit)
    at = np.array([original[1] * 0.4, original[0] * 0.6])
    placed = place(spot(original, at), frame, 1)
    assert placed.shape == (1, 64, 64)
    assert np.abs(centre(placed) - frame.to_canvas(at)).max() < 0.1
    np.testing.assert_allclose(frame.to_original(frame.to_canvas(at)), at)


def test_padding_keeps_the_aspect_ratio_and_centres():
    frame = frame_of((40, 90), (60, 60), "pad")
    assert frame.scale == (60 / 90, 27 / 40)
    assert frame.offset == (0, 16)
    placed = place(Image.new("L", (90, 40), 255), frame, 1)
    assert placed[:, 16:43].min() == 1
    assert placed[:, :16].max() == placed[:, 43:].max() == 0


def test_corners_and_points_in_bulk():
    frame = frame_of((40, 90), (32, 64))
    corners = np.array([[[0, 0], [90, 40]], [[90, 0], [45, 20]]])
    np.testing.assert_array_equal(frame.to_canvas(corners), [[[0, 0], [64, 32]], [[64, 0], [32, 16]]])
    assert frame_of((40, 90), None) == frame_of((40, 90), (40, 90), "none") == Frame((40, 90), (40, 90))


def test_a_single_pixel_and_a_line_are_placed():
    assert place(Image.new("L", (1, 1), 255), frame_of((1, 1), (8, 8), "pad"), 1).min() == 1
    line = frame_of((1, 300), (16, 16), "pad")
    assert line.to_canvas([300, 1]).tolist() == [16, 7 + 1]
    assert place(Image.new("L", (300, 1), 255), line, 3).sum() == 3 * 16


def test_modes_are_converted_before_they_are_resized():
    """A palette would be resized without interpolation, and transparent pixels would fade to black."""
    ramp = np.linspace(0, 255, 40).astype(np.uint8)[None].repeat(20, 0)
    grey = Image.fromarray(ramp)
    frame = frame_of((20, 40), (16, 16))
    expected = place(grey, frame, 1)
    assert len(expected.unique()) > 10
    palette = grey.convert("P")
    assert palette.mode == "P"
    transparent = Image.merge("RGBA", [grey, grey, grey, Image.new("L", grey.size, 0)])
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    for image in (grey.convert("RGB"), palette, transparent, Image.merge("LA", [grey, grey]), deep):
        torch.testing.assert_close(place(image, frame, 1), expected, atol=1.1 / 255, rtol=0)
        assert place(image, frame, 3).shape == (3, 16, 16)


def test_an_image_that_fits_is_not_touched():
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    placed = Canvas(3, 8)(Image.fromarray(array))
    assert (placed * 255).round().to(torch.uint8).permute(1, 2, 0).numpy().tolist() == array.tolist()


def test_bad_input():
    with pytest.raises(ConfigError, match="unknown fit 'crop'; one of resize, pad, none"):
        frame_of((8, 8), (4, 4), "crop")
    with pytest.raises(ConfigError, match=r"fit=none keeps an image of \(8, 8\) pixels"):
        frame_of((8, 8), (4, 4), "none")
    with pytest.raises(ConfigError, match="fit 'none' cannot bring images to a canvas of 16 pixels"):
        Canvas(3, 16, "none")
    with pytest.raises(DataError, match=r"the image has 4x6 pixels, \(6, 4\) were expected"):
        place(Image.new("L", (6, 4)), frame_of((6, 4), (8, 8)), 1)
    with pytest.raises(DataError, match="mode 'F' have no known range"):
        Canvas(1, 8)(Image.new("F", (4, 4)))
