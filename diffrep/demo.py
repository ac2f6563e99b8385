"""The demo: which layer and noise level of a U-Net and of a transformer know most about clothes, and how well."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffrep.backbones import Backbone, load_backbone
from diffrep.config import (
    BackboneConfig,
    DataConfig,
    ExtractConfig,
    FeatureRequest,
    ProbeConfig,
    TrainedConfig,
    digest,
    to_plain,
)
from diffrep.correspond.geometric import draw_warps, match_warps
from diffrep.correspond.matcher import Matcher, pixel_matcher
from diffrep.data import ImageSet, open_images
from diffrep.extract import Extractor
from diffrep.extract.job import ExtractJob
from diffrep.noise import Schedule
from diffrep.probe.run import Probe
from diffrep.report import pca_rgb, picture_file
from diffrep.report.matches import MATCHES
from diffrep.store import FeatureStore

BACKBONE, TRANSFORMER = "fashion-unet", "sit-mini"
LEVELS = (1, 5, 10, 20, 50, 100, 200, 300)
ATTENTION = TrainedConfig(width=96, depth=1, heads=4, epochs=12, flip=True)
PICTURED = 4
NOTE = (
    f"{BACKBONE} was trained without labels. {TRANSFORMER} was given the labels of the training images and learned to "
    "match features of an encoder trained on ImageNet; it is read without a class. Neither was trained on test images."
)
# Geometric matching: images, their kinds of warps, and the level whose maps are compared.
WARPED, KINDS, WARP_LEVEL = 100, ("affine", "tps"), 20


def demo(out: Path, limit: int | None = None) -> dict[str, Any]:
    """Runs the whole path on two bundled backbones and 5,000 bundled images, and writes one report of both.

    Args:
        out: Run folder; features that are already there are kept.
        limit: Images in all, four fifths of them for training; None takes all 5,000.

    Returns:
        The metrics that stand in results.json.
    """
    began = time.perf_counter()
    limits = None if limit is None else {"train": limit * 4 // 5, "test": limit - limit * 4 // 5}
    data = DataConfig(path="fashion-demo", size=32, fit="pad", limit=limits)
    backbone, transformer = load_backbone(BACKBONE), load_backbone(TRANSFORMER)
    images = open_images(data, backbone.image_channels)

    print("1/7 features of every block of a U-Net at 8 timesteps, linear probe and kNN on each of them")
    title = f"{BACKBONE} and {TRANSFORMER} on {len(images):,} Fashion-MNIST images"
    probe = _judge(data, backbone, LEVELS, out, title)
    linear = probe.best_linear()

    print("2/7 the same of a transformer, at the same ratios of noise to signal")
    levels = like_levels(transformer.schedule, backbone.schedule)
    probe.join(_judge(data, transformer, levels, out))

    print("3/7 baselines: raw pixels, and the U-Net untrained")
    probe.baseline("pixels")
    probe.baseline("untrained")

    print("4/7 attention-pooled head on the U-Net's best layer")
    maps = _extract(data, backbone, FeatureRequest(linear.layer, linear.level, pool=8), out, "maps")
    probe.train("attention", maps)

    print("5/7 geometric matching: images against warps of themselves")
    more = _match_warps(out / MATCHES, backbone, images)

    print("6/7 pictures")
    _draw(out / picture_file(), backbone, images, LEVELS)
    _draw(out / picture_file(TRANSFORMER), transformer, images, levels)

    print("7/7 report")
    seconds = time.perf_counter() - began
    notes = [NOTE, f"The whole run took {seconds:.0f} s on {torch.get_num_threads()} threads ({backbone.device})."]
    return probe.finish(notes, **more)


def like_levels(schedule: Schedule, other: Schedule) -> tuple[float, ...]:
    """Returns the times of a flow at which noise stands to signal as at `LEVELS` of another schedule.

    Times have three digits, which can be read in a table and moves the ratio by less than a hundredth.
    """
    sigmas = [other.level(level).sigma for level in LEVELS]
    return tuple(float(f"{schedule.level(f'sigma={sigma}').time:.3g}") for sigma in sigmas)


def _judge(
    data: DataConfig, backbone: Backbone, levels: tuple[float, ...], out: Path, title: str | None = None
) -> Probe:
    """Probes every block of a backbone at every level."""
    store = _extract(data, backbone, FeatureRequest("blocks", levels, pool=4), out, f"features-{backbone.name}")
    # A small limit may leave a class without a test image.
    config = ProbeConfig(store=store.path, out=out, max_iter=40, missing="allow", trained={"attention": ATTENTION})
    probe = Probe(store, config, title, backbone.name)
    probe.sweep()
    for head in config.heads:
        probe.score(head)
    return probe


def _extract(data: DataConfig, backbone: Backbone, request: FeatureRequest, out: Path, name: str) -> FeatureStore:
    # Another limit, request or network is another store, so that the demo can run again in the same folder.
    identity = digest([to_plain(data), to_plain(request), backbone.weights_hash])
    config = ExtractConfig(
        backbone=BackboneConfig(source=backbone.name),
        data=data,
        request=request,
        out=out / f"{name}-{identity}",
        batch_size=100,
    )
    return ExtractJob(config, backbone).run()


def _match_warps(file: Path, backbone: Backbone, images: ImageSet) -> dict[str, Any]:
    """Matches the first test images with warps of themselves, draws some, and returns the metrics."""
    warped = images.subset(list(images.splits["test"])[:WARPED])
    blocks = Matcher(backbone.name, backbone, FeatureRequest("blocks", WARP_LEVEL, dtype="float32"))
    matchers = [blocks, pixel_matcher(7, backbone.image_channels)]
    rows = match_warps(matchers, warped, KINDS)
    listed, drawn = draw_warps(blocks, warped, rows, KINDS, 8, 0, PICTURED)
    np.savez_compressed(file, **drawn)
    return {"geometric": rows, "correspondence": {"scores": [], "pictures": listed}}


def _draw(file: Path, backbone: Backbone, images: ImageSet, levels: tuple[float, ...]) -> None:
    """Writes the first test images and the colour maps of every block at every level."""
    rows = list(images.splits["test"])[:PICTURED]
    inputs = torch.stack([images[row] for row in rows])
    request = FeatureRequest("blocks", levels, dtype="float32")
    features = Extractor(backbone, request)(inputs, ids=[images.id(row) for row in rows])
    arrays = {f"{layer}@{level}": pca_rgb(tensor.numpy()) for (layer, level), tensor in features.items()}
    shown = (inputs[:, 0] * 255).byte().numpy()
    np.savez_compressed(file, images=shown, layers=features.layers, levels=list(features.levels), **arrays)
