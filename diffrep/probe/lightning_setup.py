"""What every training under Lightning shares: epochs, the best of them, checkpoints, loggers, processes.

Imported when something is trained, for Lightning takes seconds to import.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffrep import dist
from diffrep.errors import BackendUnavailable, CheckpointError, DiffrepError
from diffrep.probe.trained_data import CHECKPOINT
from diffrep.probe.trained_net import share_batch_norms, unshare_batch_norms


class Settings(Protocol):
    """What a config says of any training."""

    epochs: int
    patience: int | None
    loggers: tuple[str, ...]


class Loop(lightning.LightningModule, ABC):
    """A training whose epochs are judged on the validation samples; the best one's weights are kept.

    A subclass has `configure_optimizers`, `judge` and a `training_step` that returns `part` of its loss.

    Args:
        name: What is trained, for messages.
        net: The same, as a module with its first weights.
        config: How long it is trained.
        count: Training samples of an epoch.

    Attributes:
        best: Epoch, validation score and weights of the best epoch so far, the first of equals.
        epochs: Epochs that were finished.
    """

    # What else helps against a loss that is not finite.
    remedy = ""

    def __init__(self, name: str, net: nn.Module, config: Settings, count: int):
        super().__init__()
        self.name, self.net, self.config, self.count = name, net, config, count
        self.best: dict[str, Any] = {"epoch": 0, "val": -math.inf, "state": {}}
        self.epochs = 0
        self.bar: tqdm | None = None
        state = dist.state()
        self.rank, self.processes = state.process_index, state.num_processes
        if self.processes > 1:
            share_batch_norms(net)

    @abstractmethod
    def judge(self) -> float:
        """Returns the score of the net on all validation samples at once, the same on every process."""

    @property
    def done(self) -> bool:
        """Whether all epochs were run, or the last ones brought nothing better."""
        patience = self.config.patience
        waited = self.epochs - self.best["epoch"]
        return self.epochs >= self.config.epochs or (patience is not None and self.epochs > 0 and waited >= patience)

    def part(self, loss: torch.Tensor, count: int) -> torch.Tensor:
        """Returns this process's part of the mean loss of a step, from the sum of its own samples' losses.

        Args:
            loss: That sum.
            count: Samples of the step on all processes.
        """
        self.loss += loss.detach()
        # The mean over the step's samples, once the processes' gradients are averaged.
        return loss * self.processes / count

    def on_train_epoch_start(self) -> None:
        """Empties the sum of losses."""
        self.loss = torch.zeros((), device=self.device)

    def on_train_epoch_end(self) -> None:
        """Judges the epoch."""
        epoch = self.epochs = self.current_epoch + 1
        if self.processes > 1:
            distributed.all_reduce(self.loss)
        loss = self.loss.item() / self.count
        if not math.isfinite(loss):
            raise DiffrepError(f"the loss of {self.name} is {loss} in epoch {epoch}; lower lr{self.remedy}")
        val = self.judge()
        if val > self.best["val"]:
            state = {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}
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


def run_loop(
    loop: Loop,
    loader: DataLoader,
    out: Path,
    title: str,
    device: torch.device,
    precision: str = "32-true",
    checkpoint_every: int = 1,
) -> dict[str, Any]:
    """Trains, or goes on from the checkpoint in `out`.

    Args:
        loop: The training; its config names the loggers.
        loader: Gives the steps of an epoch.
        out: Folder of checkpoint and logs.
        title: Of the progress bar, which counts epochs.
        device: Where it runs.
        precision: Lightning's precision.
        checkpoint_every: Epochs between checkpoints.

    Returns:
        "epoch" (from 1), "val" and "state" of the best epoch, and "epochs", how many were run.

    Raises:
        DiffrepError: The loss is not finite.
        CheckpointError: The checkpoint cannot be read.
        BackendUnavailable: A logger's package is not installed.
    """
    config, loggers = loop.config, _loggers(loop.config.loggers, out)
    checkpoint = _read(out / CHECKPOINT)
    if checkpoint is not None:
        loop.best, loop.epochs = checkpoint["best"], checkpoint["epoch"] + 1
    bar = tqdm(
        desc=dist.label(title),
        total=config.epochs,
        initial=loop.epochs,
        unit="epoch",
        disable=not dist.state().is_main_process,
    )
    with bar, _quiet():
        loop.bar = bar
        if not loop.done:
            trainer = lightning.Trainer(
                **_machines(device),
                max_epochs=config.epochs,
                precision=precision,
                logger=loggers,
                callbacks=[
                    ModelCheckpoint(
                        out,
                        Path(CHECKPOINT).stem,
                        every_n_epochs=checkpoint_every,
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
            path = None if checkpoint is None else str(out / CHECKPOINT)
            trainer.fit(loop, loader, ckpt_path=path, weights_only=True)
    unshare_batch_norms(loop.net)
    return loop.best | {"epochs": loop.epochs}


def _loggers(names: tuple[str, ...], out: Path) -> list[Logger]:
    kinds = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
    try:
        return [kinds[name](out, name=name) for name in names]
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
            f"cannot read the checkpoint {file} ({type(error).__name__}); delete it to train from the start"
        ) from error


def _machines(device: torch.device) -> dict[str, Any]:
    """Returns the Trainer's arguments for the processes there are; Lightning starts none."""
    state, accelerator = dist.state(), {"cuda": "gpu"}.get(device.type, device.type)
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
    try:
        with warnings.catch_warnings():
            for text in (
                "does not have many workers",  # how many there are is the config's affair
                "exists and is not empty",  # a run folder may be used again
                "smaller than the logging interval",
                "LeafSpec",  # a name that Lightning should stop using
                "checkpoint callbacks, but",
            ):
                warnings.filterwarnings("ignore", message=f".*{text}.*")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
