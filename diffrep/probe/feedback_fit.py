"""Training of a `FeedbackNetwork` on live images with Lightning; imported when one is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from diffrep.config.feedback import FeedbackConfig
from diffrep.heads.feedback import FeedbackNetwork
from diffrep.metrics import accuracy
from diffrep.probe.feedback_data import Batch, Steps, batches_of
from diffrep.probe.lightning_setup import Loop, run_loop
from diffrep.probe.task import Task
from diffrep.probe.trained_data import Order, seed_of

if TYPE_CHECKING:
    from diffrep.probe.feedback import FeedbackRun


def fit(run: FeedbackRun, network: FeedbackNetwork, task: Task, seed: int, folder: Path) -> dict[str, Any]:
    """Trains a network, from the last checkpoint where there is one, and leaves it at its best epoch.

    Processes share the samples of each step and of each evaluation, and all end with the same weights.

    Args:
        run: Config, inputs and condition.
        network: What is trained.
        task: Who is who.
        seed: Of order, flips, dropout and noise.
        folder: For the checkpoint and the logs.

    Returns:
        "epoch" (from 1), "val", the validation accuracy, of the best epoch, and "epochs", how many were run.

    Raises:
        CheckpointError: The last checkpoint cannot be read.
        DiffrepError: The loss is not finite.
        BackendUnavailable: A logger's package is not installed.
    """
    device = run.backbone.device
    training = Training(run, network, task, seed)
    steps = batches_of(run.images, Steps(training.order, training.rank, training.processes), run.config.workers)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # each step seeds it anew
        best = run_loop(training, steps, folder, f"train {folder.name}", device)
    network.load_state_dict(best.pop("state"))
    network.to(device)
    return best


class Training(Loop):
    """Cross-entropy training of feedback layers and head; the backbone is no part of it."""

    def __init__(self, run: FeedbackRun, network: FeedbackNetwork, task: Task, seed: int):
        super().__init__("DifFeed", network, run.config, len(task.train))
        self.run, self.task, self.seed = run, task, seed
        self.order = Order(task.train, run.config.batch_size, seed)

    def on_train_epoch_start(self) -> None:
        """Sets the learning rate, by hand: an epoch is a function of its number, whenever the run was resumed."""
        super().on_train_epoch_start()
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.config.lr * _rate(self.current_epoch, self.config)

    def training_step(self, batch: Batch, step: int) -> torch.Tensor:
        """Returns this process's part of the loss of a step."""
        rows, _ = batch
        number = self.current_epoch * self.order.steps + step
        torch.manual_seed(seed_of(self.seed, f"dropout {self.rank}", number))
        # The noise of evaluation is draw 0; training epoch e, from 0, draws noise e + 1.
        inputs = self.run.inputs(batch, self.current_epoch + 1, self.seed, self.config.flip)
        labels = self.task.labels[rows.cpu()].to(self.device)
        loss = F.cross_entropy(self.net(inputs, self.run.cond), labels, reduction="sum")
        return self.part(loss, len(self.order.step(self.current_epoch, step)))

    def on_train_batch_end(self, *_: Any) -> None:
        """Shows how far the epoch is: one takes long."""
        self.bar.set_postfix_str(f"step {self.trainer.fit_loop.batch_idx + 1} of {self.order.steps}")

    def judge(self) -> float:
        """Returns the accuracy on the validation samples."""
        rows = self.task.val
        scores = self.run.scores(self.net, rows, self.seed)
        return accuracy(scores.argmax(1), self.task.labels[rows])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        config, weights = self.config, self.net.parameters()
        if config.optimizer == "sgd":
            return torch.optim.SGD(weights, config.lr, config.momentum, weight_decay=config.weight_decay)
        return torch.optim.AdamW(weights, config.lr, weight_decay=config.weight_decay)


def _rate(epoch: int, config: FeedbackConfig) -> float:
    if config.schedule == "step":
        return config.decay ** (epoch // config.decay_every)
    return 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
