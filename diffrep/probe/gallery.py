"""The test images that a head is most and least certain of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from yaml import YAMLError

from diffrep.config import ExtractConfig, ProbeConfig, validate
from diffrep.data import ImageSet, open_images
from diffrep.errors import ConfigError, DiffrepError
from diffrep.probe.scores import Result
from diffrep.probe.task import Task
from diffrep.store import FeatureStore

SHOWN = 12
SIDE = 96
CONFIG = "config.yaml"


def gallery(result: Result, task: Task) -> list[dict[str, Any]]:
    """Picks the positions among the test samples that are worth a look; none for multi-label data."""
    if task.multilabel:
        return []
    right = result.predicted == task.labels[task.test].numpy()
    rising = np.argsort(result.confidence, kind="stable")
    falling = np.argsort(-result.confidence, kind="stable")
    groups = {
        "Most certain and right": falling[right[falling]],
        "Least certain": rising,
        "Most certain and wrong": falling[~right[falling]],
    }
    return [
        {"title": title, "of": result.score.name, "rows": rows[:SHOWN].tolist()}
        for title, rows in groups.items()
        if len(rows)
    ]


def open_store_images(store: FeatureStore, config: ProbeConfig) -> ImageSet:
    """Opens the images that a store was made from.

    Args:
        store: The store; its `config.yaml` names the images when `config.data` does not.
        config: The probe's config.

    Raises:
        DiffrepError: They are not there any more.
    """
    return open_images(config.data or store_config(store).data, store.meta["transform"]["channels"])


def store_config(store: FeatureStore) -> ExtractConfig:
    """Returns the config a store was made with, wherever the store lies.

    Raises:
        StoreError: It is missing.
        ConfigError: It is damaged.
    """
    where = store.place.where(CONFIG)
    try:
        content = OmegaConf.create(store.place.read(CONFIG).decode())
        values = OmegaConf.to_container(content, resolve=True)
    except (UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {where}: {str(error).partition(chr(10))[0]}") from error
    return validate(ExtractConfig, values, where)


def rows_of(images: ImageSet, ids: list[str]) -> list[int]:
    """Returns where samples stand among the images.

    Raises:
        DiffrepError: A sample is not among them.
    """
    wanted = set(ids)
    place = {name: row for row in range(len(images)) if (name := images.id(row)) in wanted}
    missing = [name for name in ids if name not in place]
    if missing:
        raise DiffrepError(f"{len(missing)} samples of the store, such as {missing[0]!r}, are not among the images")
    return [place[name] for name in ids]


def thumbnails(images: ImageSet, ids: list[str]) -> np.ndarray:
    """Returns small pictures (N, h, w, 3) uint8 of samples by their ids, all of the first one's size.

    Raises:
        DiffrepError: A sample is not among the images.
    """
    pictures = [_small(images[row]) for row in rows_of(images, ids)]
    height, width = pictures[0].shape[:2]
    return np.stack([np.asarray(Image.fromarray(p).resize((width, height))) for p in pictures])


def _small(image: torch.Tensor) -> np.ndarray:
    array = (image.expand(3, -1, -1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(array))
    picture.thumbnail((SIDE, SIDE))
    return np.asarray(picture)


def save_arrays(out: Path, store_ids: list[str], results: list[Result], task: Task, pictures: dict[str, Any]) -> None:
    """Writes arrays.npz: labels, ids and predictions of the test samples, and thumbnails."""
    arrays: dict[str, Any] = {
        "labels": task.labels[task.test].numpy(),
        "ids": np.array([store_ids[row] for row in task.test]),
        **pictures,
    }
    if not task.multilabel:
        for number, result in enumerate(results):
            arrays[f"predicted.{number}"] = result.predicted
            arrays[f"confidence.{number}"] = result.confidence
    np.savez_compressed(out / "arrays.npz", **arrays)
