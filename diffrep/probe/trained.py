"""Heads that need epochs, trained with Lightning on stored maps."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffrep.config import AttentionConfig
from diffrep.errors import ConfigError
from diffrep.heads import AttentionPool
from diffrep.metrics import bootstrap_interval
from diffrep.probe.sweep import Score, Task
from diffrep.store import FeatureStore, LayerDataset


def train_attention(
    store: FeatureStore, layer: str, level: str, task: Task, config: AttentionConfig, out: Path, seed: int
) -> tuple[Score, AttentionPool]:
    """Trains an `AttentionPool` on one (layer, level) and scores the epoch that was best on validation.

    Args:
        store: Store with maps (C, h, w).
        layer: Address.
        level: Canonical level.
        task: Who is who; the head is trained on `task.train`.
        config: Size and training of the head.
        out: Folder for checkpoints and logs.
        seed: Seeds weights and data order.

    Raises:
        ConfigError: The store holds vectors, not maps, or `heads` does not divide `width`.
    """
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    shape = store.meta["layers"][layer]["shape"]
    if len(shape) != 3:
        raise ConfigError(
            f"attention pooling needs maps, {layer} is stored as {tuple(shape)}; extract with pool none or k"
        )
    if config.width % config.heads:
        raise ConfigError(f"attention.heads {config.heads} does not divide attention.width {config.width}")
    module = _module(config, shape, task, seed)
    split = {
        name: _rows(store, layer, level, rows) for name, rows in vars(task).items() if name in ("train", "val", "test")
    }
    order = torch.Generator().manual_seed(seed)
    loaders = {
        name: DataLoader(
            data, config.batch_size, shuffle=name == "train", generator=order if name == "train" else None
        )
        for name, data in split.items()
    }
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    saver = ModelCheckpoint(out, monitor="val_accuracy", mode="max", filename="best", enable_version_counter=False)
    with warnings.catch_warnings():
        # The data lie in memory-mapped files, where loader workers would only add copies; a run folder may be used
        # again; few steps an epoch are no mistake; LeafSpec is a name that Lightning, not the user, should stop using.
        for text in (
            "does not have many workers",
            "exists and is not empty",
            "smaller than the logging interval",
            "LeafSpec",
        ):
            warnings.filterwarnings("ignore", message=f".*{text}.*")
        trainer = lightning.Trainer(
            max_epochs=config.epochs,
            callbacks=[saver, _epoch_bar()],
            logger=CSVLogger(out, name=None, version=""),
            log_every_n_steps=20,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            devices=1,
        )
        # Dropout and flips draw from the global generator: seeded here, and given back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trainer.fit(module, loaders["train"], loaders["val"])
        module.load_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"])
        parts = trainer.predict(module, loaders["test"])
    labels = task.labels[task.test]
    hits = (torch.cat(parts).argmax(1) == labels).numpy()
    setting = {**config.model_dump(exclude={"store", "layer", "level"}), "dim": int(np.prod(shape))}
    val = float(saver.best_model_score)
    score = Score(
        "attention pool", "attention", layer, level, val, float(hits.mean()), bootstrap_interval(hits, seed), setting
    )
    return score, module.head


def _epoch_bar():  # noqa: ANN202 - a Lightning callback
    """Returns a callback that shows one line for the whole training in place of two bars an epoch."""
    import lightning

    class EpochBar(lightning.Callback):
        def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            self.bar = tqdm(
                total=trainer.max_epochs, desc="attention", unit="epoch", disable=not trainer.is_global_zero
            )

        def on_validation_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            self.bar.update()
            self.bar.set_postfix(val=f"{float(trainer.callback_metrics['val_accuracy']):.3f}")

        def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            self.bar.close()

    return EpochBar()


def _rows(store: FeatureStore, layer: str, level: str, rows: np.ndarray) -> LayerDataset:
    return LayerDataset(store, f"{layer}@{level}", rows)


def _module(config: AttentionConfig, shape: list[int], task: Task, seed: int):  # noqa: ANN202 - a LightningModule
    import lightning

    class HeadModule(lightning.LightningModule):
        """Cross-entropy training of the head with AdamW, linear warm-up over a tenth, cosine decay."""

        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.head = AttentionPool(
                    shape[0], tuple(shape[1:]), task.classes, config.width, config.depth, config.heads, config.dropout
                )

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            maps, labels = batch
            if config.flip:
                mirrored = torch.rand(len(maps), 1, 1, 1, device=maps.device) < 0.5
                maps = torch.where(mirrored, maps.flip(-1), maps)
            loss = F.cross_entropy(self.head(maps), labels)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
            maps, labels = batch
            hits = (self.head(maps).argmax(1) == labels).float()
            # Lightning weighs each batch by its size, so the short last batch counts as it should.
            self.log("val_accuracy", hits.mean(), batch_size=len(labels))

        def predict_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            return self.head(batch[0])

        def configure_optimizers(self) -> dict[str, object]:
            optimizer = torch.optim.AdamW(self.head.parameters(), config.lr, weight_decay=config.weight_decay)
            total = self.trainer.estimated_stepping_batches
            warmup = max(1, total // 10)

            def rate(step: int) -> float:
                if step < warmup:
                    return (step + 1) / warmup
                return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return HeadModule()
