"""Masks of objects in video frames: their files, and the scores of DAVIS 2017 (Pont-Tuset et al., 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffrep.data.images import decode
from diffrep.errors import DataError

LABELS = 256  # of a palette PNG
BOUND = 0.008  # how far a contour may be off, as a share of the image's diagonal


def read_mask(file: str | Path) -> tuple[np.ndarray, list[int] | None]:
    """Reads labels.

    Args:
        file: A palette image, whose indices are the labels, or a grey one of 1, 8, 16 or 32 bits, whose values are.

    Returns:
        (H, W) integers, and the palette as a flat list of red, green and blue, or None.

    Raises:
        DataError: It cannot be read, or has colours in place of labels.
    """
    try:
        image = decode(Path(file))
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    if image.mode not in ("P", "L", "1", "I") and not image.mode.startswith("I;16"):
        raise DataError(
            f"{file} is of mode {image.mode!r}, whose colours are no labels; save the mask as a palette or grey image"
        )
    labels = np.asarray(image)
    return labels.astype(np.uint8) if image.mode == "1" else labels, image.getpalette()


def write_mask(file: Path, mask: np.ndarray, palette: Sequence[int] | None = None) -> Path:
    """Writes labels of 0 to 255 as a palette PNG; the default colours are those of PASCAL VOC and DAVIS."""
    check_labels(mask)
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(list(palette or voc_palette()))
    image.save(file)
    return file


def check_labels(mask: np.ndarray) -> None:
    """Raises a DataError for labels that a palette PNG cannot hold."""
    if mask.ndim != 2 or mask.dtype.kind not in "iub" or not mask.size:
        raise DataError(f"a mask must be integers (H, W), given: {mask.dtype} {mask.shape}")
    if mask.min() < 0 or mask.max() >= LABELS:
        raise DataError(f"a palette PNG holds labels of 0 to 255; given are labels of {mask.min()} to {mask.max()}")


def voc_palette() -> list[int]:
    """Returns PASCAL VOC's colours: the bits of a label are dealt to red, green and blue, the lowest weighs most."""
    return [
        sum((label >> (3 * place + channel) & 1) << (7 - place) for place in range(8))
        for label in range(LABELS)
        for channel in range(3)
    ]


def score_masks(
    truths: Sequence[np.ndarray], predictions: Sequence[np.ndarray], void: int | None = None
) -> dict[str, Any]:
    """Scores the masks of one video as DAVIS 2017 scores its semi-supervised track.

    The first frame (given) and the last are left out. The objects are the labels of the first true mask but 0. Over
    several videos the published numbers are means over all their objects.

    Args:
        truths: (H, W) integers for each frame.
        predictions: As many.
        void: A label that is taken for background in both, 255 in the published code; None has none.

    Returns:
        `J` and `F`, means over objects and frames, `J&F`, and `objects`: for each label `J`, `F`, and the shares of
        frames above 0.5, `J_recall` and `F_recall`.

    Raises:
        DataError: Frames are missing or of other sizes, fewer than three, or there are no objects or unknown ones.
    """
    shapes = [np.shape(mask) for mask in (*truths, *predictions)]
    if len(truths) != len(predictions) or len(truths) < 3 or len(set(shapes)) > 1:
        raise DataError(
            f"{len(truths)} true and {len(predictions)} predicted masks of sizes {sorted(set(shapes))}; at least 3 of "
            "each are needed, as many of one as of the other, all of one size"
        )
    objects = sorted(set(np.unique(truths[0]).tolist()) - {0, void})
    others = set(np.unique(np.stack(predictions)).tolist()) - {0, void, *objects}
    if not objects:
        raise DataError("the first true mask has no object: all of it is background")
    if others:
        raise DataError(f"predicted masks have labels {sorted(others)}; the first true mask has objects {objects}")
    scores = {}
    for label in objects:
        pairs = [(t == label, p == label) for t, p in zip(truths[1:-1], predictions[1:-1], strict=True)]
        region = np.array([region_similarity(*pair) for pair in pairs])
        contour = np.array([contour_accuracy(*pair) for pair in pairs])
        means = {"J": region.mean(), "F": contour.mean()}
        recalls = {"J_recall": (region > 0.5).mean(), "F_recall": (contour > 0.5).mean()}
        scores[label] = {name: float(value) for name, value in (means | recalls).items()}
    region, contour = (float(np.mean([score[name] for score in scores.values()])) for name in "JF")
    return {"J": region, "F": contour, "J&F": (region + contour) / 2, "objects": scores}


def score_folders(truth: str | Path, predicted: str | Path, void: int | None = None) -> dict[str, Any]:
    """Scores a folder of predicted mask PNGs against one of true masks with the same names; see `score_masks`."""
    names = sorted(file.name for file in Path(truth).glob("*.png"))
    missing = [name for name in names if not (Path(predicted) / name).is_file()]
    if not names or missing:
        raise DataError(
            f"{len(missing)} of {len(names)} masks of {str(truth)!r} are missing in {str(predicted)!r}"
            + (f", first {missing[0]!r}" if missing else "; .png files are looked for")
        )
    truths, predictions = ([read_mask(Path(folder) / name)[0] for name in names] for folder in (truth, predicted))
    return score_masks(truths, predictions, void)


def region_similarity(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Returns J, intersection over union of two masks (H, W) of bool; 1 where both are empty."""
    union = int((truth | predicted).sum())
    return int((truth & predicted).sum()) / union if union else 1.0


def contour_accuracy(truth: np.ndarray, predicted: np.ndarray, bound: float = BOUND) -> float:
    """Returns F, the harmonic mean of the shares of both contours that lie near the other.

    Near is within `bound` of the diagonal, rounded up to whole pixels, by a disc. An empty contour against one that
    is not scores 0, two empty ones 1.

    Args:
        truth: (H, W) of bool.
        predicted: (H, W) of bool.
        bound: Share of the image's diagonal.
    """
    radius = math.ceil(bound * math.hypot(*truth.shape))
    one, other = _contour(predicted), _contour(truth)
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    precision = (one & _dilated(other, radius)).sum() / one.sum()
    recall = (other & _dilated(one, radius)).sum() / other.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _contour(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels that differ from the one to the right, below or diagonally below (Martin, 2003)."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, across = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != across)


def _dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """Returns the pixels at most `radius` away from one of the mask."""
    height, width = mask.shape
    counts = np.pad(np.cumsum(mask, 1), ((0, 0), (1, 0)))
    found = np.zeros_like(mask)
    for down in range(-radius, radius + 1):
        reach = math.isqrt(radius**2 - down**2)
        columns = np.arange(width)
        # The row has a pixel of the mask between the columns x - reach and x + reach.
        near = counts[:, np.minimum(columns + reach + 1, width)] > counts[:, np.maximum(columns - reach, 0)]
        low, high = max(0, down), min(height, height + down)
        if low < high:
            found[low:high] |= near[low - down : high - down]
    return found
