"""Small stores and point clouds for the tests of the probe."""

import numpy as np
import pytest
import torch

from diffrep.store import StoreWriter


def make_blobs(count, classes=3, dim=12, spread=1.0, seed=0):
    """Gaussian clouds, one a class, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return torch.tensor(centres[labels] + spread * rng.normal(size=(count, dim))).float(), torch.from_numpy(labels)


def make_store(
    path, levels=("t=5", "t=50"), shape=(4, 2, 2), labels="good", train=60, test=30, break_at=None, spread=4.0
):
    """A store whose second level separates the classes better than its first."""
    levels = ("t=5", "t=50")
    meta = {
        "numerics": 1,
        "backbone": {"name": "net"},
        "request": {},
        "layers": {"mid": {"shape": list(shape), "cost": 0.5}, "up": {"shape": list(shape), "cost": 1.0}},
        "levels": [[key, key, int(key[2:]), 0.9, 0.4] for key in levels],
        "data": {"path": "photos"},
        "splits": {"train": [0, train], "test": [train, train + test]},
        "classes": None,
        "unit_size": 40,
        "versions": {},
    }
    writer = StoreWriter(path, meta)
    for unit in writer.units:
        tensors = {}
        for layer in ("mid", "up"):
            for number, key in enumerate(levels):
                x, y = make_blobs(
                    train + test, dim=int(np.prod(shape)), spread=(spread, spread / 8)[number], seed=number
                )
                tensors[f"{layer}@{key}"] = x[list(unit.rows)].view(-1, *shape)
        if break_at is not None:
            tensors[break_at][0, 0] = float("nan")  # in each of the three units
        given = {"good": y, "one": torch.zeros_like(y), "none": None, "negative": y - 1}.get(labels)
        if labels == "new in test":
            given = torch.where(torch.arange(len(y)) == train, 7, y)
        if labels == "other in test":
            given = torch.where(torch.arange(len(y)) >= train, y.roll(1), y)
        if labels == "class 2 not in test":
            given = torch.where((torch.arange(len(y)) >= train) & (y == 2), 0, y)
        if labels == "several":
            given = torch.stack([y == 0, y != 2], dim=1).long()
        rows = list(unit.rows)
        writer.write(
            unit, tensors, [f"id{r}" for r in rows], rows, None if given is None else given[rows].tolist(), []
        )
    writer.finish()
    return path


@pytest.fixture
def blobs():
    return make_blobs


@pytest.fixture
def write_store():
    return make_store
