"""Training of an aggregation network under Lightning; imported when one is trained, for Lightning takes seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from diffrep.config.correspond import AggregateConfig
from diffrep.correspond.descriptor import Cell, Descriptor
from diffrep.correspond.evaluate import predict_pairs
from diffrep.correspond.losses import (
    Couple,
    contrastive_loss,
    end_point_loss,
    flipped_pairs,
    sparse_contrastive_loss,
)
from diffrep.correspond.pck import pck
from diffrep.correspond.pose import partners_of
from diffrep.data.frame import Frame
from diffrep.data.pairs import Pair
from diffrep.data.warps import random_warp
from diffrep.heads.aggregation import AggregationNetwork
from diffrep.probe.lightning_setup import Loop, run_loop
from diffrep.probe.trained_data import Order, draws, seed_of

# Contrast and brightness of augmented views.
GAIN, SHIFT = (0.7, 1.3), (-0.1, 0.1)


def fit(
    config: AggregateConfig, network: AggregationNetwork, train: Descriptor, val: Descriptor, out: Path
) -> dict[str, Any]:
    """Trains a network, or goes on from the checkpoint in `out`.

    Args:
        config: How.
        network: With its first weights.
        train: Maps of the training pairs.
        val: Maps of the validation pairs.
        out: Run folder.

    Returns:
        "epoch" (from 1), "val", the validation PCK, and "state" of the best epoch, and "epochs", how many were run.

    Raises:
        DiffrepError: The loss is not finite.
        CheckpointError: The checkpoint cannot be read.
        BackendUnavailable: A logger's package is not installed.
    """
    training = Training(config, network, train, val)
    steps = DataLoader(range(training.order.steps), batch_size=None)
    return run_loop(training, steps, out, "train aggregation", train.backbone.device)


class Training(Loop):
    """One training of an aggregation network; see `fit`."""

    def __init__(self, config: AggregateConfig, network: AggregationNetwork, train: Descriptor, val: Descriptor):
        pairs = [number for number, pair in enumerate(train.pairs.pairs) if len(pair.source_points)]
        super().__init__("the aggregation network", network, config, len(pairs))
        self.train_on, self.judge_on = train, val
        self.order = Order(np.array(pairs), config.pairs_per_step, config.seed)
        self.parts = tuple((layer, level) for level in network.levels for layer in network.layers)

    def configure_optimizers(self) -> dict[str, Any]:
        """Returns optimizer and schedule."""
        config = self.config
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        total = config.epochs * self.order.steps

        def rate(step: int) -> float:
            return 1.0 if config.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(1, step / total)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, step: int, _: int) -> torch.Tensor:
        """Returns this process's part of the loss of a step."""
        step = int(step)
        numbers = self.order.step(self.current_epoch, step)
        place = self.current_epoch * self.order.steps + step
        torch.manual_seed(seed_of(self.config.seed, f"dropout {self.rank}", place))
        losses = [self._loss(number, place) for number in numbers[self.rank :: self.processes].tolist()]
        # A process may have no pair of a short step, and all must take part in the backward pass.
        nothing = sum(parameter.sum() for parameter in self.net.parameters()) * 0.0
        return self.part(torch.stack(losses).sum() if losses else nothing, len(numbers))

    def on_train_batch_end(self, *_: Any) -> None:
        """Shows how far the epoch is."""
        self.bar.set_postfix_str(f"step {self.trainer.fit_loop.batch_idx + 1} of {self.order.steps}")

    def judge(self) -> float:
        """Returns the PCK of the validation pairs."""
        was_training = self.net.training
        self.net.eval()
        config, val = self.config, self.judge_on
        val.network = self.net
        found = predict_pairs(val.sides(Cell(val.name, self.parts), config.protocol), val.pairs)
        self.net.train(was_training)
        sizes = [frame.original for frame in val.frames]
        scored = pck(found, val.pairs, config.protocol, (config.alpha,), sizes, resamples=1)
        return scored.headline[config.alpha].value

    def _loss(self, number: int, place: int) -> torch.Tensor:
        """Returns the loss of one pair, mirrored forms included."""
        train, pair = self.train_on, self.train_on.pairs.pairs[number]
        images = [pair.source, pair.target]
        if self.config.augment:
            views = View.of_pair(train, pair, draws(self.config.seed, f"view {number}", place))
            ids = [f"{train.pairs.images[image].id}#{place}" for image in images]
            features = train.read(self.parts, torch.stack([view.pixels for view in views]), ids)
            points = [view.points for view in views]
        else:
            features = train.features(self.parts, images)
            points = [
                on_canvas(points, train.frames[image])
                for image, points in zip(images, (pair.source_points, pair.target_points), strict=True)
            ]
        maps = self.net(features)
        canvas, size = train.frames[pair.source].canvas, tuple(maps.shape[-2:])
        couple = Couple(*maps, *(cells_of(one, canvas, size) for one in points))
        couples = [couple]
        if self.config.flip:
            mirrored = self.net(train.features(self.parts, images, mirrored=True))
            couples = flipped_pairs(couple, *mirrored, partners_of(pair, train.pairs.mirrored).tolist())
        weights = torch.tensor([one.weight for one in couples], device=self.device)
        losses = torch.cat([self._of(one, pair, place) for one in couples])
        return (losses * weights).sum() / weights.sum()

    def _of(self, couple: Couple, pair: Pair, place: int) -> torch.Tensor:
        config, both = self.config, ([couple.source], [couple.target], [couple.source_points], [couple.target_points])
        if config.loss == "clip":
            return contrastive_loss(*both, self.net.logit_scale)
        found = self._end_point(both, pair, place)
        if config.loss == "dense":
            return found
        return sparse_contrastive_loss(*both, self.net.logit_scale) + config.dense_weight * found

    def _end_point(self, both: tuple[Any, ...], pair: Pair, place: int) -> torch.Tensor:
        """Returns the end-point error with the published noise on the labels, 0.1 * threshold / 2."""
        generator = torch.Generator().manual_seed(seed_of(self.config.seed, "label noise", place))
        height, width = both[1][0].shape[-2:]
        frame = self.train_on.frames[pair.target]
        box = pair.target_box or (*pair.target_points.min(0), *pair.target_points.max(0))
        sides = (
            (box[2] - box[0]) * frame.scale[0] * width / frame.canvas[1],
            (box[3] - box[1]) * frame.scale[1] * height / frame.canvas[0],
        )
        return end_point_loss(*both, noise=0.1 * max(sides) / 2, generator=generator)


