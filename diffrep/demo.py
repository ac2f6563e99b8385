"""The demo: which layer and timestep of the bundled network know most about clothes, and how well."""

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
from diffrep.probe.run import Probe
from diffrep.report import PICTURES, pca_rgb
from diffrep.report.matches import MATCHES
from diffrep.store import FeatureStore

BACKBONE = "fashion-unet"
LEVELS = (1, 5, 10, 20, 50, 100, 200, 300)
ATTENTION = TrainedConfig(width=96, depth=1, heads=4, epochs=12, flip=True)
PICTURED = 4
# Geometric matching: images, their kinds of warps, and the level whose maps are compared.
WARPED, KINDS, WARP_LEVEL = 100, ("affine", "tps"), 20


def demo(out: Path, limit: int | None = None) -> dict[str, Any]:
    """Runs the whole path on the bundled backbone and 5,000 bundled images, and writes the report.

    Args:
        out: Run folder; features that are already there are kept.
        limit: Images in all, four fifths of them for training; None takes all 5,000.

    Returns:
        The metrics that stand in results.json.
    """
    began = time.perf_counter()
    limits = None if limit is None else {"train": limit * 4 // 5, "test": limit - limit * 4 // 5}
    data = DataConfig(path="fashion-demo", size=32, fit="pad", limit=limits)
    backbone = load_backbone(BACKBONE)

    print("1/6 features of every block at 8 timesteps")
    store = _extract(data, backbone, FeatureRequest("blocks", LEVELS, pool=4), out, "features")
    # A small limit may leave a class without a test image.
    config = ProbeConfig(store=store.path, out=out, max_iter=40, missing="allow", trained={"attention": ATTENTION})
    probe = Probe(store, config, f"{BACKBONE} on {len(store):,} Fashion-MNIST images")
    print("2/6 linear probe and kNN on each of them")
    probe.sweep()
    linear = probe.score("logistic").reading
    probe.score("knn")

    print("3/6 baselines: raw pixels, and the same network untrained")
    probe.baseline("pixels")
    probe.baseline("untrained")

    print("4/6 attention-pooled head on the best layer")
    maps = _extract(data, backbone, FeatureRequest(linear.layer, linear.level, pool=8), out, "maps")
    probe.train("attention", maps)

    print("5/6 geometric matching: images against warps of themselves")
    images = open_images(data, backbone.image_channels)
    more = _match_warps(out / MATCHES, backbone, images)

    print("6/6 pictures and report")
    _draw(out / PICTURES, backbone, images)
    seconds = time.perf_counter() - began
    notes = [f"The whole run took {seconds:.0f} s on {torch.get_num_threads()} threads ({backbone.device})."]
    return probe.finish(notes, **more)


def _extract(data: DataConfig, backbone: Backbone, request: FeatureRequest, out: Path, name: str) -> FeatureStore:
    # Another limit, request or network is another store, so that the demo can run again in the same folder.
    identity = digest([to_plain(data), to_plain(request), backbone.weights_hash])
    config = ExtractConfig(
        backbone=BackboneConfig(source=BACKBONE),
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


def _draw(file: Path, backbone: Backbone, images: ImageSet) -> None:
    """Writes the first test images and the colour maps of every block at every level."""
    rows = list(images.splits["test"])[:PICTURED]
    inputs = torch.stack([images[row] for row in rows])
    request = FeatureRequest("blocks", LEVELS, dtype="float32")
    features = Extractor(backbone, request)(inputs, ids=[images.id(row) for row in rows])
    arrays = {f"{layer}@{level}": pca_rgb(tensor.numpy()) for (layer, level), tensor in features.items()}
    shown = (inputs[:, 0] * 255).byte().numpy()
    np.savez_compressed(file, images=shown, layers=features.layers, levels=list(features.levels), **arrays)
