"""`diffrep feedback`: images in, a trained DifFeed and its results out."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from tqdm import tqdm

from diffrep import dist
from diffrep.backbones import Backbone
from diffrep.backbones.conditioning import Condition
from diffrep.config import load_config, to_plain, to_yaml, write_results
from diffrep.config.feedback import FeedbackConfig, FeedbackHeadConfig
from diffrep.data import open_images
from diffrep.errors import CheckpointError, ConfigError, DataError
from diffrep.extract.job import open_backbone, read_cond
from diffrep.heads.difformer import DifFormer
from diffrep.heads.feedback import FeedbackHead, FeedbackNetwork, Inputs, noised_inputs, read_names
from diffrep.heads.head import save_head
from diffrep.heads.linear import LinearHead
from diffrep.metrics import accuracy
from diffrep.noise import sample_noise
from diffrep.probe.feedback_data import Batch, batches_of
from diffrep.probe.gallery import gallery, save_arrays, thumbnails
from diffrep.probe.reading import Reading
from diffrep.probe.scores import Cost, Result, summarise
from diffrep.probe.task import LabelledImages, Task, make_task
from diffrep.probe.trained_data import Order
from diffrep.report import write_report
from diffrep.store.layout import changes, read_json, write_json, write_whole

NAME = "DifFeed"
# The noise draw of evaluation; training epoch e, from 0, draws noise e + 1.
EVALUATION = 0
# Keys that may differ between a run and its resume; `epochs` too, so that a run can be drawn out.
FREE_KEYS = ("out", "epochs", "workers", "loggers")
# Of the backbone's settings, those that a card needs to open it again.
OPTIONS = ("family", "config", "weights", "codec", "schedule", "revision")


def run_feedback(config: FeedbackConfig, backbone: Backbone | None = None) -> dict[str, Any]:
    """Trains DifFeed, or goes on with the run in `config.out`, and scores the test samples once.

    Writes `config.yaml`, `results.json`, `arrays.npz`, `report.html`, the trained parts with their model cards,
    `heads/DifFeed-seed-S/`, and, in `seed-S/`, checkpoints and logs. Processes share the samples of each step and of
    each evaluation; only the main process writes, and the others return nothing.

    Args:
        config: What to train.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.

    Returns:
        The metrics that stand in results.json.

    Raises:
        ConfigError: The parts of the config do not go together, or the folder holds another run.
        DataError: The labels do not allow it, or an image cannot be read.
        CheckpointError: The last checkpoint cannot be read.
        DiffrepError: The loss is not finite.
        BackendUnavailable: A logger's package is not installed.
    """
    run = FeedbackRun(config, backbone)
    out = run.out
    _claim(run)
    runs = [run.train(seed) for seed in run.seeds]
    if not dist.state().is_main_process:
        return {}
    result, metrics = run.result(runs)
    write_results(out, config, config.seed, metrics)
    rows = list(dict.fromkeys(row for group in metrics["gallery"] for row in group["rows"]))
    shown = thumbnails(run.images, [run.ids[run.task.test[row]] for row in rows]) if rows else []
    save_arrays(out, run.ids, [result], run.task, {"thumbnails": shown, "thumbnail_rows": rows} if rows else {})
    write_report(out)
    return metrics


def open_feedback(folder: str | Path, seed: int | None = None, backbone: Backbone | None = None) -> FeedbackNetwork:
    """Opens the network of a finished run, in eval mode.

    Args:
        folder: Run folder.
        seed: Which of its seeds; None takes the first.
        backbone: A loaded backbone in place of the one that the run's config names.

    Raises:
        CheckpointError: The run has no such weights.
    """
    folder = Path(folder)
    config = load_config(FeedbackConfig, [folder / "config.yaml"])
    stored = head_folder(folder, config.seed if seed is None else seed)
    if not stored.exists():
        raise CheckpointError(f"no {stored}; 'diffrep feedback' writes it once the seed is trained")
    return FeedbackHead.from_pretrained(str(stored)).attach(backbone or open_backbone(config.backbone))


def head_folder(folder: Path, seed: int) -> Path:
    """Returns where a run keeps what it trained with a seed."""
    return folder / "heads" / f"{NAME}-seed-{seed}"


def make_head(
    config: FeedbackHeadConfig, shapes: dict[str, tuple[int, ...]], levels: list[str], classes: int
) -> DifFormer | LinearHead:
    """Builds the head that a config asks for.

    Args:
        config: Kind and sizes.
        shapes: (C, h, w) of each layer that is read.
        levels: Canonical levels.
        classes: Number of classes.

    Raises:
        ConfigError: A linear head is to read several layers or levels.
    """
    if config.kind == "difformer":
        return DifFormer(shapes, levels, classes, **config.model_dump(exclude={"kind"}))
    if len(shapes) * len(levels) > 1:
        raise ConfigError(
            f"head.kind linear reads one layer at one level, and {len(shapes)} layers at {len(levels)} levels are "
            "named; take head.kind=difformer"
        )
    (shape,) = shapes.values()
    return LinearHead(shape[0] * config.pool**2, classes, config.pool, config.norm)


class FeedbackRun:
    """What all seeds of a run share: backbone, images, levels, and who is who.

    Args:
        config: What to train.
        backbone: A loaded backbone, or None.
    """

    def __init__(self, config: FeedbackConfig, backbone: Backbone | None = None):
        state = dist.state()  # before the backbone, which goes to this process's device
        self.config, self.out = config, Path(config.out)
        self.backbone = backbone = backbone or open_backbone(config.backbone)
        # CPUs are one device, whatever number a process gives its own.
        own = "cpu" if state.device.type == "cpu" else str(state.device)
        if state.num_processes > 1 and str(backbone.device) != own:
            raise ConfigError(
                f"the backbone is on {backbone.device}, and this process has {own}; leave backbone.device "
                "at auto when there are several processes"
            )
        if backbone.dtype == torch.float16:
            raise ConfigError(
                "gradients that pass through a float16 network underflow; use backbone.dtype=bfloat16 or float32"
            )
        self.images = open_images(config.data, backbone.image_channels)
        if not self.images.labelled:
            raise DataError(f"the images of {config.data.path} have no labels; DifFeed is trained with them")
        if self.images.multilabel:
            raise DataError(f"the images of {config.data.path} have several labels each, and DifFeed takes one")
        labelled = LabelledImages(self.images, config.data.path)
        self.ids, self.seeds = labelled.ids, [config.seed + number for number in range(config.seeds)]
        self.tasks = [make_task(labelled, config, seed) for seed in self.seeds]
        self._check_steps(state.num_processes)
        self.levels = [backbone.schedule.level(spec) for spec in config.levels]
        if len({level.key for level in self.levels}) < len(self.levels):
            raise ConfigError(f"levels names one level twice: {', '.join(level.key for level in self.levels)}")
        self.cond: Condition = backbone.condition(read_cond(config.cond), 1)
        backbone.conditioner.release()
        size = config.data.size
        self.size = (size, size) if size else tuple(self.images[int(self.task.train[0])].shape[-2:])
        self.latent = backbone.codec.latent_size(*self.size)
        addresses = backbone.addresses(read_names(backbone, config.read).values())
        self.shapes = backbone.shapes(addresses, *self.latent, condition=self.cond)

    @property
    def task(self) -> Task:
        """The samples' roles with the first seed; the test samples are those of every seed."""
        return self.tasks[0]

    def network(self, seed: int) -> FeedbackNetwork:
        """Returns a new network; its weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = make_head(self.config.head, self.shapes, [level.key for level in self.levels], self.task.classes)
            return FeedbackNetwork(self.backbone, head, self.config.read, self.config.pairs)

    def inputs(self, batch: Batch, draw: int, seed: int, flip: bool = False) -> Inputs:
        """Returns the noised inputs of a batch at each level.

        What is drawn depends on seed, sample, level and draw, and so neither on the batch nor on the data's order.
        """
        rows, images = batch
        ids = [self.ids[row] for row in rows.tolist()]
        if flip:
            mirrored = torch.cat([sample_noise((1,), seed, name, "all", draw, "flip") for name in ids]) > 0
            images = torch.where(mirrored.view(-1, 1, 1, 1).to(images.device), images.flip(-1), images)
        return noised_inputs(self.backbone, images, self.config.levels, ids, draw, seed, self.config.noise)

    def train(self, seed: int) -> tuple[float, torch.Tensor]:
        """Trains with one seed, saves the weights of its best epoch and scores them.

        A seed that is done is neither trained nor scored again.

        Returns:
            Validation accuracy and test scores (M, classes).
        """
        from diffrep.probe.feedback_fit import fit  # Lightning takes seconds to import

        state, folder = dist.state(), self.out / f"seed-{seed}"
        done = folder / "done.json"
        if done.exists() and read_json(done)["epochs"] == self.config.epochs:
            return read_json(done)["val"], load_file(folder / "scores.safetensors")["scores"]
        task, network = self.tasks[self.seeds.index(seed)], self.network(seed)
        best = fit(self, network, task, seed, folder)
        gc.collect()  # a DDP wrapper alive at exit can abort the process
        scores = self.scores(network, task.test, seed, "test")
        if state.is_main_process:
            save_head(network.trained.cpu(), head_folder(self.out, seed), self._about(task, seed, scores, best))
            save_file({"rows": torch.from_numpy(task.test), "scores": scores}, folder / "scores.safetensors")
            write_json(done, {"epochs": self.config.epochs, "val": best["val"]})
        state.wait_for_everyone()
        return best["val"], scores

    @torch.no_grad()
    def scores(self, network: FeedbackNetwork, rows: np.ndarray, seed: int, title: str | None = None) -> torch.Tensor:
        """Scores samples, each once, and returns (M, classes) fp32 in the order of `rows`, on every process.

        The processes share batches that do not depend on their number, and write to the samples' own places.

        Args:
            network: In whatever mode; it is scored in eval mode.
            rows: The samples.
            seed: Of the noise.
            title: Of a progress bar; None shows none.
        """
        state, size = dist.state(), self.config.batch_size
        starts = range(state.process_index * size, len(rows), state.num_processes * size)
        loader = batches_of(self.images, [rows[start : start + size] for start in starts], self.config.workers)
        hidden = title is None or not state.is_main_process
        found = torch.zeros(len(rows), self.task.classes, device=self.backbone.device)
        was_training = network.training
        network.eval()
        for start, batch in zip(starts, tqdm(loader, title, unit="batch", disable=hidden), strict=True):
            found[start : start + size] = network(self.inputs(batch, EVALUATION, seed), self.cond).float()
        network.train(was_training)
        if state.num_processes > 1:
            distributed.all_reduce(found)  # each place is zero on all processes but one
        return found.cpu()

    def result(self, runs: list[tuple[float, torch.Tensor]]) -> tuple[Result, dict[str, Any]]:
        """Returns the score and the metrics of results.json, whose keys are a probe's.

        Args:
            runs: Validation accuracy and test scores (M, classes) of each seed.
        """
        config, task, backbone = self.config, self.task, self.backbone
        layers, levels = list(self.shapes), [level.key for level in self.levels]
        pairs = self.network(config.seed).pairs
        spent, total = backbone.flops(
            backbone.addresses([*layers, *(source for source, _ in pairs)]), *self.latent, self.cond
        )
        passes = max(spent[source] for source, _ in pairs) + max(spent[layer] for layer in layers)
        flops = backbone.encode_flops(*self.size) + passes * len(levels)
        setting = to_plain(config) | {"pairs": [list(pair) for pair in pairs]}
        setting = {name: value for name, value in setting.items() if name not in ("backbone", "data", *FREE_KEYS)}
        reading = Reading(" + ".join(layers), " + ".join(levels), tuple((la, le) for la in layers for le in levels))
        cost = Cost(None, passes / total * len(levels), flops)
        result = summarise(NAME, "feedback", reading, runs, task, "accuracy", config.seed, None, cost, setting)
        samples = {name: len(getattr(task, name)) for name in ("train", "val", "test")}
        return result, {
            "title": f"{NAME}: {backbone.name} on {Path(config.data.path).name}",
            "metric": "accuracy",
            "names": self.images.classes,
            "samples": samples | {"classes": task.classes, "seeds": len(self.seeds)},
            "layers": [
                {"name": name, "shape": list(shape), "cost": spent[name] / total}
                for name, shape in self.shapes.items()
            ],
            "levels": [{"key": level.key, "time": level.time, "sigma": level.sigma} for level in self.levels],
            "costs": None,
            "cells": [],
            "scores": [result.score.plain()],
            "low_data": [],
            "gallery": gallery(result, task),
            "notes": [],
        }

    def _check_steps(self, processes: int) -> None:
        size = self.config.batch_size
        if size % processes:
            raise ConfigError(f"batch_size {size} does not divide among {processes} processes")
        smallest = min(Order(task.train, size, 0).smallest for task in self.tasks)
        # Batch norm wants two samples, and each process one.
        if smallest < max(2, processes):
            raise ConfigError(
                f"{len(self.task.train)} training samples in steps of {size} leave a step of {smallest}, which is too "
                f"few for batch norm and {processes} process{'es' if processes > 1 else ''}; take another batch_size"
            )

    def _about(self, task: Task, seed: int, scores: torch.Tensor, best: dict[str, Any]) -> dict[str, Any]:
        """Returns the facts that stand beside a saved head."""
        config, plain = self.config, to_plain(self.config)
        options = {name: plain["backbone"][name] for name in OPTIONS if plain["backbone"].get(name) is not None}
        facts = {
            "backbone": config.backbone.source,
            "backbone_options": options,
            "layers": list(self.shapes),
            "levels": [level.key for level in self.levels],
            "noise": config.noise,
            "seed": seed,
            "cond": config.cond,
            "image_size": config.data.size,
            "dataset": Path(config.data.path).name,
            "best_epoch": best["epoch"],
            "epochs_run": best["epochs"],
            "accuracy": accuracy(scores.argmax(1), task.labels[task.test]),
            "class_names": self.images.classes,
        }
        return {name: value for name, value in facts.items() if value not in (None, {})}


def _claim(run: FeedbackRun) -> None:
    """Takes the run folder, or refuses it where another run, other images or other weights are at home."""
    state = dist.state()
    out, stored = run.out, run.out / "config.json"
    plain = to_plain(run.config) | {"images": run.images.fingerprint(), "weights": run.backbone.weights_hash}
    if stored.exists():
        before = read_json(stored)
        differ = changes(*({key: one[key] for key in one if key not in FREE_KEYS} for one in (before, plain)))
        if differ:
            raise ConfigError(
                f"{out} holds a run with other settings ({'; '.join(differ)}); use another out, or the same settings"
            )
        if run.config.epochs < before["epochs"]:
            raise ConfigError(
                f"the run in {out} was to have {before['epochs']} epochs, and epochs={run.config.epochs} would choose "
                "among them all the same; use another out"
            )
    state.wait_for_everyone()  # all have looked before one writes
    if state.is_main_process:
        write_json(stored, plain)
        write_whole(out / "config.yaml", to_yaml(run.config).encode())
    state.wait_for_everyone()
