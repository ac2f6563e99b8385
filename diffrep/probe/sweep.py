"""The sweep: every head on every reading, chosen on validation, the chosen ones scored once on test."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from diffrep import dist
from diffrep.config import ProbeConfig
from diffrep.errors import DiffrepError
from diffrep.probe.measure import Measure
from diffrep.probe.methods import LINEAR, Setting, fit, settings_of
from diffrep.probe.reading import Reading
from diffrep.probe.split import stratified_folds
from diffrep.probe.task import Task

Read = Callable[[Reading], torch.Tensor]


@dataclass(frozen=True)
class Judged:
    """One head on one reading, on the validation samples.

    Attributes:
        reading: What it read.
        head: "logistic", "sgd", "ridge", "knn" or "ncm".
        val: Best validation score over the settings.
        interval: 95 % bootstrap interval of `val`.
        setting: The setting that gave it; the first of equals.
        dim: Length of the flattened features.
        trials: Every setting and its validation score; minus infinity for one whose training diverged.
    """

    reading: Reading
    head: str
    val: float
    interval: tuple[float, float]
    setting: Setting
    dim: int
    trials: tuple[tuple[Setting, float], ...] = field(repr=False)


@dataclass(frozen=True)
class Scored:
    """A chosen head on the test samples.

    Attributes:
        judged: What was chosen, and the validation score it was chosen by.
        scores: Scores (M, K) of the test samples, in the order of `task.test`.
        head: The fitted head as a module, where it is one.
    """

    judged: Judged
    scores: torch.Tensor
    head: nn.Module | None


def sweep(read: Read, wanted: Iterable[Reading], task: Task, config: ProbeConfig, seed: int) -> list[Judged]:
    """Judges every head on every reading. Processes share the readings, and each gets the whole result.

    Args:
        read: Gives the features (N, D) of a reading, such as `lambda reading: reading.read(store)`.
        wanted: The readings.
        task: Who is who.
        config: Heads and their settings.
        seed: Seeds heads that draw first weights and orders.
    """
    wanted = list(wanted)
    state = dist.state()
    mine = range(state.process_index, len(wanted), state.num_processes)
    bar = tqdm(mine, dist.label("probe"), unit="reading", disable=not state.is_main_process)
    judged = [(number, judge(wanted[number], read(wanted[number]), task, config, seed)) for number in bar]
    if state.num_processes > 1:
        judged = sorted(gather_object(judged), key=lambda pair: pair[0])
    return [one for _, heads in judged for one in heads]


def judge(reading: Reading, features: torch.Tensor, task: Task, config: ProbeConfig, seed: int) -> list[Judged]:
    """Fits every head with every setting on the training samples and scores it on the validation samples.

    Args:
        reading: Names what the features are.
        features: Of all samples, (N, D).
        task: Who is who.
        config: Heads and their settings.
        seed: Seeds heads that draw.
    """
    train, val = (on_device(features, rows, config) for rows in (task.train, task.val))
    labels, measure = task.labels[task.train].to(train.device), Measure(config.metric, task)
    found = []
    for name in config.heads:
        settings = settings_of(name, config)
        scores = fit(name, train, labels, task.classes, settings, config, seed).scores(val)
        values = [measure(one.cpu(), task.labels[task.val]) for one in scores]
        top = max(range(len(values)), key=values.__getitem__)
        _check_converged(name, reading, values[top])
        interval = measure.interval([scores[top].cpu()], task.labels[task.val], config.seed)
        trials = tuple(zip(settings, values, strict=True))
        found.append(Judged(reading, name, values[top], interval, settings[top], features.shape[1], trials))
    return found


def choose(read: Read, judged: list[Judged], head: str, task: Task, config: ProbeConfig, seed: int) -> Judged:
    """Chooses reading and setting of a head.

    One validation split of a small set is a noisy judge of many readings, and the best of many noisy numbers is mostly
    luck. So the best few of a linear head are judged again by cross-validation over training and validation samples.

    Returns:
        The winner, the first of equals; its `val` is the cross-validated score when there were several finalists.
    """
    ranked = sorted((one for one in judged if one.head == head), key=lambda one: -one.val)
    if head not in LINEAR or min(config.finalists, len(ranked)) == 1 or config.val_split is not None:
        return ranked[0]
    finalists = ranked[: config.finalists]
    state = dist.state()
    mine = range(state.process_index, len(finalists), state.num_processes)
    bar = tqdm(mine, f"cross-validation of {head}", unit="reading", disable=not state.is_main_process)
    again = [(number, _cross_validate(finalists[number], read, task, config, seed)) for number in bar]
    if state.num_processes > 1:
        again = sorted(gather_object(again), key=lambda pair: pair[0])
    return max((one for _, one in again), key=lambda one: one.val)


def _cross_validate(one: Judged, read: Read, task: Task, config: ProbeConfig, seed: int) -> Judged:
    features, labels = read(one.reading)[task.fit], task.labels[task.fit]
    settings = settings_of(one.head, config)
    strata = torch.zeros(len(labels)) if task.multilabel else labels
    fold = torch.from_numpy(stratified_folds(strata.numpy(), config.folds, seed))
    held = [torch.empty(len(labels), task.classes) for _ in settings]
    for number in range(config.folds):
        inside, outside = torch.nonzero(fold != number)[:, 0], torch.nonzero(fold == number)[:, 0]
        x = on_device(features, inside, config)
        fitted = fit(one.head, x, labels[inside].to(x.device), task.classes, settings, config, seed)
        for scores, part in zip(held, fitted.scores(on_device(features, outside, config)), strict=True):
            scores[outside] = part.cpu()
    measure = Measure(config.metric, task)
    values = [measure(scores, labels) for scores in held]
    top = max(range(len(values)), key=values.__getitem__)
    _check_converged(one.head, one.reading, values[top])
    return replace(one, val=values[top], setting=settings[top])


def _check_converged(head: str, reading: Reading, best: float) -> None:
    """Raises DiffrepError when no setting of a head gave finite scores."""
    if best == float("-inf"):
        raise DiffrepError(
            f"{head} diverged on {reading} with every setting; take smaller learning rates (sgd.lrs), or a norm "
            "(sgd.norms)"
        )


def score(features: torch.Tensor, chosen: Judged, task: Task, config: ProbeConfig, seed: int) -> Scored:
    """Fits the chosen setting on training and validation samples together and scores the test samples."""
    x = on_device(features, task.fit, config)
    labels = task.labels[task.fit].to(x.device)
    fitted = fit(chosen.head, x, labels, task.classes, [chosen.setting], config, seed)
    scores = fitted.scores(on_device(features, task.test, config))[0].cpu()
    return Scored(chosen, scores, fitted.head(0) if fitted.head else None)


def on_device(features: torch.Tensor, rows: object, config: ProbeConfig) -> torch.Tensor:
    """Returns some rows of features (N, ...), flattened, in fp32, where the config wants heads to be fitted."""
    device = config.device
    if device == "auto":
        device = dist.state().device
    return features[rows].flatten(1).float().to(device)
