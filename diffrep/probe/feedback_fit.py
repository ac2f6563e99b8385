"""Training of a `FeedbackNetwork` on live images with Lightning, one epoch a function of its number."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from diffrep.config.feedback import FeedbackConfig
from diffrep.data import ImageSet
from diffrep.errors import CheckpointError, ConfigError, DiffrepError
from diffrep.heads.feedback import FeedbackNetwork

if TYPE_CHECKING:
    from diffrep.probe.feedback import FeedbackRun

NAME = "DifFeed"
# The noise of evaluation; training epoch e, from 0, draws noise e + 1.
EVALUATION = 0
Batch = tuple[torch.Tensor, torch.Tensor]  # rows (B,) of the image set, and images (B, C, H, W)


def fit(
    run: FeedbackRun, network: FeedbackNetwork, seed: int, loaders: tuple[DataLoader, DataLoader], folder: Path
) -> float:
    """Trains a network, from the last checkpoint where there is one, and leaves it at its best epoch.

    Args:
        run: Config, inputs, labels and condition.
        network: What is trained.
        seed: Of dropout and noise.
        loaders: Of training and validation samples.
        folder: For `last.ckpt`, `best.ckpt` and `logs/`.

    Returns:
        The validation accuracy of the best epoch.

    Raises:
        CheckpointError: The last checkpoint cannot be read.
        DiffrepError: The loss is not finite.
    """
    import lightning
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    config, device = run.config, run.backbone.device
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    best = {"monitor": "val_accuracy", "mode": "max"}
    saver = ModelCheckpoint(folder, filename="best", enable_version_counter=False, **best)
    # Not `save_last`, which only writes when the best is written, and after the best, whose score it holds.
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    stops = [] if config.patience is None else [EarlyStopping(patience=config.patience, **best)]
    with warnings.catch_warnings():
        # A run folder is used again when a run goes on; few steps an epoch are no mistake; how many workers there are
        # is the config's affair; LeafSpec is a name that Lightning, not the user, should stop using.
        for text in ("does not have many workers", "exists and is not empty", "logging interval", "LeafSpec"):
            warnings.filterwarnings("ignore", message=f".*{text}.*")
        trainer = lightning.Trainer(
            max_epochs=config.epochs,
            accelerator={"cuda": "gpu"}.get(device.type, device.type),
            devices=[device.index or 0] if device.type == "cuda" else 1,
            callbacks=[saver, last, *stops, _bar(f"{NAME}, seed {seed}")],
            logger=CSVLogger(folder, name="logs"),
            log_every_n_steps=20,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # each epoch seeds it anew
            trainer.fit(_module(run, network, seed), *loaders, ckpt_path=_last(folder), weights_only=True)
    state = torch.load(folder / "best.ckpt", map_location=device, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
    return float(saver.best_model_score)


def _module(run: FeedbackRun, network: FeedbackNetwork, seed: int):  # noqa: ANN202 - a LightningModule
    import lightning

    config, labels = run.config, run.task.labels

    class FeedbackModule(lightning.LightningModule):
        """Cross-entropy training of feedback layers and head; the backbone is no part of it."""

        def __init__(self):
            super().__init__()
            self.network = network

        def on_train_epoch_start(self) -> None:
            # By hand, and dropout seeded anew: an epoch is a function of its number, whenever the run was resumed.
            torch.manual_seed(int(np.random.SeedSequence([seed, self.current_epoch]).generate_state(1)[0]))
            for group in self.optimizers().param_groups:
                group["lr"] = config.lr * _rate(self.current_epoch, config)

        def training_step(self, batch: Batch, index: int) -> torch.Tensor:
            inputs = run.inputs(batch, self.current_epoch + 1, seed, config.flip)
            loss = F.cross_entropy(network(inputs, run.cond), labels[batch[0].cpu()].to(self.device))
            if not torch.isfinite(loss):
                raise DiffrepError(f"the loss is {loss.item()} in epoch {self.current_epoch}; lower lr")
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Batch, index: int) -> None:
            scores = network(run.inputs(batch, EVALUATION, seed), run.cond)
            hits = (scores.argmax(1).cpu() == labels[batch[0].cpu()]).float()
            # Lightning weighs each batch by its size, so the short last batch counts as it should.
            self.log("val_accuracy", hits.mean(), batch_size=len(hits))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            if config.optimizer == "sgd":
                return torch.optim.SGD(
                    network.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
                )
            return torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay)

    return FeedbackModule()


def _bar(text: str):  # noqa: ANN202 - a Lightning callback
    """Returns a callback that shows one bar of steps for the whole training."""
    import lightning

    class StepBar(lightning.Callback):
        def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            total = trainer.max_epochs * trainer.num_training_batches
            self.shown: dict[str, str] = {}
            self.bar = tqdm(desc=text, total=total, initial=trainer.global_step, unit="step")

        def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            self.shown["loss"] = f"{float(outputs['loss']):.3f}"
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update()

        def on_validation_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            self.shown["val"] = f"{float(trainer.callback_metrics['val_accuracy']):.3f}"

        def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            self.bar.close()

    return StepBar()


def _rate(epoch: int, config: FeedbackConfig) -> float:
    if config.schedule == "step":
        return config.decay ** (epoch // config.decay_every)
    return 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


def _last(folder: Path) -> Path | None:
    """Returns the checkpoint to go on from, if there is one."""
    file = folder / "last.ckpt"
    if not file.exists():
        return None
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip or pickle may raise nearly anything
        raise CheckpointError(
            f"cannot read the checkpoint {file}: {error}; delete {folder} to train this seed again"
        ) from error
    return file


class Rows(Dataset):
    """Chosen rows of an image set, each with its row."""

    def __init__(self, images: ImageSet, rows: np.ndarray):
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        row = int(self.rows[index])
        return row, self.images[row]


class EpochOrder(Sampler):
    """A permutation for each epoch, a function of seed and epoch; Lightning calls `set_epoch`."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist())


def collate(samples: list[tuple[int, torch.Tensor]]) -> Batch:
    """Puts samples together.

    Raises:
        ConfigError: They differ in size.
    """
    sizes = sorted({tuple(image.shape[-2:]) for _, image in samples})
    if len(sizes) > 1:
        raise ConfigError(f"the images differ in size, such as {sizes[:2]}; set data.size")
    return torch.tensor([row for row, _ in samples]), torch.stack([image for _, image in samples])
