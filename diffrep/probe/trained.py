"""Heads that need epochs, trained with Lightning on stored features; the run folder makes them resumable."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from diffrep import dist
from diffrep.config import TrainedConfig, digest, to_plain
from diffrep.errors import CheckpointError, ConfigError
from diffrep.heads import Head
from diffrep.probe.measure import Measure
from diffrep.probe.reading import pooled_shape
from diffrep.probe.task import Task
from diffrep.probe.trained_data import CHECKPOINT, Order, Pair, Samples
from diffrep.probe.trained_net import batch_norms, build_head, check_shapes, evaluate, norm_of, set_standard
from diffrep.store import FeatureStore
from diffrep.store.layout import changes, read_json, write_json, write_whole

RUN, FINISHED = "run.json", "finished.safetensors"
# What may change between a run and its resume without changing a single number; the features stand in for `store`,
# `layers` and `levels`, which are only where they were found.
FREE_KEYS = ("kind", "store", "layers", "levels", "loggers", "checkpoint_every")


@dataclass(frozen=True)
class Trained:
    """A trained head and what it reached.

    Attributes:
        val: Validation score of the best epoch.
        scores: Scores (M, K) fp32 of the test samples, in the order of `task.test`.
        head: With the weights of the best epoch, in eval mode, on the CPU.
        setting: The config and what came of it, as JSON values: `norm` that the head has, `dim` of what it reads,
            `params`, `best_epoch` from 1, `epochs_run`; `lengths` with the "val" and "test" score of every length of a
            Matryoshka head.
    """

    val: float
    scores: torch.Tensor
    head: Head
    setting: dict[str, Any]


def train_head(
    kind: str,
    store: FeatureStore,
    pairs: list[Pair],
    task: Task,
    config: TrainedConfig,
    out: Path,
    seed: int,
    metric: str,
) -> Trained:
    """Trains a head on the training samples and scores its best epoch on the test samples.

    The best epoch is the one with the highest `metric` over all validation samples at once, the first of equals. In
    `out` stand checkpoints, logs and in the end the result: the same call goes on with a run that was stopped, and
    returns the result of one that was not, without training again. Processes share the samples of each step and of
    each evaluation, and all get the same result. Torch's generators are left as they were.

    Args:
        kind: "aggregation", "attention", "diffssl-attention", "difformer", "conv", "mlp", "linear" or "matryoshka".
        store: Where the features are.
        pairs: Which (layer, level); flat heads read several side by side, DifFormer as tokens.
        task: Who is who.
        config: Size and training of the head.
        out: Run folder of this head and seed.
        seed: Seeds weights, data order, flips and dropout.
        metric: "accuracy", "mean_per_class" or "map"; multi-label tasks always take "map".

    Raises:
        ConfigError: The head cannot read such features or cannot be trained so, or `out` holds another run.
        DiffrepError: Features or loss are not finite.
        BackendUnavailable: A logger's package is not installed.
        CheckpointError: A file in `out` cannot be read.
    """
    state, out = dist.state(), Path(out)
    shapes = {pair: pooled_shape(store, pair[0], config.pool) for pair in pairs}
    _check(kind, shapes, config)
    devices = [state.device] if state.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        head = build_head(kind, shapes, task.classes, config)
        smallest = Order(task.train, config.batch_size, seed).smallest
        if smallest < 2 and batch_norms(head):
            raise ConfigError(
                f"batch norm needs two samples at a time, and {len(task.train)} training samples in steps of "
                f"{config.batch_size} leave a step of {smallest}; take another batch_size"
            )
        _claim(out, kind, store, pairs, task, config, seed, metric)
        if not (out / FINISHED).exists():
            _train(kind, head, store, pairs, task, config, out, seed, Measure(metric, task))
        state.wait_for_everyone()
    return _result(kind, head, shapes, config, out)


def _check(kind: str, shapes: dict[Pair, tuple[int, ...]], config: TrainedConfig) -> None:
    """Finds what cannot work before anything is read or written."""
    processes = dist.state().num_processes
    if config.batch_size % processes:
        raise ConfigError(f"batch_size {config.batch_size} does not divide among {processes} processes")
    if config.precision == "16-mixed" and dist.state().device.type != "cuda":
        raise ConfigError("precision=16-mixed needs a GPU; use bf16-mixed or 32-true")
    norm_of(kind, config)
    check_shapes(kind, shapes, config)


def _train(
    kind: str,
    head: Head,
    store: FeatureStore,
    pairs: list[Pair],
    task: Task,
    config: TrainedConfig,
    out: Path,
    seed: int,
    measure: Measure,
) -> None:
    """Trains a head and writes `FINISHED`."""
    from diffrep.probe.trained_loop import fit  # Lightning takes seconds to import

    state = dist.state()
    samples = Samples(store, pairs, np.concatenate([task.train, task.val, task.test]), config.pool)
    if norm_of(kind, config) == "standard":
        set_standard(head, samples, task.train)
    best = fit(kind, head, samples, task, config, out, seed, measure)
    gc.collect()  # a DDP wrapper alive at exit can abort the process
    head.load_state_dict(best["state"])
    head.to(state.device)
    val, test = (evaluate(kind, head, samples, rows, task.classes, state.device) for rows in (task.val, task.test))
    head.cpu()
    about = {"val": best["val"], "best_epoch": best["epoch"], "epochs_run": best["epochs"]}
    if kind == "matryoshka":
        about["lengths"] = {
            str(size): {"val": measure(v, task.labels[task.val]), "test": measure(t, task.labels[task.test])}
            for size, v, t in zip(head.nesting, val, test, strict=True)
        }
    if state.is_main_process:
        tensors = {f"head.{name}": value.contiguous() for name, value in head.state_dict().items()}
        content = save({**tensors, "scores": test[-1].contiguous()}, metadata={"about": json.dumps(about)})
        write_whole(out / FINISHED, content)


def _result(kind: str, head: Head, shapes: dict[Pair, tuple[int, ...]], config: TrainedConfig, out: Path) -> Trained:
    """Reads `FINISHED` into a head."""
    try:
        with safe_open(out / FINISHED, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        head.load_state_dict({name.removeprefix("head."): tensors[name] for name in tensors if name != "scores"})
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {out / FINISHED}: {error}; delete it to train the head again") from error
    val = about.pop("val")
    setting = {key: value for key, value in to_plain(config).items() if key not in FREE_KEYS}
    setting |= {
        "norm": norm_of(kind, config),
        "dim": sum(map(prod, shapes.values())),
        "params": sum(one.numel() for one in head.parameters()),
        **about,
    }
    return Trained(val, tensors["scores"], head.eval(), setting)


def _claim(
    out: Path,
    kind: str,
    store: FeatureStore,
    pairs: list[Pair],
    task: Task,
    config: TrainedConfig,
    seed: int,
    metric: str,
) -> None:
    """Takes the run folder, or refuses one that holds another run."""
    plain = {key: value for key, value in to_plain(config).items() if key not in FREE_KEYS}
    splits = [rows.tolist() for rows in (task.train, task.val, task.test)]
    wanted = {
        "kind": kind,
        **plain,
        "seed": seed,
        "metric": metric,
        "read": ["@".join(pair) for pair in pairs],
        "features": store.digest,
        "samples": digest([splits, task.labels.tolist()]),
    }
    begun = any((out / name).exists() for name in (CHECKPOINT, FINISHED))
    claim_run(out, wanted, begun, "head")


def claim_run(out: Path, wanted: dict[str, Any], begun: bool, what: str) -> None:
    """Takes a run folder on all processes, or refuses one that holds another run.

    Args:
        out: The folder.
        wanted: What decides the numbers of this run, as JSON values.
        begun: Whether the folder holds anything of a training; else it is anybody's.
        what: What is trained, for the message.

    Raises:
        ConfigError: The folder holds another run.
    """
    state, stored = dist.state(), out / RUN
    if stored.exists() and begun:
        differ = changes(read_json(stored), wanted)
        if differ:
            raise ConfigError(
                f"{out} holds a {what} that was trained otherwise ({'; '.join(differ)}); give another out, take the "
                "same settings, or remove that folder"
            )
    state.wait_for_everyone()  # all have looked before one writes
    if state.is_main_process:
        write_json(stored, wanted)
    state.wait_for_everyone()
