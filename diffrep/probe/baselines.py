"""What features must beat: raw pixels, and the same network with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from diffrep.config import ProbeConfig, digest, to_plain
from diffrep.errors import StoreError
from diffrep.extract.job import ExtractJob
from diffrep.probe.gallery import open_store_images, rows_of, store_config
from diffrep.store import FeatureStore

PIXELS_SIDE = 32
# Their names in tables, behind the head's.
TITLES = {"pixels": "on raw pixels", "untrained": "on the untrained network"}


def pixels(store: FeatureStore, config: ProbeConfig) -> torch.Tensor:
    """Returns the images of a store's samples as features (N, C * h * w) in [0, 1], averaged to at most 32 x 32.

    Raises:
        DiffrepError: The images are not there any more, or not all of them.
    """
    images = open_store_images(store, config)
    height, width = images[0].shape[-2:]
    sides = min(PIXELS_SIDE, height), min(PIXELS_SIDE, width)
    rows = rows_of(images, store.ids)
    return torch.stack([F.adaptive_avg_pool2d(images[row], sides).flatten() for row in rows])


def untrained(store: FeatureStore, config: ProbeConfig, levels: list[str], out: Path) -> FeatureStore:
    """Extracts the layers of a store again with the network's random first weights, and returns that store.

    Args:
        store: The store; its `config.yaml` names backbone and request.
        config: The probe's config; its `data` goes before the store's.
        levels: Levels to read, among those of the store.
        out: Folder that gets the new store; what is there already is kept.

    Raises:
        DiffrepError: Backbone or images are not there any more.
        StoreError: The images are other ones now.
    """
    made = store_config(store)
    backbone = made.backbone.model_copy(update={"init_seed": config.seed})
    request = type(made.request)(**to_plain(made.request) | {"levels": levels})
    # A probe of the same folder may choose another level next time.
    folder = out / f"untrained-{digest([to_plain(backbone), to_plain(request)])[:8]}"
    again = made.model_copy(
        update={"backbone": backbone, "request": request, "out": str(folder), "data": config.data or made.data}
    )
    blank = ExtractJob(again).run()
    if blank.ids != store.ids:
        raise StoreError(f"{folder} holds other samples than {store.path}; its images have changed since")
    return blank
