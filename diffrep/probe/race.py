"""The rules of successive halving: how large its rungs are, who is in them, what they cost and who stays.

A cell is a layer at a level. Each rung judges the cells that are left on more samples than the one before, and only
the better ones go on (Jamieson and Talwalkar, 2016). Nothing in here reads an image or a feature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import numpy as np

from diffrep.config.search import SearchConfig
from diffrep.errors import ConfigError
from diffrep.extract import Plan
from diffrep.probe.task import Task

Cell = tuple[str, str]


@dataclass(frozen=True)
class Rung:
    """One round of the race.

    Attributes:
        samples: Training and validation samples in it, those of earlier rungs included.
        cells: Cells that are judged.
        kept: Cells that go on.
    """

    samples: int
    cells: int
    kept: int


def ladder(config: SearchConfig, cells: int, available: int) -> list[Rung]:
    """Lists the rungs: until `keep` cells are left, or the next rung would take all samples.

    Args:
        config: Sizes and factor.
        cells: Cells of the grid.
        available: Training and validation samples there are.

    Raises:
        ConfigError: There is nothing to search among, or fewer samples than a rung needs.
    """
    if cells == 1:
        raise ConfigError(
            "the grid is one layer at one level, and a search needs at least two cells; use 'diffrep extract' and "
            "'diffrep probe', or give more layers or levels"
        )
    if cells <= config.keep:
        raise ConfigError(f"keep={config.keep} would keep the whole grid of {cells} cells; take a smaller keep")
    sizes = list(config.rungs or [config.first])
    largest = max(sizes)
    if largest > available:
        raise ConfigError(
            f"a rung of {largest:,} samples is asked for and there are {available:,} to fit on and choose on; take "
            "smaller rungs (first=..., or rungs=[...]), or 'diffrep extract' and 'diffrep probe' for the full grid"
        )
    alive, found = cells, []
    for number, size in enumerate(sizes):
        kept = max(config.keep, ceil(alive / config.factor))
        if config.rungs is None and kept > config.keep and size * config.factor < available:
            sizes.append(size * config.factor)
        if number + 1 == len(sizes):
            kept = config.keep
        found.append(Rung(size, alive, kept))
        alive = kept
        if alive == config.keep:
            break
    return found


def members(task: Task, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the training and the validation samples of a rung; those of a smaller rung are among them.

    Both keep their roles from the whole task, in the same proportion, and each class its share of both.

    Args:
        task: Who is who among all samples.
        size: Samples of the rung.
        seed: Seeds the order in which samples join.

    Raises:
        ConfigError: A class would have no sample.
    """
    labels = task.labels.numpy()
    (train, first), (val, second) = (_order(labels, rows, seed) for rows in (task.train, task.val))
    total = len(train) + len(val)
    shares = _shares(size, len(train), len(val))
    if shares[0] < first or shares[1] < second:
        sizes = ((n, *_shares(n, len(train), len(val))) for n in range(size, total + 1))
        enough = next(n for n, *both in sizes if both[0] >= first and both[1] >= second)
        raise ConfigError(
            f"a rung of {size:,} samples has {shares[0]:,} to fit on and {shares[1]:,} to choose on, too few for one "
            f"of each of the {task.classes:,} classes; the first rung needs at least {enough:,} samples"
        )
    return np.sort(train[: shares[0]]), np.sort(val[: shares[1]])


def _shares(size: int, train: int, val: int) -> tuple[int, int]:
    # Neither share shrinks when the size grows, so that rungs are nested.
    chosen_on = max(round(size * val / (train + val)), 1)
    return size - chosen_on, chosen_on


def _order(labels: np.ndarray, rows: np.ndarray, seed: int) -> tuple[np.ndarray, int]:
    """Returns rows in the order in which they join, and how many are needed before each class has one."""
    rng = np.random.default_rng(seed)
    mixed = rng.permutation(rows)
    mine = labels[mixed]
    if mine.ndim == 2:  # several labels a sample: the first that has each label, then the others as they come
        leaders = np.unique([mine[:, label].argmax() for label in np.flatnonzero(mine.any(0))])
        place = np.arange(len(mixed), dtype=np.float64)
    else:
        # The j-th of n samples of a class joins when about j / n of all have.
        place = np.empty(len(mixed))
        for label in np.unique(mine):
            inside = np.flatnonzero(mine == label)
            place[inside] = (np.arange(len(inside)) + rng.random()) / len(inside)
        leaders = np.unique(mine, return_index=True)[1]
    place[leaders] -= len(mixed) + 1
    return mixed[np.argsort(place, kind="stable")], len(leaders)


def survivors(cells: list[Cell], values: list[float], count: int) -> list[Cell]:
    """Returns the best cells, in the order they were given in; of equals the first ones, which are shallower."""
    best = sorted(range(len(cells)), key=lambda index: -values[index])[:count]
    return [cells[index] for index in sorted(best)]


def groups(cells: Iterable[Cell]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Returns (layers, levels) products that together are the cells, each level in one of them.

    Levels with the same layers stand together, so each forward reads just what is wanted of it and ends there.
    """
    layers_of: dict[str, list[str]] = {}
    for layer, level in cells:
        layers_of.setdefault(level, []).append(layer)
    found: dict[tuple[str, ...], list[str]] = {}
    for level, layers in layers_of.items():
        found.setdefault(tuple(layers), []).append(level)
    return [(layers, tuple(levels)) for layers, levels in found.items()]


@dataclass(frozen=True)
class Work:
    """What is done for one image, or for several.

    Attributes:
        forwards: Forward passes, truncated ones counted whole.
        flops: FLOPs of them and of encoding.
    """

    forwards: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.forwards + other.forwards, self.flops + other.flops)

    def __mul__(self, images: int) -> Work:
        return Work(self.forwards * images, self.flops * images)


def work(plan: Plan, cells: Iterable[Cell], encode: bool = True) -> Work:
    """Returns the least work that reads cells of one image: a forward for each draw, up to its level's deepest layer.

    Args:
        plan: Of the whole grid.
        cells: What is read.
        encode: Count the encoding of the image too.
    """
    deepest: dict[str, float] = {}
    for layer, level in cells:
        deepest[level] = max(deepest.get(level, 0.0), plan.costs[layer])
    return _sum(plan, {level: round(share * plan.network_flops) for level, share in deepest.items()}, encode)


def most_work(plan: Plan, count: int) -> Work:
    """Returns the most work that any `count` cells of the grid can take: as many levels, each to its deepest layer."""
    dearest = sorted(plan.draws, key=lambda level: -plan.draws[level])[:count]
    return _sum(plan, dict.fromkeys(dearest, plan.forward_flops), True)


def _sum(plan: Plan, flops: dict[str, int], encode: bool) -> Work:
    forwards = sum(plan.draws[level] for level in flops)
    spent = sum(plan.draws[level] * each for level, each in flops.items())
    return Work(forwards, spent + (plan.encode_flops if encode else 0))
