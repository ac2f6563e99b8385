"""Geometric matching with exact ground truth: how far off are matches of an image with a warp of itself?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffrep.backbones import Backbone
from diffrep.config import write_results
from diffrep.config.correspond import WarpConfig
from diffrep.config.protocol import get_protocol
from diffrep.correspond.matcher import Matcher, matcher_of, pixel_matcher
from diffrep.correspond.matching import prepare
from diffrep.correspond.pictures import draw_matches
from diffrep.correspond.predict import predict
from diffrep.data import ImageSet, open_images
from diffrep.data.frame import frame_of
from diffrep.data.warps import WarpedPair, warped_pairs
from diffrep.extract.job import open_backbone
from diffrep.metrics import bootstrap_interval
from diffrep.report import write_report
from diffrep.report.matches import MATCHES

# A match is called near when it is off by at most this share of the image's longer side.
NEAR = 0.1


def match_warps(
    matchers: list[Matcher],
    images: ImageSet,
    kinds: tuple[str, ...] = ("affine", "tps"),
    points: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Matches images with warps of themselves.

    Args:
        matchers: What is compared; all see the same warps.
        images: The images; of any number of channels that all matchers take.
        kinds: Kinds of warps, see `warped_pairs`.
        points: Points along each side.
        seed: Of the warps.

    Returns:
        For each kind and descriptor: "kind", "name", "images", "points", "error" (the mean over images of the mean
        distance in pixels), its 95 % bootstrap "interval", "median" over all points, and "near", the share of points
        that are off by at most a tenth of the longer side.
    """
    rows = []
    for kind in kinds:
        distances: dict[str, list[np.ndarray]] = defaultdict(list)
        sides: list[int] = []
        for pairs in _batches(warped_pairs(images, seed, kind, points), 16):
            sides += [max(pair.source.shape[-2:]) for pair in pairs]
            for matcher in matchers:
                for name, found in _predict(matcher, pairs, kind).items():
                    distances[name] += [
                        np.linalg.norm(points - pair.target_points, axis=1)
                        for points, pair in zip(found, pairs, strict=True)
                    ]
        rows += [{"kind": kind, "name": name, **_summary(found, sides)} for name, found in distances.items()]
    return rows


def run_warp(config: WarpConfig, backbone: Backbone | None = None) -> dict[str, Any]:
    """Judges a backbone by geometric matching; writes `results.json` and `report.html`.

    Args:
        config: What is matched.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.

    Returns:
        The metrics that stand in results.json; the rows of `match_warps` are `metrics["geometric"]`.

    Raises:
        DataError: There are no images, or one is too small.
        ConfigError: The parts of the config do not go together.
    """
    backbone = backbone or open_backbone(config.backbone)
    images = open_images(config.data, backbone.image_channels)
    own = matcher_of(config, backbone)
    matchers = [own] if config.patch is None else [own, pixel_matcher(config.patch, backbone.image_channels)]
    rows, out = match_warps(matchers, images, config.kinds, config.points, config.seed), Path(config.out)
    metrics = {
        "title": f"Geometric matching: {own.name} on {Path(config.data.path).name}",
        "geometric": rows,
        "correspondence": {"scores": []},
        "notes": [],
    }
    listed, drawn = draw_warps(own, images, rows, config.kinds, config.points, config.seed, config.pictures)
    metrics["correspondence"]["pictures"] = listed
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / MATCHES, **drawn)
    write_results(out, config, config.seed, metrics)
    write_report(out)
    return metrics


def draw_warps(
    matcher: Matcher,
    images: ImageSet,
    rows: list[dict[str, Any]],
    kinds: tuple[str, ...],
    points: int,
    seed: int,
    count: int,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Draws the first images as the best descriptor of a matcher matched them, in turn for each kind of warp.

    Returns:
        What the report says of each picture, and the pictures.
    """
    listed, drawn = [], {}
    for number, (kind, place) in enumerate([(kinds[n % len(kinds)], n // len(kinds)) for n in range(count)]):
        if place >= len(images):
            break
        pair = next(islice(warped_pairs(images.subset([place]), seed, kind, points), 1))
        found = {name: points[0] for name, points in _predict(matcher, [pair], kind).items()}
        best = min((row for row in rows if row["kind"] == kind and row["name"] in found), key=lambda row: row["error"])
        ours = found[best["name"]]
        near = np.linalg.norm(ours - pair.target_points, axis=1) <= NEAR * max(pair.source.shape[-2:])
        pictures = [_picture(one) for one in (pair.source, pair.target)]
        drawn[f"match.{number}"] = draw_matches(*pictures, pair.source_points, ours, near, pair.target_points)
        listed.append({"title": f"{pair.id}, {kind}", "of": best["name"], "pck": float(near.mean())})
    return listed, drawn


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows of `match_warps` as lines for a terminal."""
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in sorted(rows, key=lambda row: (row["kind"], row["error"])):
        low, high = row["interval"]
        lines.append(
            f"{row['kind']:6}  {row['name']:{width}}  error {row['error']:6.2f} px ({low:.2f} - {high:.2f})  median "
            f"{row['median']:6.2f}  within a tenth of the side {row['near']:.3f}"
        )
    return "\n".join(lines)


def _predict(matcher: Matcher, pairs: list[WarpedPair], kind: str) -> dict[str, list[np.ndarray]]:
    """Returns the predicted points of each pair, by descriptor."""
    images = torch.stack([one for pair in pairs for one in (pair.source, pair.target)])
    ids = [name for pair in pairs for name in (pair.id, f"{pair.id}#{kind}")]
    protocol, frame = get_protocol("dift"), frame_of(tuple(images.shape[-2:]), None)
    found = {}
    for name, maps in matcher.maps(images, ids).items():
        sides = [prepare(one, frame, protocol) for one in maps]
        found[name] = [predict(sides[2 * n], sides[2 * n + 1], pair.source_points) for n, pair in enumerate(pairs)]
    return found


def _summary(distances: list[np.ndarray], sides: list[int]) -> dict[str, Any]:
    means = np.array([one.mean() for one in distances])
    near = np.concatenate([one <= NEAR * side for one, side in zip(distances, sides, strict=True)])
    return {
        "images": len(distances),
        "points": len(near),
        "error": float(means.mean()),
        "interval": list(bootstrap_interval(means, seed=0)),
        "median": float(np.median(np.concatenate(distances))),
        "near": float(near.mean()),
    }


def _batches(pairs: Iterator[WarpedPair], size: int) -> Iterator[list[WarpedPair]]:
    """Cuts pairs into lists of images of one size."""
    part: list[WarpedPair] = []
    for pair in pairs:
        if part and (len(part) == size or pair.source.shape != part[0].source.shape):
            yield part
            part = []
        part.append(pair)
    if part:
        yield part


def _picture(image: torch.Tensor) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
