"""Judges every (layer, level) of a store: fit on train, choose on validation, report the chosen on test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from tqdm import tqdm

from diffrep.config import ProbeConfig
from diffrep.errors import ConfigError, DataError, DiffrepError
from diffrep.heads import LinearHead
from diffrep.metrics import accuracy, bootstrap_interval
from diffrep.probe.logistic import LogisticPath
from diffrep.probe.neighbours import knn_scores
from diffrep.probe.split import stratified_folds, stratified_split
from diffrep.store import FeatureStore


@dataclass(frozen=True)
class Task:
    """Labels and who is who: the samples that heads are fitted on, chosen on and scored on.

    Attributes:
        labels: (N,) int64 of all samples.
        classes: Number of classes.
        train: Positions heads are fitted on.
        val: Positions settings are chosen on, taken from the training split.
        test: Positions scored once.
    """

    labels: torch.Tensor
    classes: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    @property
    def fit(self) -> np.ndarray:
        """Positions of train and val: what the chosen settings are fitted on before the test."""
        return np.sort(np.concatenate([self.train, self.val]))


@dataclass(frozen=True)
class Cell:
    """Validation results of one (layer, level).

    Attributes:
        layer: Address, or the name of a baseline such as "pixels".
        level: Canonical level.
        linear: Best validation accuracy over the penalties.
        penalty: The penalty that gave it.
        knn: Best validation accuracy over k.
        neighbours: The k that gave it.
        dim: Length of the flattened features.
    """

    layer: str
    level: str
    linear: float
    penalty: float
    knn: float
    neighbours: int
    dim: int


@dataclass
class Score:
    """A head on the test split.

    Attributes:
        name: What it is, for tables.
        head: "linear", "knn" or "attention".
        layer: Address or name of a baseline.
        level: Canonical level.
        val: Validation accuracy it was chosen by.
        test: Test accuracy.
        interval: 95 % bootstrap interval of the test accuracy.
        setting: The chosen penalty, k or training settings.
    """

    name: str
    head: str
    layer: str
    level: str
    val: float
    test: float
    interval: tuple[float, float]
    setting: dict[str, object] = field(default_factory=dict)

    def plain(self) -> dict[str, object]:
        """Returns the score as JSON values."""
        return {**asdict(self), "interval": list(self.interval)}


def make_task(store: FeatureStore, config: ProbeConfig) -> Task:
    """Finds training, validation and test samples of a store.

    Raises:
        DataError: The store has no labels, one class only, or a class without training samples.
        UnknownNameError: A split is not in the store.
    """
    if store.labels is None:
        raise DataError(f"the store {store.path} has no labels; a probe needs them")
    train = store.rows(config.train_split)
    if config.test_split is None:
        keep, held = stratified_split(store.labels[train], config.test_fraction, config.seed + 1)
        train, test = train[keep], train[held]
    elif config.test_split == config.train_split:
        raise ConfigError("test_split is the training split; use test_split=null to hold out a part of it")
    else:
        test = store.rows(config.test_split)
    classes = np.unique(store.labels[train])
    if len(classes) < 2:
        raise DataError(f"the training split holds one class only ({classes.tolist()}); a probe needs two")
    strange = np.setdiff1d(store.labels[test], classes)
    if len(strange):
        raise DataError(f"classes {strange.tolist()} are in the test split and not in the training split")
    fit, val = stratified_split(store.labels[train], config.val_fraction, config.seed)
    labels = torch.from_numpy(store.labels)
    return Task(labels, int(labels.max()) + 1, train[fit], train[val], test)


def sweep(
    store: FeatureStore, task: Task, config: ProbeConfig, pairs: Iterable[tuple[str, str]] | None = None
) -> list[Cell]:
    """Fits a logistic regression and kNN on every (layer, level) and scores them on the validation samples.

    Args:
        store: Features.
        task: Who is who.
        config: Penalties, k and limits.
        pairs: (layer, level) pairs; None takes all of the store.
    """
    pairs = list(pairs or ((layer, level) for layer in store.layers for level in store.levels))
    return [
        judge(layer, level, store.tensor(layer, level), task, config)
        for layer, level in tqdm(pairs, "probe", unit="cell")
    ]


def judge(layer: str, level: str, features: torch.Tensor, task: Task, config: ProbeConfig) -> Cell:
    """Scores one set of features (N, ...) on the validation samples."""
    features = features.flatten(1).float()
    if not torch.isfinite(features).all():
        raise DiffrepError(f"the features of {layer}@{level} hold NaN or infinity")
    train, val, labels = features[task.train], features[task.val], task.labels
    path = LogisticPath(config.strengths, config.max_iter).fit(train, labels[task.train], task.classes)
    linear = [accuracy(scores.argmax(1), labels[task.val]) for scores in path.scores(val)]
    votes = knn_scores(train, labels[task.train], val, task.classes, config.neighbours, config.temperature)
    knn = {k: accuracy(vote.argmax(1), labels[task.val]) for k, vote in votes.items()}
    strength, k = int(np.argmax(linear)), max(knn, key=knn.get)
    return Cell(layer, level, linear[strength], config.strengths[strength], knn[k], k, features.shape[1])


def best(cells: list[Cell], head: str) -> Cell:
    """Returns the cell with the highest validation accuracy; the first of equals."""
    return max(cells, key=lambda cell: getattr(cell, head))


def best_linear(read: Callable[[str, str], torch.Tensor], cells: list[Cell], task: Task, config: ProbeConfig) -> Cell:
    """Chooses the (layer, level) and penalty of the linear probe.

    One validation split of a small set is a noisy judge of many cells, and the best of many noisy numbers is mostly
    luck. So the best few are judged again by cross-validation over training and validation samples together.

    Args:
        read: Gives the features (N, ...) of a (layer, level), such as `store.tensor`.
        cells: Validation results.
        task: Who is who.
        config: Penalties and limits.

    Returns:
        The winner; its `linear` is the cross-validated accuracy when there were several finalists.
    """
    ranked = sorted(cells, key=lambda cell: -cell.linear)[: config.finalists]
    if config.finalists == 1:
        return ranked[0]
    labels = task.labels[task.fit]
    fold = stratified_folds(labels.numpy(), config.folds, config.seed)
    judged = []
    for cell in tqdm(ranked, "cross-validation", unit="cell"):
        features = read(cell.layer, cell.level)[task.fit].flatten(1).float()
        hits = torch.zeros(len(config.strengths))
        for number in range(config.folds):
            inside, outside = torch.from_numpy(fold != number), torch.from_numpy(fold == number)
            path = LogisticPath(config.strengths, config.max_iter).fit(features[inside], labels[inside], task.classes)
            hits += (path.scores(features[outside]).argmax(-1) == labels[outside]).sum(1)
        strength = int(hits.argmax())
        judged.append(replace(cell, linear=hits[strength].item() / len(labels), penalty=config.strengths[strength]))
    return best(judged, "linear")


def score_linear(
    name: str, cell: Cell, features: torch.Tensor, task: Task, config: ProbeConfig
) -> tuple[Score, LinearHead]:
    """Fits the cell's chosen penalty on train and validation samples together and scores it on test."""
    features = features.flatten(1).float()
    path = LogisticPath((cell.penalty,), config.max_iter).fit(features[task.fit], task.labels[task.fit], task.classes)
    correct = path.scores(features[task.test])[0].argmax(1) == task.labels[task.test]
    score = _score(name, "linear", cell, cell.linear, correct, {"penalty": cell.penalty, "dim": cell.dim}, config.seed)
    return score, path.head(0)


def score_knn(name: str, cell: Cell, features: torch.Tensor, task: Task, config: ProbeConfig) -> Score:
    """Scores the cell's chosen k on test, with train and validation samples as neighbours."""
    votes = knn_scores(
        features[task.fit],
        task.labels[task.fit],
        features[task.test],
        task.classes,
        (cell.neighbours,),
        config.temperature,
    )
    correct = votes[cell.neighbours].argmax(1) == task.labels[task.test]
    return _score(name, "knn", cell, cell.knn, correct, {"k": cell.neighbours, "dim": cell.dim}, config.seed)


def _score(
    name: str, head: str, cell: Cell, val: float, correct: torch.Tensor, setting: dict[str, object], seed: int
) -> Score:
    hits = correct.numpy()
    interval = bootstrap_interval(hits, seed)
    return Score(name, head, cell.layer, cell.level, val, float(hits.mean()), interval, setting)
