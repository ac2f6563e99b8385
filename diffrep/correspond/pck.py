"""Percentage of correct key points (PCK), under rules that have a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from diffrep.config.protocol import Protocol, get_protocol
from diffrep.correspond.protocol import layout_of
from diffrep.data.pairs import Pair, PairSet
from diffrep.errors import ConfigError, DataError

ALPHAS = (0.1, 0.05, 0.01)
AVERAGES = {"image": "per_image", "point": "per_point", "class": "per_class"}


class Estimate(NamedTuple):
    """A share of right points and its 95 % bootstrap interval over pairs, in [0, 1]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Category:
    """PCK of one class.

    Attributes:
        per_image: Mean over its pairs, at each alpha.
        per_point: Mean over its points, at each alpha.
        pairs: Its pairs that have points.
        points: Its points.
    """

    per_image: dict[float, float]
    per_point: dict[float, float]
    pairs: int
    points: int


@dataclass(frozen=True, eq=False)
class PCK:
    """Scores of predicted points.

    Pairs without points have no share of right ones: they are left out of every mean, and counted in `empty`.

    Attributes:
        protocol: The rules.
        alphas: Shares of the threshold length within which a point is right.
        per_image: Mean over pairs of each pair's share of right points, by alpha.
        per_point: Share of right points of all pairs together, by alpha.
        per_class: Mean over classes of the share of right points of each class, by alpha.
        categories: Each class alone.
        pairs: Pairs that have points.
        points: Points.
        empty: Pairs without points.
        distances: For each pair, (K,) in pixels of the image, or of the frame where the protocol measures in it.
        thresholds: For each pair, the length that alpha is a share of, in the same pixels; NaN for pairs without
            points.
    """

    protocol: Protocol
    alphas: tuple[float, ...]
    per_image: dict[float, Estimate]
    per_point: dict[float, Estimate]
    per_class: dict[float, Estimate]
    categories: dict[str, Category]
    pairs: int
    points: int
    empty: int
    distances: list[np.ndarray]
    thresholds: np.ndarray

    @property
    def headline(self) -> dict[float, Estimate]:
        """The mean that the protocol calls its own, by alpha."""
        return getattr(self, AVERAGES[self.protocol.average])

    def right(self, alpha: float) -> list[np.ndarray]:
        """Returns for each pair which points are right, (K,) bool."""
        return _right(self.distances, self.thresholds, alpha, self.protocol.compare)

    def text(self) -> str:
        """Returns lines for the terminal, each with the protocol's name; * marks the mean that it calls its own."""
        name = self.protocol.name
        counted = f"{self.pairs} pairs, {self.points} points"
        lines = [f"{name}: {self.protocol.text()}", f"{name}: {counted}{self._left_out()}"]
        for alpha in self.alphas:
            shown = []
            for average, attribute in AVERAGES.items():
                value, low, high = (f"{share * 100:.2f}" for share in getattr(self, attribute)[alpha])
                own = "*" if average == self.protocol.average else ""
                shown.append(f"per {average}{own} {value} % [{low}, {high}]")
            lines.append(f"{name} PCK@{alpha:g}: " + ", ".join(shown))
        return "\n".join(lines)

    def to_plain(self) -> dict[str, Any]:
        """Returns JSON values; alphas become strings such as "0.1"."""
        plain: dict[str, Any] = {
            "protocol": self.protocol.name,
            "rules": self.protocol.model_dump(mode="json"),
            "alphas": list(self.alphas),
            "pairs": self.pairs,
            "points": self.points,
            "empty": self.empty,
        }
        for attribute in AVERAGES.values():
            plain[attribute] = {str(alpha): list(one) for alpha, one in getattr(self, attribute).items()}
        plain["categories"] = {
            name: {
                "per_image": {str(alpha): share for alpha, share in one.per_image.items()},
                "per_point": {str(alpha): share for alpha, share in one.per_point.items()},
                "pairs": one.pairs,
                "points": one.points,
            }
            for name, one in self.categories.items()
        }
        return plain

    def _left_out(self) -> str:
        return f" ({self.empty} pairs without points left out)" if self.empty else ""


