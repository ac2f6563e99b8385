"""Labels of a video's first frame, carried along all others by features.

The protocol is that of DAVIS 2017 as DINO (Caron et al., 2021, after Jabri et al., 2020) and DIFT (Tang et al., 2023)
run it: each cell of a frame takes the mean label of the cells that are most like it in the first frame and in the
frames before it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from diffrep.backbones import Backbone
from diffrep.backbones.conditioning import Cond
from diffrep.config import FeatureRequest
from diffrep.correspond.masks import check_labels, read_mask, write_mask
from diffrep.data.folder import EXTENSIONS
from diffrep.data.frame import Frame, frame_of, place
from diffrep.data.images import decode
from diffrep.errors import ConfigError, DataError
from diffrep.extract import Extractor

HELD = 2**24  # similarities that are in memory at once


@dataclass(frozen=True)
class Propagation:
    """How labels are carried; the defaults are DIFT's for Stable Diffusion.

    Attributes:
        last: Frames before the current one that are looked at, beside the first.
        radius: A cell looks at the cells at most this far from its own place; 0 lets it look at whole frames.
        shape: "square" (the rule of DINO and DIFT) or "circle" neighbourhoods.
        top_k: Cells that a cell takes its label from; ties with the last of them are taken too.
        temperature: The cosine similarities are divided by it before the softmax over those cells.

    Raises:
        ConfigError: A number is outside its range.
    """

    last: int = 28
    radius: int = 15
    shape: Literal["square", "circle"] = "square"
    top_k: int = 15
    temperature: float = 0.2

    def __post_init__(self):
        if self.last < 0 or self.radius < 0 or self.top_k < 1 or not self.temperature > 0:
            raise ConfigError(f"last and radius are at least 0, top_k 1, temperature above 0; given: {self}")
        if self.shape not in ("square", "circle"):
            raise ConfigError(f"shape is 'square' or 'circle', given: {self.shape!r}")


# DIFT's README for SD (t 51, up 2) and ADM (t 51, index 7), and the defaults of DINO's script.
PROPAGATIONS = {
    "dift-sd": Propagation(),
    "dift-adm": Propagation(top_k=10, temperature=0.1),
    "dino": Propagation(last=7, radius=12, top_k=5, temperature=0.1),
}


def propagate(
    features: Iterable[torch.Tensor],
    mask: np.ndarray,
    settings: Propagation = PROPAGATIONS["dift-sd"],
    canvas: tuple[int, int] | None = None,
) -> Iterator[np.ndarray]:
    """Carries the labels of the first frame along a video.

    Frames are taken one at a time; beside the current one the features of the first and of the `settings.last` frames
    before are held. The labels lie on the features' grid as shares of each object; a frame's mask is made of its own
    shares: bilinearly enlarged, each object's stretched to 0 to 1 over the frame, and the largest taken.

    Args:
        features: (F, C, h, w), or any iterable over frames (C, h, w).
        mask: (H, W) integers, the first frame's labels; 0 need not be among them. A label that no cell's centre lies
            on is not found again.
        settings: See `Propagation`.
        canvas: (H, W) that the shares are enlarged to, as published that of the network's input; its labels are then
            brought to the mask's size by the nearest pixel. None enlarges to the mask's size at once.

    Yields:
        (H, W) of the mask's element type for each frame; the first is `mask` itself.

    Raises:
        DataError: There are no frames, they differ in shape, or the mask is no (H, W) of two or more integers.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "iub" or not mask.size:
        raise DataError(f"the first mask must be integers (H, W), given: {mask.dtype} {mask.shape}")
    labels = np.unique(mask)
    if len(labels) < 2:
        raise DataError(f"the first mask has the label {labels[0]} alone; there is nothing to tell apart")
    return _frames(iter(features), mask, labels, settings, canvas or mask.shape)


@torch.no_grad()
def _frames(
    features: Iterator[torch.Tensor],
    mask: np.ndarray,
    labels: np.ndarray,
    settings: Propagation,
    canvas: tuple[int, int],
) -> Iterator[np.ndarray]:
    cells = _cells(next(features, None), None)
    shares = _one_hot(mask, labels, cells)
    first, before = (cells, shares), deque(maxlen=settings.last)
    yield mask
    for feature in features:
        cells = _cells(feature, cells.shape)
        shares = carry(cells, [first, *before], settings)
        before.append((cells, shares))
        yield _labels(shares, labels, mask, canvas)


