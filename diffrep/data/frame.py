"""Where an image lies on the canvas that a network sees, and its points with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from diffrep.data.images import Transform
from diffrep.errors import ConfigError, DataError

FITS = ("resize", "pad", "none")


@dataclass(frozen=True)
class Frame:
    """The map from an image to a canvas, axis by axis: canvas = original * scale + offset.

    Points are (x, y) in pixels with the corner of the image at (0, 0), so that the centre of the first pixel is at
    (0.5, 0.5); whether an annotation's integers mean centres or corners is the protocol's to say.

    Attributes:
        original: (H, W) of the image.
        canvas: (H, W) of what the network sees.
        scale: Canvas pixels for each image pixel, (x, y).
        offset: Canvas position of the image's corner, (x, y).
    """

    original: tuple[int, int]
    canvas: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def to_canvas(self, points: np.ndarray) -> np.ndarray:
        """Takes points (..., 2) from the image to the canvas."""
        return np.asarray(points, dtype=np.float64) * self.scale + self.offset

    def to_original(self, points: np.ndarray) -> np.ndarray:
        """Takes points (..., 2) from the canvas to the image."""
        return (np.asarray(points, dtype=np.float64) - self.offset) / self.scale


def frame_of(original: tuple[int, int], size: tuple[int, int] | None, fit: str = "resize") -> Frame:
    """Returns where an image of (H, W) lies on a canvas.

    Args:
        original: (H, W) of the image.
        size: (H, W) of the canvas; None is the image's own size.
        fit: "resize" fills the canvas and does not keep the aspect ratio; "pad" brings the image to the canvas with
            its aspect ratio and centres it, as GeoAware-SC does; "none" leaves the image as it is.

    Raises:
        ConfigError: There is no such fit, or the image cannot be left as it is on a canvas of another size.
    """
    if fit not in FITS:
        raise ConfigError(f"unknown fit {fit!r}; one of {', '.join(FITS)}")
    if size is None or tuple(size) == tuple(original):
        return Frame(tuple(original), tuple(original))
    if fit == "none":
        raise ConfigError(f"fit=none keeps an image of {original} pixels, and a canvas of {tuple(size)} is asked for")
    (height, width), (tall, wide) = original, size
    if fit == "resize":
        return Frame((height, width), (tall, wide), (wide / width, tall / height))
    scale = min(tall / height, wide / width)
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    offset = ((wide - inner[1]) // 2, (tall - inner[0]) // 2)
    return Frame((height, width), (tall, wide), (inner[1] / width, inner[0] / height), offset)


def place(image: Image.Image, frame: Frame, channels: int) -> torch.Tensor:
    """Puts an image on a canvas.

    Args:
        image: Grey, RGB, RGBA or palette image of 1, 8 or 16 bits; alpha is dropped.
        frame: Where it goes.
        channels: 1 (luma) or 3 (RGB) of the result.

    Returns:
        (channels, H, W) fp32 in [0, 1], resized bicubically, with zeros around it where it does not fill the canvas.

    Raises:
        DataError: The image has another size than the frame says, or a mode whose range is not known.
    """
    if (image.height, image.width) != frame.original:
        raise DataError(f"the image has {image.height}x{image.width} pixels, {frame.original} were expected")
    (tall, wide), (height, width) = frame.canvas, frame.original
    inner = (round(width * frame.scale[0]), round(height * frame.scale[1]))
    convert = Transform(channels)
    content = convert(image)
    if inner != image.size:
        # PIL resizes palettes without interpolation and fades RGBA towards black: resize what was converted.
        content = convert(_as_image(content).resize(inner, Image.Resampling.BICUBIC))
    if inner == (wide, tall):
        return content
    canvas = torch.zeros(channels, tall, wide)
    left, top = (round(side) for side in frame.offset)
    canvas[:, top : top + inner[1], left : left + inner[0]] = content
    return canvas


@dataclass(frozen=True)
class Canvas:
    """Transform of an `ImageSet`: puts images of any size on a square canvas.

    Attributes:
        channels: 1 (luma) or 3 (RGB).
        size: Side of the canvas.
        fit: "resize" or "pad"; see `frame_of`.

    Raises:
        ConfigError: There is no such fit, or it keeps the images' own sizes.
    """

    channels: int
    size: int
    fit: str = "resize"

    def __post_init__(self):
        if self.fit not in ("resize", "pad"):
            raise ConfigError(
                f"fit {self.fit!r} cannot bring images to a canvas of {self.size} pixels; use resize or pad"
            )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Returns the canvas with the image, (channels, size, size) fp32 in [0, 1]."""
        return place(image, frame_of((image.height, image.width), (self.size, self.size), self.fit), self.channels)


def _as_image(values: torch.Tensor) -> Image.Image:
    pixels = (values * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
