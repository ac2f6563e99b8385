"""`diffrep feedback`: images in, a trained DifFeed and its results out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffrep.backbones import Backbone
from diffrep.backbones.conditioning import Condition
from diffrep.config import load_config, read_results, to_plain, to_yaml, write_results
from diffrep.config.feedback import FeedbackConfig, FeedbackHeadConfig
from diffrep.data import open_images
from diffrep.errors import CheckpointError, ConfigError, DataError
from diffrep.extract.job import open_backbone, read_cond
from diffrep.heads.difformer import DifFormer
from diffrep.heads.feedback import FeedbackNetwork, Inputs, read_names
from diffrep.heads.linear import LinearHead
from diffrep.noise import Level, mix, sample_noise
from diffrep.probe.feedback_fit import EVALUATION, NAME, Batch, EpochOrder, Rows, collate, fit
from diffrep.probe.gallery import gallery, save_arrays, thumbnails
from diffrep.probe.reading import Reading
from diffrep.probe.scores import Cost, Result, summarise
from diffrep.probe.task import LabelledImages, Task, make_task
from diffrep.report import write_report
from diffrep.store.layout import read_json, write_json, write_whole

# Keys that may differ between a run and its resume; `epochs` too, so that a run can be drawn out.
FREE_KEYS = ("out", "epochs", "workers")


def run_feedback(config: FeedbackConfig, backbone: Backbone | None = None) -> dict[str, Any]:
    """Trains DifFeed, or goes on with the run in `config.out`, and scores the test samples once.

    Writes `config.yaml`, `results.json`, `arrays.npz`, `report.html`, `head-feedback-seed-S.safetensors` (the feedback
    layers and the head) and, in `seed-S/`, checkpoints and `logs/`.

    Args:
        config: What to train.
        backbone: A loaded backbone in place of `config.backbone`, which then only names it.

    Returns:
        The metrics that stand in results.json.

    Raises:
        ConfigError: The parts of the config do not go together, or the folder holds another run.
        DataError: The labels do not allow it, or an image cannot be read.
        CheckpointError: The last checkpoint cannot be read.
    """
    run = FeedbackRun(config, backbone)
    out = run.out
    _claim(run)
    runs = [run.train(seed) for seed in run.seeds]
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
    file = weights_file(folder, config.seed if seed is None else seed)
    if not file.exists():
        raise CheckpointError(f"no {file}; 'diffrep feedback' writes it at the end of a run")
    metrics = read_results(folder)["metrics"]
    shapes = {layer["name"]: tuple(layer["shape"]) for layer in metrics["layers"]}
    levels = [level["key"] for level in metrics["levels"]]
    head = make_head(config.head, shapes, levels, metrics["samples"]["classes"])
    network = FeedbackNetwork(backbone or open_backbone(config.backbone), head, config.read, config.pairs)
    network.load_state_dict(load_file(file))
    return network.eval()


def weights_file(folder: Path, seed: int) -> Path:
    """Returns the path of a seed's trained weights in a run folder."""
    return folder / f"head-feedback-seed-{seed}.safetensors"


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
        self.config, self.out = config, Path(config.out)
        self.backbone = backbone = backbone or open_backbone(config.backbone)
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
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        with torch.no_grad():
            clean = self.backbone.codec.encode(images.to(self.backbone.device)).mean.float()
        return {level.key: (self._noised(clean, level, ids, draw, seed), level.time) for level in self.levels}

    def loader(self, rows: np.ndarray, order_seed: int | None = None) -> DataLoader:
        """Returns a loader of rows of the image set, in their order, or shuffled anew every epoch."""
        images, workers = Rows(self.images, rows), self.config.workers
        sampler = None if order_seed is None else EpochOrder(len(rows), order_seed)
        # Batch norm, in the feedback layers, has no statistics of one image.
        alone = order_seed is not None and len(rows) % self.config.batch_size == 1
        return DataLoader(
            images, self.config.batch_size, sampler=sampler, num_workers=workers, collate_fn=collate, drop_last=alone
        )

    def train(self, seed: int) -> tuple[float, torch.Tensor]:
        """Trains with one seed, saves the weights of its best epoch and scores them.

        A seed that is done is neither trained nor scored again.

        Returns:
            Validation accuracy and test scores (M, classes).
        """
        folder, weights = self.out / f"seed-{seed}", weights_file(self.out, seed)
        done = folder / "done.json"
        if done.exists() and read_json(done)["epochs"] == self.config.epochs:
            return read_json(done)["val"], load_file(folder / "scores.safetensors")["scores"]
        task, network = self.tasks[self.seeds.index(seed)], self.network(seed)
        loaders = self.loader(task.train, order_seed=seed), self.loader(task.val)
        val = fit(self, network, seed, loaders, folder)
        scores = self.scores(network, task.test, seed)
        save_file({name: value.cpu().contiguous() for name, value in network.state_dict().items()}, weights)
        save_file({"rows": torch.from_numpy(task.test), "scores": scores}, folder / "scores.safetensors")
        write_json(done, {"epochs": self.config.epochs, "val": val})
        return val, scores

    @torch.no_grad()
    def scores(self, network: FeedbackNetwork, rows: np.ndarray, seed: int) -> torch.Tensor:
        """Scores samples, each once: (M, classes) in the order of `rows`."""
        network.eval()
        found = {}
        for batch in tqdm(self.loader(rows), "test", unit="batch"):
            scores = network(self.inputs(batch, EVALUATION, seed), self.cond).float().cpu()
            found.update(zip(batch[0].tolist(), scores, strict=True))
        return torch.stack([found[row] for row in rows.tolist()])

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

    def _noised(self, clean: torch.Tensor, level: Level, ids: list[str], draw: int, seed: int) -> torch.Tensor:
        if self.config.noise == "none" or not level.noise:
            return clean
        eps = torch.stack([sample_noise(clean.shape[1:], seed, name, level.key, draw) for name in ids])
        signal, noise = (torch.full((len(clean),), value).to(clean.device) for value in (level.signal, level.noise))
        return mix(clean, eps.to(clean.device), signal, noise)


def _claim(run: FeedbackRun) -> None:
    """Takes the run folder, or refuses it where another run, other images or other weights are at home."""
    out, stored = run.out, run.out / "config.json"
    plain = to_plain(run.config) | {"images": run.images.fingerprint(), "weights": run.backbone.weights_hash}
    if stored.exists():
        before = read_json(stored)
        differ = sorted(key for key in plain if key not in FREE_KEYS and plain[key] != before.get(key))
        if differ:
            changes = "; ".join(f"{key}: {before.get(key)} there, {plain[key]} now" for key in differ)
            raise ConfigError(
                f"{out} holds a run with other settings ({changes}); use another out, or the same settings"
            )
        if run.config.epochs < before["epochs"]:
            raise ConfigError(
                f"the run in {out} was to have {before['epochs']} epochs, and epochs={run.config.epochs} would choose "
                "among them all the same; use another out"
            )
    write_json(stored, plain)
    write_whole(out / "config.yaml", to_yaml(run.config).encode())