def _cells(feature: torch.Tensor | None, shape: torch.Size | None) -> torch.Tensor:
    if feature is None:
        raise DataError("the video has no frames")
    if feature.ndim != 3 or shape not in (None, feature.shape):
        expected = "(C, h, w)" if shape is None else f"{tuple(shape)} as the first"
        raise DataError(f"the features of a frame are {tuple(feature.shape)}; {expected} was expected")
    return F.normalize(feature.float(), dim=0)


def _one_hot(mask: np.ndarray, labels: np.ndarray, cells: torch.Tensor) -> torch.Tensor:
    """Returns (L, h, w): 1 where a cell's centre has the label."""
    height, width = cells.shape[1:]
    numbers = np.searchsorted(labels, mask).astype(np.int32)
    small = np.asarray(Image.fromarray(numbers).resize((width, height), Image.Resampling.NEAREST))
    return F.one_hot(torch.from_numpy(small.astype(np.int64)), len(labels)).permute(2, 0, 1).to(cells)


def carry(
    cells: torch.Tensor, context: Sequence[tuple[torch.Tensor, torch.Tensor]], settings: Propagation
) -> torch.Tensor:
    """Returns the labels of a frame as the mean of those of the cells that are most like its own.

    Works tile by tile, so that memory does not grow with the square of the number of cells.

    Args:
        cells: (C, h, w) of unit length along C.
        context: Cells (C, h, w) and shares of labels (L, h, w) of the frames that are looked at.
        settings: See `Propagation`.

    Returns:
        (L, h, w), which sum to 1 over L.
    """
    height, width = cells.shape[1:]
    carried = torch.empty_like(context[0][1])
    places = [torch.arange(size, device=cells.device) for size in (height, width)]
    reach = settings.radius or max(height, width)
    side = _tile(height, width, reach, len(context))
    for top, left in product(range(0, height, side), range(0, width, side)):
        rows, columns = slice(top, min(top + side, height)), slice(left, min(left + side, width))
        around = [slice(max(0, one.start - reach), one.stop + reach) for one in (rows, columns)]
        query = cells[:, rows, columns]
        found = torch.stack([query.flatten(1).T @ source[:, *around].flatten(1) for source, _ in context], 1)
        if settings.radius:
            near = _near([places[0][rows], places[1][columns]], [places[0][around[0]], places[1][around[1]]], settings)
            found.masked_fill_(~near[:, None], -torch.inf)
        found = found.flatten(1)
        best = found.topk(min(settings.top_k, found.shape[1])).values
        found.masked_fill_(found < best[:, -1:], -torch.inf)
        weights = found.sub_(best[:, :1]).div_(settings.temperature).exp_()
        known = torch.cat([labels[:, *around].flatten(1) for _, labels in context], 1)
        mean = known @ weights.T / weights.sum(1)
        carried[:, rows, columns] = mean.view(-1, *query.shape[1:])
    return carried


def _tile(height: int, width: int, reach: int, frames: int) -> int:
    """Returns the side of the largest tile whose similarities to what is around it are no more than `HELD`."""
    for side in range(max(height, width), 1, -1):
        cells = min(side, height) * min(side, width)
        if cells * min(side + 2 * reach, height) * min(side + 2 * reach, width) * frames <= HELD:
            return side
    return 1


def _near(tile: Sequence[torch.Tensor], around: Sequence[torch.Tensor], settings: Propagation) -> torch.Tensor:
    """Returns (cells of the tile, cells around it): whether they are neighbours, from the rows and columns of both."""
    down, across = (here[:, None] - there for here, there in zip(tile, around, strict=True))
    down, across = down[:, None, :, None], across[None, :, None, :]
    if settings.shape == "square":
        near = (down.abs() <= settings.radius) & (across.abs() <= settings.radius)
    else:
        near = down**2 + across**2 <= settings.radius**2
    return near.flatten(2).flatten(0, 1)


