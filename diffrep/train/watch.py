"""What is measured of the averaged weights while a model is trained: probe, alignment, Frechet distance, samples."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from diffrep.backbones import Backbone
from diffrep.backbones.encoders import open_encoder
from diffrep.backbones.folders import load_codec
from diffrep.backbones.sources import find
from diffrep.config import EncoderConfig, TrainConfig, WatchConfig
from diffrep.errors import ConfigError, DataError, DiffrepError
from diffrep.metrics import (
    FeatureStatistics,
    accuracy,
    chance,
    cka,
    cknna,
    frechet_distance,
    mutual_knn,
    prepare,
)
from diffrep.probe.logistic import LogisticPath
from diffrep.probe.split import stratified_split
from diffrep.store.layout import write_whole
from diffrep.train.data import TrainingSet, check_targets
from diffrep.train.sample import count_classes, make_images, makes_images, write_grid
from diffrep.train.sampler import levels_of, null_condition
from diffrep.train.watch_data import SEED, Samples, averaged, chunks, from_images, from_store

Line = dict[str, float | None]
FILE = "watch.jsonl"
SIGMA = 0.1  # noise over signal that layers are read at
# Strong penalties first: of equal ones the first is taken.
PENALTIES = (1e-1, 3e-2, 1e-2, 1e-3)
HELD = 0.2  # share of the training samples that the penalty is chosen on


class Watch:
    """Measures a model in training, always on the same samples with the same noise.

    What does not change with the weights is read once, here: the samples of both splits, the encoder's features, the
    statistics of the reference images. The same weights give the same numbers.

    Layers are read at one noise level, without a class, and averaged over positions. "probe/LAYER" is the test split's
    accuracy of `linear_probe`. "cknna/LAYER", "cka/LAYER" and "mutual_knn/LAYER" compare the test split with the
    encoder's features, averaged over positions too; "cknna/chance" is CKNNA of the first layer with its rows shuffled.
    CKNNA is None where it is not defined. "frechet" is the Frechet distance between `samples` generated images, which
    are those of `diffrep sample` with seed 0, and the chosen images of both splits (at most 2 x `limit`), in the
    encoder's averaged features. Few images on either side make it too large, more so for wide features: compare values
    of the same counts only.

    Args:
        config: What to measure.
        train: The run's config, for what `config` leaves open.
        backbone: The model in training as a frozen backbone: its network holds the averaged weights, its codec is the
            model's own.
        aligned: Layers of the alignment terms.
        data: What the run is trained on.
        device: Where to measure.
        run: The run folder.

    Attributes:
        layers: Addresses that are read.
        level: Noise level that they are read at.

    Raises:
        LayerError: A layer does not exist or gives no map.
        ConfigError: A split, its labels, the encoder or the codec are missing or do not fit, or there are too few
            samples.
    """

    def __init__(
        self,
        config: WatchConfig,
        train: TrainConfig,
        backbone: Backbone,
        aligned: list[str],
        data: TrainingSet,
        device: torch.device,
        run: Path,
    ):
        self.config, self.device, self.run = config, device, run
        self.backbone = backbone if config.codec is None else _with_codec(backbone, config.codec, device)
        self.layers = list(backbone.addresses(config.layers or aligned or ("blocks",)))
        schedule = backbone.schedule
        self.level = schedule.at_sigma(SIGMA) if config.level is None else schedule.level(config.level)
        from_data = config.data or train.data
        encoder, stored = _compared(config, train, in_store=from_data is None)
        self._check_asked(encoder, stored)
        opened = None if encoder is None else open_encoder(encoder, device)
        splits = (config.train_split, config.test_split)
        if from_data is None:
            if stored is not None and encoder is not None:
                check_targets(data.target_store, stored, encoder)
            samples = from_store(data, splits, config.limit, stored)
        else:
            samples = from_images(from_data, splits, config.limit, self.backbone.codec, opened, device)
        self._check_samples(samples)
        # Large, and of no use any more where no images are made.
        self.encoder = opened if config.samples else None
        self.reference = _statistics(torch.cat([one.targets for one in samples])) if config.samples else None
        self.train, self.test = (one.noised(self.level) for one in samples)
        self._read(self.test, 1)

    def measured(self, step: int) -> bool:
        """Whether `watch.jsonl` has a line of a step."""
        return any(line["step"] == step for line in read_lines(self.run / FILE))

    def measure(self, step: int) -> Line:
        """Measures the weights as they are, writes a line of `watch.jsonl`, and the grid to `samples/`.

        Lines of this and of later steps, as of a run that was set back to an older checkpoint, are replaced.

        Args:
            step: Steps that are done.

        Returns:
            The line: "step", "seconds" that it took, and the numbers.

        Raises:
            DiffrepError: Features or images are not finite.
        """
        began = time.perf_counter()
        line: Line = {"step": step}
        test = self._read(self.test)
        if self.config.probe:
            train = self._read(self.train)
            for layer in self.layers:
                given = (train[layer], self.train.labels, test[layer], self.test.labels)
                line[f"probe/{layer}"] = linear_probe(*(one.to(self.device) for one in given))
        if self.test.targets is not None:
            line |= self._alignment(test)
        line |= self._generated(step)
        line["seconds"] = time.perf_counter() - began
        kept = [one for one in read_lines(self.run / FILE) if one["step"] < step]
        write_whole(self.run / FILE, "".join(json.dumps(one) + "\n" for one in [*kept, line]).encode())
        return line

    # What is measured ---------------------------------------------------------------------------------------------

    def _read(self, samples: Samples, count: int | None = None) -> dict[str, torch.Tensor]:
        """Returns the features of the first `count` samples by layer, averaged over positions, (N, C) fp32."""
        found: dict[str, list[torch.Tensor]] = {layer: [] for layer in self.layers}
        for part in chunks(count or len(samples.ids)):
            maps = self.backbone.capture(samples.inputs[part].to(self.device), self.level.time, self.layers)
            for layer, feature in maps.items():
                found[layer].append(averaged(feature))
        features = {layer: torch.cat(parts) for layer, parts in found.items()}
        for layer, feature in features.items():
            if not torch.isfinite(feature).all():
                raise DiffrepError(f"the averaged weights give NaN or infinity in layer {layer!r}; lower lr")
        return features

    def _alignment(self, test: dict[str, torch.Tensor]) -> Line:
        targets = prepare(self.test.targets.to(self.device))
        features = {layer: prepare(feature) for layer, feature in test.items()}
        found: Line = {}
        for layer, mine in features.items():
            found |= {
                f"cknna/{layer}": self._cknna(cknna, mine, targets),
                f"cka/{layer}": cka(mine, targets),
                f"mutual_knn/{layer}": mutual_knn(mine, targets, k=self.config.neighbours),
            }
        found["cknna/chance"] = self._cknna(partial(chance, cknna, seed=SEED), features[self.layers[0]], targets)
        return found

    def _cknna(self, metric: Callable[..., float], a: torch.Tensor, b: torch.Tensor) -> float | None:
        try:
            return metric(a, b, k=self.config.neighbours)
        except DataError:
            # Shapes and counts were checked before the run: what is left is a negative HSIC, which has no root.
            return None

    def _generated(self, step: int) -> Line:
        config = self.config
        classes = count_classes(self.backbone)
        shown: list[torch.Tensor] = []
        statistics = None if self.reference is None else FeatureStatistics(len(self.reference.mean), self.device)
        for part in chunks(max(config.samples, config.grid)):
            numbers = range(part.start, part.stop)
            labels = [number % classes for number in numbers] if classes else None
            images = make_images(self.backbone, config.sampler, numbers, labels, SEED)
            shown.append(images[: max(config.grid - part.start, 0)])
            counted = images[: max(config.samples - part.start, 0)]
            if len(counted):
                statistics.add(averaged(self.encoder(counted.to(self.device) / 255)))
        if config.grid:
            write_grid(self.run / "samples" / f"step-{step:07d}.png", torch.cat(shown))
        return {} if statistics is None else {"frechet": frechet_distance(statistics, self.reference)}

    # What is checked before a run ---------------------------------------------------------------------------------

    def _check_asked(self, encoder: EncoderConfig | None, stored: str | None) -> None:
        """Checks settings against the network and one another."""
        config, codec = self.config, self.backbone.codec
        if config.train_split == config.test_split:
            raise ConfigError(
                f"watch.train_split and watch.test_split are both {config.test_split!r}; give two splits"
            )
        if not (config.probe or encoder or stored or config.samples or config.grid):
            raise ConfigError("watch measures nothing: set probe, encoder, samples or grid")
        if config.samples == 1 or (config.samples and encoder is None):
            raise ConfigError(
                f"watch.samples={config.samples} and {'an' if encoder else 'no'} encoder: the Frechet distance needs "
                "2 images or more, and watch.encoder for their features; for images to look at set grid"
            )
        try:
            self.backbone.condition(None, 1)
        except ConfigError as error:
            raise ConfigError(
                f"watch reads layers without a class, which {self.backbone.name} cannot do ({error}); leave watch out"
            ) from error
        if not (config.samples or config.grid):
            return
        if not makes_images(codec):
            raise ConfigError(
                f"the network makes latents of {self.backbone.in_channels} channels and there is nothing to decode "
                "them with; give watch.codec, the autoencoder, or set samples and grid to 0"
            )
        levels_of(self.backbone.schedule, config.sampler)
        if config.sampler.guidance != 1:
            null_condition(self.backbone)

    def _check_samples(self, samples: list[Samples]) -> None:
        """Checks the samples of both splits against what is measured of them."""
        config, (train, test) = self.config, samples
        channels = test.inputs.shape[1]
        if channels != self.backbone.in_channels:
            raise ConfigError(
                f"the network takes {self.backbone.in_channels} channels, and the samples have {channels}"
            )
        size, own = tuple(test.inputs.shape[-2:]), (self.backbone.sample_size,) * 2
        self.backbone.shapes(self.backbone.addresses(self.layers), *size)
        if config.samples and size != own:
            raise ConfigError(
                f"watch.samples: the network makes samples of {own[0]} x {own[1]} and is measured on {size[0]} x "
                f"{size[1]}, whose Frechet distance means nothing; give data of its own size, or set samples to 0"
            )
        if config.probe and (train.labels is None or test.labels is None):
            raise ConfigError(
                "watch.probe needs images with one label each; set probe: false, or give other watch.data"
            )
        if config.probe and train.labels.bincount().max() < 2:
            raise ConfigError(
                f"watch.probe learns from {len(train.ids)} samples of split {config.train_split!r}, no two of one "
                "class; raise watch.limit"
            )
        least = max(config.neighbours + 1, 4)
        if test.targets is not None and len(test.ids) < least:
            raise ConfigError(
                f"watch.neighbours={config.neighbours} needs {least} samples or more, and split "
                f"{config.test_split!r} gives {len(test.ids)}; raise limit, or lower neighbours"
            )


def linear_probe(
    features: torch.Tensor, labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor
) -> float:
    """Returns the test accuracy of a linear map of standardised features, in [0, 1].

    The classifier of MAE's and REPA's probe, BatchNorm without affine and a linear layer, fitted to its minimum by
    L-BFGS rather than for some epochs of SGD, so that nothing is random. The L2 penalty is the best of four on a fifth
    of the training samples, stratified; the classifier is then fitted on all of them.

    Args:
        features: Training features (N, D).
        labels: (N,) int64.
        test_features: (M, D).
        test_labels: (M,) int64.
    """
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    kept, held = (torch.from_numpy(rows) for rows in stratified_split(labels.cpu().numpy(), HELD, SEED))
    trial = LogisticPath(PENALTIES).fit(features[kept], labels[kept], classes)
    scores = [accuracy(one.argmax(1), labels[held]) for one in trial.scores(features[held])]
    best = PENALTIES[scores.index(max(scores))]
    fitted = LogisticPath((best,)).fit(features, labels, classes)
    return accuracy(fitted.scores(test_features)[0].argmax(1), test_labels)


def read_lines(file: Path) -> list[Line]:
    """Returns the lines of a `watch.jsonl`; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _compared(config: WatchConfig, train: TrainConfig, in_store: bool) -> tuple[EncoderConfig | None, str | None]:
    """Returns the encoder, and the name of the targets in the store where those are compared with."""
    encoder, stored = config.encoder, config.stored
    if stored is not None and not in_store:
        raise ConfigError(
            f"watch.stored={stored!r} names targets in the store that the run is trained from, and images are "
            "measured on; give watch.encoder"
        )
    terms = list(train.align.values())
    if encoder is None and not in_store:
        encoder = next((term.encoder for term in terms if term.encoder is not None), None)
    if stored is None and in_store:
        stored = next((term.stored for term in terms if term.stored is not None), None)
        if stored is None and encoder is not None:
            raise ConfigError(
                "watch.encoder needs images, and the store has none; give watch.data, or watch.stored (its targets "
                "of this encoder)"
            )
    return encoder, stored


def _with_codec(backbone: Backbone, place: str, device: torch.device) -> Backbone:
    codec = load_codec(find(place, None, with_weights=True), device, torch.float32)
    if codec.latent_channels != backbone.in_channels:
        raise ConfigError(
            f"watch.codec decodes latents of {codec.latent_channels} channels, and the network makes "
            f"{backbone.in_channels}"
        )
    codec.module().requires_grad_(False).eval()
    twin = copy.copy(backbone)
    twin.codec = codec
    return twin


def _statistics(features: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.add(features)
    return statistics
