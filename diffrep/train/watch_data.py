"""The samples that a model in training is measured on: chosen once, encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffrep.backbones.codec import Codec
from diffrep.backbones.encoders import TargetEncoder
from diffrep.config import DataConfig
from diffrep.data import ImageSet, open_images
from diffrep.errors import ConfigError, UnknownNameError
from diffrep.noise import Level, mix, sample_noise
from diffrep.store import FeatureStore
from diffrep.train.data import TrainingSet, find_targets, take

SEED = 0  # of the choice and the noise: runs with other seeds are measured on the same inputs
CHUNK = 64  # samples read or encoded at a time


@dataclass(frozen=True)
class Samples:
    """The chosen samples of one split, on the CPU.

    Attributes:
        ids: Of the samples.
        labels: (N,) int64, or None.
        inputs: What the network takes, pixels in [-1, 1] or latents (the posterior's mode), (N, C, h, w) fp32.
        targets: Features of an encoder, averaged over positions (N, D) fp32, or None.
    """

    ids: list[str]
    labels: torch.Tensor | None
    inputs: torch.Tensor
    targets: torch.Tensor | None

    def noised(self, level: Level) -> Samples:
        """Returns the same samples with the noise of a level, which depends on the sample's id alone.

        The mixture is that of `Backbone.extract` with seed 0.
        """
        if not level.noise:
            return self
        shape, noised = self.inputs.shape[1:], torch.empty_like(self.inputs)
        for part in chunks(len(self.ids)):
            eps = torch.stack([sample_noise(shape, SEED, one, level.key, 0) for one in self.ids[part]])
            scales = (torch.full((len(eps),), value) for value in (level.signal, level.noise))
            noised[part] = mix(self.inputs[part], eps, *scales)
        return replace(self, inputs=noised)


def chunks(count: int) -> Iterator[slice]:
    """Cuts `count` samples into slices."""
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def from_images(
    data: DataConfig,
    splits: tuple[str, str],
    limit: int,
    codec: Codec,
    encoder: TargetEncoder | None,
    device: torch.device,
) -> list[Samples]:
    """Reads samples of two splits of a set of images.

    Args:
        data: The images; its own `splits` count for nothing.
        splits: Names of the two.
        limit: Most samples of each.
        codec: Turns images into the network's inputs.
        encoder: Whose features are `targets`.
        device: Where codec and encoder are.

    Raises:
        ConfigError: A split is missing, images differ in size, or the codec does not take images.
    """
    if codec.image_channels not in (1, 3):
        raise ConfigError(
            f"the network takes latents of {codec.image_channels} channels, and watch.data holds images; give "
            "watch.codec, the autoencoder of the latents"
        )
    try:
        images = open_images(data.model_copy(update={"splits": splits}), codec.image_channels)
    except UnknownNameError as error:
        raise ConfigError(f"watch.train_split and watch.test_split: {error}") from error
    return [_encoded(images, choose(images.splits[name], limit), codec, encoder, device) for name in splits]


def from_store(data: TrainingSet, splits: tuple[str, str], limit: int, stored: str | None) -> list[Samples]:
    """Reads samples of two splits of the store that a run is trained on.

    Args:
        data: With a store, and the one that holds its targets.
        splits: Names of the two.
        limit: Most samples of each.
        stored: Name of the targets that are `targets`.

    Raises:
        ConfigError: A split is missing.
        UnknownNameError: The targets are missing.
    """
    store, found = data.store, []
    wanted = None if stored is None else find_targets(data.target_store, stored, "targets in watch.stored")
    for key, name in zip(("train_split", "test_split"), splits, strict=True):
        if name not in store.splits:
            raise ConfigError(
                f"watch.{key} is {name!r} and the store {store.path} has the splits {', '.join(store.splits)}; name "
                "one of them, or give watch.data"
            )
        rows = choose(store.rows(name), limit)
        inputs = _taken(store, data.kind, rows, lambda part: part)
        mode = inputs.chunk(2, dim=1)[0].contiguous() if data.kind == "moments" else inputs
        targets = None if wanted is None else _taken(data.target_store, wanted, rows, averaged)
        single = store.labels is not None and store.labels.ndim == 1
        labels = torch.from_numpy(store.labels[rows]) if single else None
        found.append(Samples([store.ids[row] for row in rows], labels, mode, targets))
    return found


def averaged(maps: torch.Tensor) -> torch.Tensor:
    """Returns maps (B, C, h, w) as their means over positions, (B, C) in fp32."""
    return maps.float().mean((2, 3))


def choose(rows: np.ndarray | range, limit: int) -> np.ndarray:
    """Draws at most `limit` of the rows, always the same ones, in ascending order."""
    rows = np.asarray(rows, dtype=np.int64)
    if len(rows) <= limit:
        return rows
    return rows[np.sort(np.random.default_rng(SEED).permutation(len(rows))[:limit])]


def _encoded(
    images: ImageSet, rows: np.ndarray, codec: Codec, encoder: TargetEncoder | None, device: torch.device
) -> Samples:
    inputs, targets, shapes = [], [], set()
    for part in chunks(len(rows)):
        read = [images[int(row)] for row in rows[part]]
        shapes |= {tuple(one.shape[1:]) for one in read}
        if len(shapes) > 1:
            raise ConfigError(
                f"the images to measure on differ in size, {sorted(shapes)[:2]}; give data.size, or watch.data.size"
            )
        pixels = torch.stack(read).to(device)
        with torch.no_grad():
            inputs.append(codec.encode(pixels).mean.float().cpu())
        if encoder is not None:
            targets.append(averaged(encoder(pixels)).cpu())
    single = images.labelled and not images.multilabel
    labels = torch.tensor([images.label(int(row)) for row in rows]) if single else None
    return Samples(
        [images.id(int(row)) for row in rows], labels, torch.cat(inputs), torch.cat(targets) if targets else None
    )


def _taken(
    store: FeatureStore, layer: str, rows: np.ndarray, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    return torch.cat([change(take(store, layer, rows[part]).float()) for part in chunks(len(rows))])
