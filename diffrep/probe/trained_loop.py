"""The Lightning part of trained heads; imported when one is trained, for Lightning takes seconds to import."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffrep import dist
from diffrep.config import TrainedConfig
from diffrep.errors import BackendUnavailable, CheckpointError, DiffrepError
from diffrep.heads import Head
from diffrep.probe.measure import Measure
from diffrep.probe.task import Task
from diffrep.probe.trained_data import CHECKPOINT, Order, Samples, draws, seed_of
from diffrep.probe.trained_net import evaluate, loss_sum, scores_of, share_batch_norms, unshare_batch_norms


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
    state = dist.state()
    loggers = _loggers(config, out)
    training = Training(kind, head, samples, task, config, seed, measure)
    checkpoint = _read(out / CHECKPOINT)
    if checkpoint is not None:
        training.best, training.epochs = checkpoint["best"], checkpoint["epoch"] + 1
    bar = tqdm(
        desc=dist.label(f"train {out.parent.name}"),
        total=config.epochs,
        initial=training.epochs,
        unit="epoch",
        disable=not state.is_main_process,
    )
    with bar, _quiet():
        training.bar = bar
        if not training.done:
            trainer = lightning.Trainer(
                **_machines(state),
                max_epochs=config.epochs,
                precision=config.precision,
                logger=loggers,
                callbacks=[
                    ModelCheckpoint(
                        out,
                        Path(CHECKPOINT).stem,
                        every_n_epochs=config.checkpoint_every,
                        save_on_train_epoch_end=True,
                        enable_version_counter=False,
                    )
                ],
                use_distributed_sampler=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                default_root_dir=out,
            )
            # A step's number is all that a loader has to say: what it reads and draws follows from that and the seed.
            steps = DataLoader(range(training.order.steps), batch_size=None)
            path = None if checkpoint is None else str(out / CHECKPOINT)
            trainer.fit(training, steps, ckpt_path=path, weights_only=True)
    unshare_batch_norms(head)
    return training.best | {"epochs": training.epochs}


class Training(lightning.LightningModule):
    """One training of a head; see `fit`.

    Attributes:
        best: Epoch, validation score and weights of the best epoch so far.
        epochs: Epochs that were finished.
    """

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
        super().__init__()
        self.kind, self.head, self.samples, self.task = kind, head, samples, task
        self.config, self.seed, self.measure = config, seed, measure
        self.order = Order(task.train, config.batch_size, seed)
        self.best: dict[str, Any] = {"epoch": 0, "val": -math.inf, "state": {}}
        self.epochs = 0
        self.bar: tqdm | None = None
        state = dist.state()
        self.rank, self.processes = state.process_index, state.num_processes
        if self.processes > 1:
            share_batch_norms(head)

    @property
    def done(self) -> bool:
        """Whether all epochs were run, or the last ones brought nothing better."""
        patience = self.config.patience
        waited = self.epochs - self.best["epoch"]
        return self.epochs >= self.config.epochs or (patience is not None and self.epochs > 0 and waited >= patience)

    def configure_optimizers(self) -> dict[str, Any]:
        """Returns optimizer and schedule."""
        config, weights = self.config, self.head.parameters()
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

    def on_train_epoch_start(self) -> None:
        """Empties the sum of losses."""
        self.loss = torch.zeros((), device=self.device)

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
        loss = loss_sum(scores_of(self.kind, self.head, features), labels, self.config.label_smoothing)
        self.loss += loss.detach()
        # The mean over the step's samples, once the processes' gradients are averaged.
        return loss * self.processes / len(rows)

    def on_train_epoch_end(self) -> None:
        """Judges the epoch on all validation samples at once."""
        epoch = self.epochs = self.current_epoch + 1
        if self.processes > 1:
            distributed.all_reduce(self.loss)
        loss = self.loss.item() / len(self.task.train)
        if not math.isfinite(loss):
            raise DiffrepError(
                f"the loss of the head {self.kind!r} is {loss} in epoch {epoch}; lower lr, or train with "
                "precision=32-true"
            )
        rows = self.task.val
        scores = evaluate(self.kind, self.head, self.samples, rows, self.task.classes, self.device)[-1]
        val = self.measure(scores, self.task.labels[rows])
        if val > self.best["val"]:
            state = {name: value.detach().cpu().clone() for name, value in self.head.state_dict().items()}
            self.best = {"epoch": epoch, "val": val, "state": state}
        self.trainer.should_stop = self.trainer.should_stop or self.done
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        for logger in self.loggers:
            logger.log_metrics({"epoch": epoch, "train_loss": loss, "val": val, "lr": lr}, step=self.global_step)
            logger.save()
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}", val=f"{val:.3f}", best=f"{self.best['val']:.3f}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the best epoch beside the last one, so that one file, written whole, is the state of the run."""
        checkpoint["best"] = self.best


def _loggers(config: TrainedConfig, out: Path) -> list[Logger]:
    kinds = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
    try:
        return [kinds[name](out, name=name) for name in config.loggers]
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            "the logger 'tensorboard' needs the tensorboard package: pip install 'diffrep[trackers]', or take "
            "loggers=[csv]"
        ) from error


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what zip, pickle and the file system raise
        raise CheckpointError(
            f"cannot read the checkpoint {file} ({type(error).__name__}); delete it to train the head from the start"
        ) from error


def _machines(state: Any) -> dict[str, Any]:
    """Returns the Trainer's arguments for the processes there are; Lightning starts none."""
    device = state.device
    accelerator = {"cuda": "gpu"}.get(device.type, device.type)
    if state.num_processes == 1:
        devices = [device.index or 0] if device.type == "cuda" else 1
        return {"accelerator": accelerator, "devices": devices, "plugins": [LightningEnvironment()]}
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return {
        "accelerator": accelerator,
        "devices": local,
        "num_nodes": state.num_processes // local,
        "strategy": DDPStrategy(),
        "plugins": [TorchElasticEnvironment()],
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what Lightning says of itself; its errors still come through."""
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for text in (
            "does not have many workers",  # the loader counts steps
            "exists and is not empty",  # a run folder may be used again
            "smaller than the logging interval",
            "LeafSpec",  # a name that Lightning should stop using
            "checkpoint callbacks, but",
        ):
            warnings.filterwarnings("ignore", message=f".*{text}.*")
        yield
    for log, level in zip(logs, levels, strict=True):
        log.setLevel(level)
