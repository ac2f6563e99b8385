"""Who is who in a probe: the samples that heads are fitted on, chosen on and scored on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from diffrep.config import ProbeConfig
from diffrep.data import ImageSet
from diffrep.errors import ConfigError, DataError, UnknownNameError
from diffrep.probe.split import stratified_split
from diffrep.store import FeatureStore


@dataclass(frozen=True)
class Task:
    """Labels and the roles of the samples.

    Attributes:
        labels: Of all samples: (N,) int64, or (N, K) 0 or 1 for multi-label data.
        classes: Number of classes K.
        train: Positions heads are fitted on.
        val: Positions settings are chosen on.
        test: Positions scored once.
        multilabel: Whether a sample may have several labels, or none.
    """

    labels: torch.Tensor
    classes: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    multilabel: bool = False

    @property
    def fit(self) -> np.ndarray:
        """Positions of train and val: what the chosen settings are fitted on before the test."""
        return np.sort(np.concatenate([self.train, self.val]))


@dataclass
class LabelledImages:
    """Labels and splits of images that lie in no store, as `make_task` reads them off one.

    Attributes:
        images: The images.
        path: Name for messages.
        labels: (N,) int64, or (N, K) 0 or 1.
        ids: Sample ids.
    """

    images: ImageSet
    path: str
    labels: np.ndarray = field(init=False)
    ids: list[str] = field(init=False)

    def __post_init__(self) -> None:
        rows = range(len(self.images))
        self.labels = np.array([self.images.label(row) for row in rows], dtype=np.int64)
        self.ids = [self.images.id(row) for row in rows]

    @property
    def classes(self) -> list[str] | None:
        """Class names, or None."""
        return self.images.classes

    def rows(self, split: str) -> np.ndarray:
        """Returns the positions of a split's samples.

        Raises:
            UnknownNameError: There is no such split.
        """
        if split not in self.images.splits:
            raise UnknownNameError("split", split, self.images.splits, "data.splits must name it, or be left out.")
        return np.array(self.images.splits[split])


def make_task(store: FeatureStore | LabelledImages, config: ProbeConfig, seed: int | None = None) -> Task:
    """Finds training, validation and test samples of a store.

    Args:
        store: The features, or labelled images.
        config: Names and shares of the splits.
        seed: Draws the validation samples; None takes `config.seed`. The test samples do not depend on it.

    Raises:
        DataError: The store has no labels, one class only, or a class that a split lacks.
        ConfigError: A split has two roles, or is not in the store.
    """
    if store.labels is None:
        raise DataError(f"the store {store.path} has no labels; a probe needs them")
    labels = store.labels
    if labels.min() < 0:
        raise DataError(f"the store {store.path} holds the label {labels.min()}; classes are numbered from 0")
    multilabel = labels.ndim == 2
    # Stratified by class where a sample has one.
    strata = np.zeros(len(labels), dtype=np.int64) if multilabel else labels
    train = store.rows(config.train_split)
    if config.test_split is None:
        keep, held = stratified_split(strata[train], config.test_fraction, config.seed + 1)
        train, test = train[keep], train[held]
    else:
        test = store.rows(config.test_split)
    named = [name for name in (config.train_split, config.val_split, config.test_split) if name is not None]
    if len(set(named)) < len(named):
        raise ConfigError(
            f"train_split, val_split and test_split are {named}: a split has one role. test_split=null holds out a "
            "part of the training split, val_split=null another"
        )
    if config.val_split is None:
        fit, held = stratified_split(strata[train], config.val_fraction, config.seed if seed is None else seed)
        train, val = train[fit], train[held]
    else:
        val = store.rows(config.val_split)
    # Class names may count classes that no sample of the store has.
    count = labels.shape[1] if multilabel else max(int(labels.max()) + 1, len(store.classes or ()))
    task = Task(torch.from_numpy(labels), count, train, val, test, multilabel)
    _check_classes(task, store, config)
    return task


def _check_classes(task: Task, store: FeatureStore, config: ProbeConfig) -> None:
    train, val, test = (_present(task, rows) for rows in (task.train, task.val, task.test))
    if len(train) < (1 if task.multilabel else 2):
        raise DataError(f"the training samples hold one class only ({_names(train, store)}); a probe needs two")
    for name, present in (("validation", val), ("test", test)):
        strange = np.setdiff1d(present, train)
        if len(strange) and config.missing != "any":
            raise DataError(
                f"classes {_names(strange, store)} are among the {name} samples and not in the training split; "
                "missing=any counts such samples as wrong"
            )
    # A validation part that was drawn from the training split is stratified as well as the classes' sizes allow.
    given = [("test", test)] if config.val_split is None else [("validation", val), ("test", test)]
    for name, present in given:
        absent = np.setdiff1d(train, present)
        if len(absent) and config.missing == "refuse":
            raise DataError(
                f"classes {_names(absent, store)} of the training split have no {name} sample, so nothing can be said "
                "of them; missing=allow scores the others"
            )


def _present(task: Task, rows: np.ndarray) -> np.ndarray:
    labels = task.labels[rows]
    return (torch.nonzero(labels.any(0))[:, 0] if task.multilabel else labels.unique()).numpy()


def _names(classes: np.ndarray, store: FeatureStore) -> str:
    shown = [store.classes[c] if store.classes and c < len(store.classes) else int(c) for c in classes[:10]]
    return f"{shown}" + (f" and {len(classes) - 10} more" if len(classes) > 10 else "")