def pck(
    predictions: Sequence[np.ndarray],
    pairs: PairSet | Sequence[Pair],
    protocol: str | Mapping[str, Any] | Protocol = "dift",
    alphas: Sequence[float] = ALPHAS,
    sizes: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> PCK:
    """Scores predicted points.

    A point is right where its distance to the annotated one is within alpha times the protocol's threshold length. The
    quotient of the two is rounded to 12 digits, so that a point on the edge is on it.

    Args:
        predictions: For each pair (K, 2), in the target image as its points are annotated.
        pairs: The pairs.
        protocol: Its name, its keys, or itself.
        alphas: Shares of the threshold length.
        sizes: (H, W) of each image, in the order that `Pair.source` and `Pair.target` count in. Protocols with the
            threshold "image" or the measure "frame" need them.
        seed: Seeds the bootstrap, which draws whole pairs.
        resamples: Number of resamples.

    Raises:
        UnknownNameError: No such protocol was published.
        ConfigError: Alphas are not above 0, or sizes are needed and missing.
        DataError: Predictions do not fit the pairs or are not finite, a pair has no box that the protocol needs or its
            points have no extent, or there are no points.
    """
    rules, pairs = get_protocol(protocol), list(pairs.pairs if isinstance(pairs, PairSet) else pairs)
    alphas = tuple(float(alpha) for alpha in alphas)
    if not alphas or not all(0 < alpha < np.inf for alpha in alphas):
        raise ConfigError(f"alphas must be above 0, and at least one: got {list(alphas)}")
    if sizes is None and (rules.threshold == "image" or rules.measure == "frame"):
        raise ConfigError(
            f"the protocol {rules.name!r} (threshold={rules.threshold}, measure={rules.measure}) needs the images' "
            "sizes; give sizes=[(H, W), ...]"
        )
    images = 1 + max((max(pair.source, pair.target) for pair in pairs), default=-1)
    if sizes is not None and len(sizes) < images:
        raise ConfigError(f"{len(sizes)} sizes for pairs of {images} images; give (H, W) for each image")
    distances, thresholds = _measure(predictions, pairs, rules, sizes)
    counted = [number for number, one in enumerate(distances) if len(one)]
    if not counted:
        raise DataError(f"none of the {len(pairs)} pairs has a point; there is nothing to score")
    names = sorted({pairs[number].category for number in counted})
    classes = np.array([names.index(pairs[number].category) for number in counted])
    totals = np.array([len(distances[number]) for number in counted])
    hits = np.empty((len(counted), len(alphas)), dtype=np.int64)
    for column, alpha in enumerate(alphas):
        right = _right(distances, thresholds, alpha, rules.compare)
        hits[:, column] = [right[number].sum() for number in counted]
    intervals = _intervals(hits, totals, classes, seed, resamples)
    values = _means(np.ones((1, len(counted))), hits, totals, classes)
    means = {
        name: {
            alpha: Estimate(*(float(one) for one in (values[name][0, column], *intervals[name][:, column])))
            for column, alpha in enumerate(alphas)
        }
        for name in values
    }
    return PCK(
        protocol=rules,
        alphas=alphas,
        **means,
        categories={
            name: _category(alphas, hits[classes == one], totals[classes == one]) for one, name in enumerate(names)
        },
        pairs=len(counted),
        points=int(totals.sum()),
        empty=len(pairs) - len(counted),
        distances=distances,
        thresholds=thresholds,
    )


def _means(weights: np.ndarray, hits: np.ndarray, totals: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Averages right points.

    Args:
        weights: (R, N) how often each of N pairs counts.
        hits: (N, A) right points of each pair at each alpha.
        totals: (N,) its points.
        classes: (N,) number of its class.

    Returns:
        By name of the average, (R, A) shares.
    """
    own = classes[:, None] == np.arange(classes.max() + 1)
    shares = np.stack([_shares(weights[:, one], hits[one], totals[one]) for one in own.T])
    # A resample may lack a class; its mean is over those that it has.
    there = np.stack([weights[:, one].any(1) for one in own.T])[:, :, None]
    return {
        "per_image": weights @ (hits / totals[:, None]) / weights.sum(1, keepdims=True),
        "per_point": _shares(weights, hits, totals),
        "per_class": np.where(there, shares, 0).sum(0) / there.sum(0),
    }


def _shares(weights: np.ndarray, hits: np.ndarray, totals: np.ndarray) -> np.ndarray:
    return weights @ hits / np.maximum(weights @ totals, 1)[:, None]


def _intervals(
    hits: np.ndarray, totals: np.ndarray, classes: np.ndarray, seed: int, resamples: int
) -> dict[str, np.ndarray]:
    """Returns the 95 % interval of every mean, (2, A), as `diffrep.metrics.bootstrap_interval` draws it.

    All means are taken of the same resamples at once; one at a time they take seconds even for few pairs.
    """
    random, count = np.random.default_rng(seed), len(totals)
    block, drawn = max(1, 2**22 // count), []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        picked = random.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        weights = np.bincount(picked.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        drawn.append(_means(weights, hits, totals, classes))
    return {
        name: np.quantile(np.concatenate([one[name] for one in drawn]), [0.025, 0.975], axis=0) for name in drawn[0]
    }


def _category(alphas: tuple[float, ...], hits: np.ndarray, totals: np.ndarray) -> Category:
    return Category(
        per_image=dict(zip(alphas, (hits / totals[:, None]).mean(0).tolist(), strict=True)),
        per_point=dict(zip(alphas, (hits.sum(0) / totals.sum()).tolist(), strict=True)),
        pairs=len(totals),
        points=int(totals.sum()),
    )


def _right(distances: list[np.ndarray], thresholds: np.ndarray, alpha: float, compare: str) -> list[np.ndarray]:
    shares = (np.round(one / length, 12) for one, length in zip(distances, thresholds, strict=True))
    return [share <= alpha if compare == "<=" else share < alpha for share in shares]


def _measure(
    predictions: Sequence[np.ndarray],
    pairs: Sequence[Pair],
    rules: Protocol,
    sizes: Sequence[tuple[int, int]] | None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the distances (K,) of each pair and its threshold length."""
    if len(predictions) != len(pairs):
        raise DataError(f"{len(predictions)} predictions for {len(pairs)} pairs; give (K, 2) for each pair")
    distances, thresholds = [], np.full(len(pairs), np.nan)
    for number, (predicted, pair) in enumerate(zip(predictions, pairs, strict=True)):
        predicted = np.asarray(predicted, dtype=np.float64)
        if predicted.shape != pair.target_points.shape or not np.isfinite(predicted).all():
            raise DataError(
                f"pair {number}: predictions of shape {predicted.shape} for points of shape "
                f"{pair.target_points.shape}; finite ones of the same shape are needed"
            )
        scale = _scale(rules, sizes, pair.target)
        distances.append(np.linalg.norm((predicted - pair.target_points) * scale, axis=1))
        if len(predicted):
            thresholds[number] = _threshold(number, pair, rules, sizes)
    return distances, thresholds


def _scale(rules: Protocol, sizes: Sequence[tuple[int, int]] | None, image: int) -> np.ndarray:
    """Returns the pixels of the measure for each pixel of the image, (x, y)."""
    if rules.measure == "original":
        return np.ones(2)
    return np.array(layout_of(rules, tuple(sizes[image])).frame.scale)


def _threshold(number: int, pair: Pair, rules: Protocol, sizes: Sequence[tuple[int, int]] | None) -> float:
    """Returns the length that alpha is a share of."""
    words = rules.threshold.replace("_", " ")
    image = pair.source if rules.threshold == "source_box" else pair.target
    if rules.threshold == "image":
        sides = np.array(sizes[image][::-1], dtype=np.float64)
    elif rules.threshold == "points":
        sides = np.ptp(pair.target_points, axis=0)
    else:
        box = getattr(pair, rules.threshold)
        if box is None:
            raise DataError(
                f"pair {number} has no {words}, which the protocol {rules.name!r} measures by; set threshold to image "
                "or points"
            )
        sides = np.array([box[2] - box[0], box[3] - box[1]])
    length = float((sides * _scale(rules, sizes, image)).max())
    if not length > 0:
        raise DataError(
            f"pair {number}: the {words} by which the protocol {rules.name!r} measures has no extent; set threshold "
            "to another length"
        )
    return length
