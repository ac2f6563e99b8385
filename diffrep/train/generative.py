"""Training of a diffusion model, with representation alignment (Yu et al., 2025) or without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from diffrep.backbones import Backbone, folders
from diffrep.backbones.codec import Codec, VAECodec
from diffrep.backbones.conditioning import ClassLabels, Condition, OneHotLabels
from diffrep.backbones.encoders import TargetEncoder, open_encoder
from diffrep.backbones.fresh import with_network
from diffrep.backbones.saving import options_of, save_backbone
from diffrep.backbones.sources import find
from diffrep.config import TrainConfig
from diffrep.errors import ConfigError
from diffrep.store.layout import write_json
from diffrep.taps import to_meta
from diffrep.train.alignment import AlignmentTerm, default_ema_layers, default_layers
from diffrep.train.average import Average
from diffrep.train.data import TrainingSet, check_targets
from diffrep.train.log import Stopwatch
from diffrep.train.model import open_model
from diffrep.train.module import AlignedModel, recompute
from diffrep.train.objective import Batch, Loss, Objective
from diffrep.train.order import StepRandom
from diffrep.train.prediction import Mixture, build_loss

PROJECTORS = "projectors.safetensors"
# What the constructor's argument for the number of classes is called, where it is not num_classes.
CLASSES = {"edm": "label_dim", "UNet2DModel": "num_class_embeds"}


class Generative(Objective):
    """A diffusion model's loss, and alignment terms.

    Args:
        config: The run.
        device: Where it is trained.

    Attributes:
        template: The model as a backbone on the meta device: how it is called, and what it is saved as.
        codec: From images to what the network is trained on.
        terms: The alignment terms, from `attach` on.

    Raises:
        ConfigError: Network, objective and codec do not go together.
        UnknownNameError: There is no such network or encoder.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.template, self._network, objective = open_model(config.model, config.objective, device)
        self.prediction = build_loss(objective, self.template.schedule)
        self.codec = self.template.codec if config.codec is None else _codec(config.codec, self.template, device)
        if config.data is not None and self.codec.image_channels not in (1, 3):
            raise ConfigError(
                f"the network takes {self.template.in_channels} channels, and images have 1 or 3; give codec, the "
                "folder of an autoencoder, or store, which holds its latents"
            )
        if isinstance(self.codec, VAECodec):
            self.template.codec = self.codec  # saved beside the network
        options_of(self.template)  # which fails now, or else after the training
        half = config.mixed_precision != "no" and device.type == "cuda"
        dtype = torch.bfloat16 if half else torch.float32
        self.encoders: dict[str, TargetEncoder] = {
            name: open_encoder(term.encoder, device, dtype)
            for name, term in config.align.items()
            if term.encoder is not None and term.stored is None
        }
        self.terms: list[AlignmentTerm] = []
        self._taught: dict[str, list[str]] = {}  # of terms whose target is the average: its layers
        self._labelled = False
        self._kind, self._shape = "image", (0, 0, 0)
        self._made_by: dict[str, Any] | None = None  # the codec of a store's latents
        self._teacher: Backbone | None = None
        # What is trained besides the network, a copy of it without data, and its average.
        self._projectors = self._form = self._averaged = nn.ModuleDict()
        self._watch = Stopwatch(device)

    @property
    def image_channels(self) -> int:
        """Channels of the images that it is trained on."""
        return self.codec.image_channels

    @property
    def flops(self) -> int:
        """FLOPs of the network's forward on one sample, projectors not counted."""
        return self.template.flops({}, *self._shape[1:])[1]

    @property
    def teacher_watch(self) -> Stopwatch | None:
        """Times the targets of a step; None without alignment terms."""
        return self._watch if self.config.align else None

    @property
    def classes(self) -> int | None:
        """Number of classes, without "no class"; None for unconditional networks."""
        conditioner = self.template.conditioner
        if isinstance(conditioner, ClassLabels):
            return conditioner.rows - (conditioner.null is not None)
        return conditioner.classes if isinstance(conditioner, OneHotLabels) else None

    @property
    def layers(self) -> list[str]:
        """Addresses of the aligned layers."""
        return list(dict.fromkeys(layer for term in self.terms for layer in term.layers))

    def attach(self, data: TrainingSet) -> None:
        """Checks sizes, labels and targets, and sets up the terms.

        Raises:
            ConfigError: The data do not fit the network.
            LayerError: A term names a layer that does not exist.
        """
        self._kind, self._shape = data.kind, self._inside(data)
        if self._shape[0] != self.template.in_channels:
            raise ConfigError(
                f"the network takes {self.template.in_channels} channels, and the data have {self._shape[0]}"
            )
        self.template._check_sides(*self._shape[1:])
        side = self.template.sample_size
        if self.config.model.source is None and self._shape[1:] != (side, side):
            # A checkpoint's positions are rescaled; a new network would be opened and sampled at the wrong size.
            raise ConfigError(
                f"the network is made for {side} x {side} and the data are {self._shape[1]} x {self._shape[2]}; give "
                "the network's args that size, or data.size"
            )
        self._check_labels(data)
        self._made_by = None if data.store is None else data.store.meta["backbone"]["codec"]
        for name, term in self.config.align.items():
            layers = list(self.template.addresses(term.layers or default_layers(self.template)))
            wanted: Any = None
            if term.target == "ema":
                taught = list(self.template.addresses(term.ema_layers or default_ema_layers(self.template, layers)))
                if len(taught) not in (1, len(layers)):
                    raise ConfigError(
                        f"align.{name}: {len(layers)} layers and {len(taught)} ema_layers; give one for each, or one"
                    )
                self._taught[name] = taught * (len(layers) // len(taught))
                wanted = list(self._channels(self._taught[name]).values())
            elif term.target == "encoder":
                if name in self.encoders:
                    self.encoders[name].input_size(*data.shape[1:])  # which fails now, or else in the first step
                if term.encoder is not None and term.stored is not None:
                    check_targets(data.target_store, term.stored, term.encoder)
                wanted = self.encoders[name].channels if name in self.encoders else data.target_channels[term.stored]
            self.terms.append(AlignmentTerm(name, term, layers, wanted))

    def module(self) -> AlignedModel:
        """Returns the network with new projectors."""
        projectors = {term.name: term.projectors(self._channels(term.layers)) for term in self.terms}
        model = AlignedModel(self._network, self.template, projectors, {term.name: term.layers for term in self.terms})
        if self.config.checkpointing:
            recompute(self._network, self.template.blocks())
        if self.template.convolutional and self.device.type == "cuda":
            self._network.to(memory_format=torch.channels_last)
        self._projectors, self._form = model.projectors, to_meta(model.projectors)
        return model

    def follow(self, average: Average) -> None:
        """Opens the averaged weights as a backbone: the target of terms that are taught by them, and the result."""
        self._teacher = with_network(self.template, average.twin(self.template.network, self._network, "network."))
        self._teacher.codec = self.codec
        self._averaged = average.twin(self._form, self._projectors, "projectors.")

    @property
    def averaged(self) -> Backbone:
        """The model with the averaged weights, which move with each step; from `follow` on."""
        assert self._teacher is not None
        return self._teacher

    def draw(self, shape: tuple[int, ...], rng: StepRandom) -> tuple[Any, ...]:
        """Draws levels, noise, and what else is needed.

        Returns:
            A `Mixture`, noise (B, C, h, w), which labels are dropped (B,), how much nearer to the data the averaged
            weights see each sample, of each term that they teach (B,), and noise for the posterior (B, C, h, w) where
            it has a spread.
        """
        count = shape[0]
        mixture = self.prediction.draw(count, rng)
        eps = rng.noise(count, *self._shape)
        dropped = torch.from_numpy(rng.uniform(count) < self.config.label_dropout)
        nearer = [
            self.prediction.nearer(mixture, term.config.max_gap * rng.uniform(count))
            for term in self.terms
            if term.config.target == "ema"
        ]
        random = self._kind == "moments" or (self._kind == "image" and self.codec.random)
        spread = [rng.noise(count, *self._shape)] if random else []
        return (mixture, eps, dropped, *nearer, *spread)

    @torch.no_grad()
    def inputs(self, batch: Batch, drawn: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns clean inputs of the network, noise, mixtures, condition, and what targets are made of."""
        mixture, eps, dropped, *rest = drawn
        nearer, spread = rest[: len(self._taught)], rest[len(self._taught) :]
        clean = batch.clean
        if self._kind == "moments":
            mean, std = clean.float().chunk(2, dim=1)
            clean = mean + std * spread[0]
        elif self._kind == "image":
            posterior = self.codec.encode(clean)
            clean = posterior.mean.float()
            if spread:
                clean = clean + posterior.std.float() * spread[0]
        cond = self._condition(batch.tensors.get("label"), dropped)
        return clean.float(), eps, mixture, nearer, cond, batch

    def loss(
        self,
        model: nn.Module,
        step: int,
        clean: torch.Tensor,
        eps: torch.Tensor,
        mixture: Mixture,
        nearer: list[Mixture],
        cond: Condition,
        batch: Batch,
    ) -> Loss:
        """Returns the loss of the prediction, averaged over samples, and the terms added to it.

        Args:
            model: Called as an `AlignedModel` is.
            step: Steps that are done; it decides the terms' coefficients.
            clean: (B, C, h, w).
            eps: Noise (B, C, h, w).
            mixture: How both are mixed, and what of them is predicted.
            nearer: The same at less noise, for each term that the averaged weights teach.
            cond: A row for each sample.
            batch: Images and stored targets.
        """
        with self._watch:
            targets = self._targets(step, clean, eps, nearer, cond, batch)
        output, projected = model(self.prediction.noised(mixture, clean, eps), mixture.time, cond)
        values = self.prediction.losses(mixture, clean, eps, output)
        total = values.mean()
        parts = {"denoise": total.detach()}
        for term in self.terms:
            if term.active(step):
                losses = term.losses(projected[term.name], targets.get(term.name))
                parts |= {f"align/{term.name}/{layer}": loss.detach() for layer, loss in losses.items()}
                total = total + term.total(losses, step)
            else:
                total = total + term.idle(projected[term.name])
        return Loss(total, parts, mixture.place, values.detach())

    @torch.no_grad()
    def _targets(
        self,
        step: int,
        clean: torch.Tensor,
        eps: torch.Tensor,
        nearer: list[Mixture],
        cond: Condition,
        batch: Batch,
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Returns the targets of the terms that are on, by layer: maps (B, D, h, w)."""
        found = {}
        mixtures = iter(nearer)
        for term in self.terms:
            config = term.config
            mixture = next(mixtures) if config.target == "ema" else None
            if not term.active(step) or config.target == "none":
                continue
            if mixture is not None:
                taught = self._taught[term.name]
                noised = self.prediction.noised(mixture, clean, eps)
                features = self.averaged.capture(noised, mixture.time, taught, cond)
                found[term.name] = {layer: features[own] for layer, own in zip(term.layers, taught, strict=True)}
                continue
            if term.name in self.encoders:
                target = self.encoders[term.name](batch.tensors["image"])
            else:
                target = batch.tensors[f"targets.{config.stored}"]
            found[term.name] = dict.fromkeys(term.layers, target)
        return found

    def facts(self, module: AlignedModel) -> dict[str, Any]:
        """Returns what made the latents; `load_backbone` must be told where it does not lie beside the model."""
        return {"codec": self._made_by or self.codec.describe()}

    def export(self, module: AlignedModel, target: Path, dtype: torch.dtype) -> None:
        """Writes the averaged network as a backbone, with its schedule, and codec and projectors beside it."""
        network = copy.deepcopy(self.averaged.network)  # the average itself stays in fp32
        # Past diffusers' own `to`, which warns of modules to keep in fp32 even when there are none.
        save_backbone(self.template, nn.Module.to(network, dtype), target)
        if self.terms:
            state = {name: weight.contiguous() for name, weight in self._averaged.state_dict().items()}
            if state:
                save_file(state, target / PROJECTORS)
            write_json(target / "alignment.json", {term.name: term.layers for term in self.terms})

    def _condition(self, labels: torch.Tensor | None, dropped: torch.Tensor) -> Condition:
        """Returns the condition of each sample, "no class" for dropped labels."""
        conditioner = self.template.conditioner
        if self.classes is None:
            return {}
        if not self._labelled:
            rows = self.template.conditioner(None, len(dropped), self.device)
            return {name: row.expand(len(dropped), *row.shape[1:]) for name, row in rows.items()}
        if isinstance(conditioner, OneHotLabels):
            hot = torch.nn.functional.one_hot(labels, conditioner.classes).float()
            return {"labels": torch.where(dropped[:, None], 0.0, hot)}
        return {"labels": labels if conditioner.null is None else torch.where(dropped, conditioner.null, labels)}

    def _check_labels(self, data: TrainingSet) -> None:
        if self.classes is None:
            return
        null = not isinstance(self.template.conditioner, ClassLabels) or self.template.conditioner.null is not None
        self._labelled = data.labelled
        if not data.labelled:
            if not null:
                raise ConfigError("the network needs a class for each image, and the data have no labels")
            return
        new = self.config.model.source is None
        if data.classes > self.classes or (new and data.classes < self.classes):
            raise ConfigError(
                f"the network has {self.classes} classes and the data have {data.classes}; give "
                f"model.args.{CLASSES.get(self.config.model.kind, 'num_classes')}={data.classes}"
            )

    def _inside(self, data: TrainingSet) -> tuple[int, int, int]:
        """Returns the shape (C, h, w) of what the network is trained on."""
        channels, height, width = data.shape
        if data.kind == "moments":
            return channels // 2, height, width
        if data.kind == "image":
            return (self.codec.latent_channels, *self.codec.latent_size(height, width))
        return channels, height, width

    def _channels(self, layers: list[str]) -> dict[str, int]:
        """Returns the channels of layers."""
        shapes = self.template.shapes(self.template.addresses(tuple(layers)), *self._shape[1:])
        return {name: shapes[name][0] for name in layers}


def _codec(given: str, template: Backbone, device: torch.device) -> Codec:
    """Opens an autoencoder for a model."""
    codec = folders.load_codec(find(given, None, with_weights=True), device, torch.float32)
    if codec.latent_channels != template.in_channels:
        raise ConfigError(
            f"the codec {given} gives {codec.latent_channels} channels, and the network takes {template.in_channels}"
        )
    codec.module().requires_grad_(False).eval()
    return codec
