"""The Lightning part of trained heads; imported when one is trained, for Lightning takes seconds to import."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from diffrep import dist
from diffrep.config import TrainedConfig
from diffrep.heads import Head
from diffrep.probe.lightning_setup import Loop, run_loop
from diffrep.probe.measure import Measure
from diffrep.probe.task import Task
from diffrep.probe.trained_data import Order, Samples, draws, seed_of
from diffrep.probe.trained_net import evaluate, loss_sum, scores_of


def fit(
    kind: str, head: Head, samples: Samples, task: Task, config: TrainedConfig, out: Path, seed: int, measure: Measure
) -> dict[str, Any]:
    """Trains a head, or goes on from the checkpoint in `out`.

    Args:
        kind: Which head it is.
        head: With its first weights.
        samples: Its features.
        task: Who is who.
        config: How it is trained.
        out: Run folder.
        seed: Seeds order, flips and dropout.
        measure: What the best epoch is chosen by.

    Returns:
        "epoch" (from 1), "val" and "state" of the best epoch, and "epochs", how many were run.

    Raises:
        DiffrepError: The loss is not finite.
        CheckpointError: The checkpoint cannot be read.
        BackendUnavailable: A logger's package is not installed.
    """
    training = Training(kind, head, samples, task, config, seed, measure)
    # A step's number is all that a loader has to say: what it reads and draws follows from that and the seed.
    steps = DataLoader(range(training.order.steps), batch_size=None)
    device = dist.state().device
    return run_loop(
        training, steps, out, f"train {out.parent.name}", device, config.precision, config.checkpoint_every
    )


class Training(Loop):
    """One training of a head; see `fit`."""

    remedy = ", or train with precision=32-true"

    def __init__(
        self,
        kind: str,
        head: Head,
        samples: Samples,
        task: Task,
        config: TrainedConfig,
        seed: int,
        measure: Measure,
    ):
        super().__init__(f"the head {kind!r}", head, config, len(task.train))
        self.kind, self.samples, self.task = kind, samples, task
        self.seed, self.measure = seed, measure
        self.order = Order(task.train, config.batch_size, seed)

    def configure_optimizers(self) -> dict[str, Any]:
        """Returns optimizer and schedule."""
        config, weights = self.config, self.net.parameters()
        # Plain SGD with weight decay is decoupled as it is: both terms are multiplied by the learning rate.
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.SGD
        optimizer = kind(weights, lr=config.lr, weight_decay=config.weight_decay)
        total = config.epochs * self.order.steps
        warmup = max(1, total // 10)

        def rate(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, step: int, _: int) -> torch.Tensor:
        """Returns this process's part of the loss of a step."""
        step = int(step)
        rows = self.order.step(self.current_epoch, step)
        number = self.current_epoch * self.order.steps + step
        # Drawn for the whole step and then cut, so that flips do not depend on the number of processes. Dropout does.
        mirrored = draws(self.seed, "flip", number).random(len(rows)) < 0.5
        torch.manual_seed(seed_of(self.seed, f"dropout {self.rank}", number))
        mine = slice(self.rank, None, self.processes)
        features = {pair: one.to(self.device) for pair, one in self.samples.read(rows[mine]).items()}
        if self.config.flip:
            which = torch.from_numpy(mirrored[mine]).to(self.device).view(-1, 1, 1, 1)
            features = {pair: torch.where(which, one.flip(-1), one) for pair, one in features.items()}
        labels = self.task.labels[rows[mine]].to(self.device)
        loss = loss_sum(scores_of(self.kind, self.net, features), labels, self.config.label_smoothing)
        return self.part(loss, len(rows))

    def judge(self) -> float:
        """Returns the measure of the validation samples."""
        rows = self.task.val
        scores = evaluate(self.kind, self.net, self.samples, rows, self.task.classes, self.device)[-1]
        return self.measure(scores, self.task.labels[rows])