def _labels(shares: torch.Tensor, labels: np.ndarray, mask: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    large = F.interpolate(shares[None], size=canvas, mode="bilinear", align_corners=False)[0]
    large = large - large.amin((1, 2), keepdim=True)
    top = large.amax((1, 2), keepdim=True)
    numbers = (large / torch.where(top > 0, top, 1)).argmax(0).to(torch.int32).cpu().numpy()
    if numbers.shape != mask.shape:
        numbers = np.asarray(Image.fromarray(numbers).resize(mask.shape[::-1], Image.Resampling.NEAREST))
    return labels[numbers]


def run_propagation(
    backbone: Backbone,
    frames: str | Path,
    mask: str | Path | np.ndarray,
    request: FeatureRequest,
    out: str | Path,
    settings: Propagation = PROPAGATIONS["dift-sd"],
    size: int | None = None,
    multiple: int = 32,
    cond: Cond = None,
) -> list[Path]:
    """Carries the mask of a video's first frame along a folder of frames, and writes a mask for each.

    Features are extracted one frame at a time; a frame's noise is seeded by its name ("folder/file").

    Args:
        backbone: The frozen network.
        frames: Folder of images; their order is that of their names.
        mask: Labels of the first frame: a palette or grey PNG, or (H, W) integers.
        request: What to read: one layer at one level, as maps. DIFT reads `dift.2` at 51.
        out: Folder for the masks, palette PNGs with the frames' names and the mask's colours.
        settings: See `Propagation`.
        size: Short side that frames are brought to, 480 as published; None keeps their size.
        multiple: Both sides are cut down to a multiple of it, 32 as DIFT does.
        cond: Condition of all frames.

    Returns:
        The files written.

    Raises:
        DataError: Frames or the mask cannot be read or differ in size, or there are no frames.
        ConfigError: The request is not one layer at one level as maps, or `out` is the folder of frames.
    """
    frames, out = Path(frames), Path(out)
    files = frame_files(frames)
    if out.resolve() == frames.resolve():
        raise ConfigError(f"masks in {str(out)!r} would overwrite the frames; choose another folder")
    labels, palette = (np.asarray(mask), None) if isinstance(mask, np.ndarray) else read_mask(mask)
    check_labels(labels)
    canvas = video_canvas(labels.shape, size, multiple)
    extractor = Extractor(backbone, request)
    plan = extractor.plan(*canvas)
    shapes = list(plan.shapes.values())
    if len(shapes) * len(plan.levels.levels) != 1 or len(shapes[0]) != 3:
        raise ConfigError(
            f"labels follow the maps of one layer at one level; the request names {len(shapes)} layers and "
            f"{len(plan.levels.levels)} levels, pool {request.pool!r}, tokens {request.tokens}"
        )

    def features() -> Iterator[torch.Tensor]:
        frame = frame_of(labels.shape, canvas)
        for file in files:
            image = _frame(file, frame, backbone.image_channels)
            found = extractor(image[None], ids=[f"{frames.name}/{file.name}"], cond=cond)
            yield next(iter(found.values()))[0].to(backbone.device)

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for file, found in zip(files, propagate(features(), labels, settings, canvas), strict=True):
        written.append(write_mask(out / f"{file.stem}.png", found, palette))
    return written


def _frame(file: Path, frame: Frame, channels: int) -> torch.Tensor:
    try:
        image = decode(file)
        if (image.height, image.width) != frame.original:
            raise DataError(
                f"the frame has {image.height}x{image.width} pixels and the first mask "
                f"{frame.original[0]}x{frame.original[1]}; both must have one size"
            )
        return place(image, frame, channels)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def video_canvas(original: tuple[int, int], size: int | None, multiple: int) -> tuple[int, int]:
    """Returns the (H, W) of a network's input: the short side at `size`, both cut down to a multiple."""
    short = min(original)
    sides = (side * (size or short) / short for side in original)
    return tuple(max(multiple, int(side // multiple) * multiple) for side in sides)


def frame_files(folder: Path) -> list[Path]:
    """Returns the images of a folder, sorted by name.

    Raises:
        DataError: There are none, two would give masks of one name, or the order of their numbers is another than that
            of their names.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in EXTENSIONS and file.name[0] != ".")
    if not files:
        raise DataError(f"no frames in {str(folder)!r}; looked for {', '.join(sorted(EXTENSIONS))}")
    if len({file.stem for file in files}) < len(files):
        raise DataError(f"two frames of {str(folder)!r} have one name and differ in their suffix")
    counted = sorted(files, key=lambda file: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", file.stem)])
    wrong = next((pair for pair in zip(files, counted, strict=True) if pair[0] != pair[1]), None)
    if wrong:
        raise DataError(
            f"by name {wrong[0].name!r} stands where {wrong[1].name!r} stands by number; write the frames' numbers "
            "with leading zeros"
        )
    return files
