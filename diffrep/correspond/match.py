"""`diffrep correspond match`: two images in, drawn matches and a page to click through out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from diffrep.backbones import Backbone
from diffrep.config.correspond import MatchConfig
from diffrep.config.protocol import get_protocol
from diffrep.correspond.matcher import matcher_of
from diffrep.correspond.matching import Side, mutual_nearest_neighbours, prepare
from diffrep.correspond.pictures import draw_match_page, draw_matches
from diffrep.correspond.predict import predict
from diffrep.data.frame import Frame, frame_of, place
from diffrep.data.images import decode
from diffrep.errors import DataError
from diffrep.extract.job import open_backbone

PICTURE, PAGE = "matches.png", "match.html"


def run_match(config: MatchConfig, first: str | Path, second: str | Path, backbone: Backbone | None = None) -> Path:
    """Matches two images; writes `matches.png` and `match.html` into `config.out`.

    Without points, the cells of both maps that are each other's nearest neighbours are matched, spread over the first
    image. On the page a point of either image shows the similarity over the other one.

    Args:
        config: What describes a place, and what is drawn.
        first: File of the image whose points are looked for.
        second: File of the image they are looked for in.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.

    Returns:
        The page.

    Raises:
        DataError: An image cannot be read, or a point lies outside the first one.
        ConfigError: The maps are no maps.
    """
    backbone = backbone or open_backbone(config.backbone)
    files = [Path(one) for one in (first, second)]
    images = [_read(file) for file in files]
    maps, frames = _describe(config, backbone, images, [file.name for file in files])
    protocol = get_protocol("dift")
    sides = [prepare(one, frame, protocol) for one, frame in zip(maps, frames, strict=True)]
    points = _given(config, images[0]) if config.points else _spread(sides, config)
    found = predict(*sides, points)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_matches(*images, points, found, height=384)).save(out / PICTURE)
    what = f"{', '.join(config.request.layers)} at {', '.join(map(str, config.request.levels))} of {backbone.name}"
    draw_match_page(out / PAGE, tuple(images), maps, frames, tuple(file.name for file in files), what)
    return out / PAGE


def _read(file: Path) -> Image.Image:
    if not file.is_file():
        raise DataError(f"no such image: {file}")
    try:
        return decode(file)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def _describe(
    config: MatchConfig, backbone: Backbone, images: list[Image.Image], names: list[str]
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[Frame, Frame]]:
    """Returns the descriptors (C, h, w) of both images and where each lies on its canvas."""
    side = config.size or backbone.image_size
    frames = tuple(frame_of((one.height, one.width), (side, side), config.fit) for one in images)
    canvas = torch.stack(
        [place(one, frame, backbone.image_channels) for one, frame in zip(images, frames, strict=True)]
    )
    (maps,) = matcher_of(config, backbone, joined=True).maps(canvas, names).values()
    return (maps[0], maps[1]), frames


def _given(config: MatchConfig, image: Image.Image) -> np.ndarray:
    points = np.array(config.points, dtype=np.float64)
    outside = [
        point for point in points.tolist() if not (0 <= point[0] < image.width and 0 <= point[1] < image.height)
    ]
    if outside:
        raise DataError(f"the point {tuple(outside[0])} lies outside the first image, {image.width}x{image.height}")
    return points


def _spread(sides: list[Side], config: MatchConfig) -> np.ndarray:
    """Returns points of the first image that have a match: at most `lines`, far from each other."""
    source, target = sides
    units = [F.normalize(side.features.flatten(1).T, dim=1) for side in sides]
    cells = mutual_nearest_neighbours(*units)[:, 0].cpu().numpy() if config.mutual else np.arange(len(units[0]))
    width = source.features.shape[2]
    canvas = np.stack([cells % width, cells // width], axis=1) + 0.5
    tall, wide = source.frame.canvas
    points = source.frame.to_original(canvas * (wide / width, tall / source.features.shape[1])) - 0.5
    inside = ((points >= 0) & (points < source.frame.original[::-1])).all(1)
    points = points[inside]
    if not len(points):
        raise DataError("no cell of the first image has a match; give points, or mutual=false")
    return points[_far_apart(points, config.lines)]


def _far_apart(points: np.ndarray, count: int) -> np.ndarray:
    """Chooses points by farthest-point sampling, from the one nearest to the middle on."""
    chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
    distance = np.linalg.norm(points - points[chosen[0]], axis=1)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return np.sort(chosen)