@dataclass(frozen=True)
class View:
    """An image as a training step sees it.

    Attributes:
        pixels: (C, H, W) in [0, 1], of the canvas's size.
        points: (K, 2) in pixels of the canvas, the centre of the first being (0, 0).
    """

    pixels: torch.Tensor
    points: np.ndarray

    @classmethod
    def of_pair(cls, descriptor: Descriptor, pair: Pair, rng: np.random.Generator) -> list[View]:
        """Returns other views of a pair's images: both mirrored or not, each warped and recoloured on its own.

        Only points that stay inside both are kept; a pair that would lose all of them is seen as it is.
        """
        sides = ((pair.source, pair.source_points), (pair.target, pair.target_points))
        plain = [
            cls(descriptor.images()[image], on_canvas(points, descriptor.frames[image])) for image, points in sides
        ]
        mirror = rng.random() < 0.5
        views = [view._mirrored() if mirror else view for view in plain]
        views = [view._warped(rng)._recoloured(rng) for view in views]
        inside = np.logical_and(*(view._inside() for view in views))
        return [cls(view.pixels, view.points[inside]) for view in views] if inside.any() else plain

    def _mirrored(self) -> View:
        points = np.stack([self.pixels.shape[-1] - 1 - self.points[:, 0], self.points[:, 1]], axis=1)
        return View(self.pixels.flip(-1), points)

    def _warped(self, rng: np.random.Generator) -> View:
        warp = random_warp(tuple(self.pixels.shape[-2:]), "affine", rng)
        return View(warp.image(self.pixels), warp.points(self.points))

    def _recoloured(self, rng: np.random.Generator) -> View:
        gain, shift = rng.uniform(*GAIN), rng.uniform(*SHIFT)
        return View((self.pixels * gain + shift).clamp(0, 1), self.points)

    def _inside(self) -> np.ndarray:
        return ((self.points >= 0) & (self.points <= np.array(self.pixels.shape[:0:-1]) - 1)).all(1)


def on_canvas(points: np.ndarray, frame: Frame) -> np.ndarray:
    """Takes annotated points (K, 2), which number pixels from 0, to pixels of the canvas, numbered so too."""
    return frame.to_canvas(np.asarray(points) + 0.5) - 0.5


def cells_of(points: np.ndarray, canvas: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Takes pixels of a canvas to cells of a map that covers it.

    Args:
        points: (K, 2); the centre of the first pixel is (0, 0).
        canvas: (H, W).
        size: (h, w) of the map.

    Returns:
        (K, 2) float64; the centre of the first cell is (0, 0).
    """
    scale = np.array(size[::-1]) / np.array(canvas[::-1])
    return torch.from_numpy((np.asarray(points) + 0.5) * scale - 0.5)
