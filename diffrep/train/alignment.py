"""Alignment terms: features of a network in training, drawn to a target (Yu et al., 2025, and what followed)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from diffrep.backbones import Backbone
from diffrep.backbones.prepare import check_name
from diffrep.config import AlignConfig
from diffrep.errors import ConfigError
from diffrep.train.distances import contrastive, cosine, dispersive, manifold, resized, smooth_l1, standardised

# Blocks of a transformer -> after how many of them REPA reads the stream: sizes S and B; L; XL.
REPA_DEPTHS = {12: 4, 24: 8, 28: 8}
# The same for SRA's target (Jiang et al., 2025).
SRA_DEPTHS = {28: 20}


class AlignmentTerm:
    """One term of the loss: layers of the student, each with a projector, and their distance from a target.

    A layer's features are projected, the target is transformed on its own grid, one of the two is resized where grids
    differ, and the distance is taken in fp32. The term is the mean over layers times a coefficient. It holds no
    weights: `projectors` returns those of a new run, which belong to the module that is trained.

    Args:
        name: As in the config.
        config: What is aligned and how.
        layers: Canonical addresses of the student's layers.
        target_channels: Channels of the target, one number or one for each layer; None without a target.

    Raises:
        ConfigError: The name cannot name a term, the numbers of layers and targets differ, or transform and distance
            cancel each other.
    """

    def __init__(
        self, name: str, config: AlignConfig, layers: Sequence[str], target_channels: Sequence[int] | int | None = None
    ):
        check_name("align", name)
        self.name, self.config, self.layers = name, config, list(layers)
        each = [target_channels] * len(layers) if isinstance(target_channels, int) else list(target_channels or ())
        if len(each) != (0 if config.target == "none" else len(layers)):
            raise ConfigError(
                f"align.{name}: {len(layers)} layers with target {config.target!r} and {len(each)} targets; "
                "give one target for each layer"
            )
        if config.distance == "contrastive" and config.transform == "spatial" and config.alpha == 1:
            raise ConfigError(
                f"align.{name}: distance 'contrastive' compares means over positions, and transform 'spatial' with "
                "alpha 1 takes them away; give a smaller alpha, or transform: none"
            )
        self.target_channels = dict(zip(self.layers, each, strict=False))

    def projectors(self, channels: Mapping[str, int]) -> nn.ModuleDict:
        """Returns a new projector for each layer, in the order of `layers`; each maps (B, C, h, w) to (B, D, h, w).

        An MLP's keys are those of REPA's projectors: "0.weight", "2.weight", "4.weight" and so on. The name of a layer
        in the dict is its address with slashes for dots, "blocks/3".

        Args:
            channels: Channels of the student's layers.

        Raises:
            ConfigError: There is no projector, and the channels of student and target differ.
        """
        made = {layer: self._projector(layer, channels[layer]) for layer in self.layers}
        return nn.ModuleDict({layer.replace(".", "/"): projector for layer, projector in made.items()})

    def active(self, step: int) -> bool:
        """Returns whether the term is still on when `step` steps are done; else no targets are needed: see `idle`."""
        return self.config.stop is None or step < self.config.stop

    def weight(self, step: int) -> float:
        """Returns the coefficient of the step that follows on `step` done ones."""
        if not self.active(step):
            return 0.0
        if self.config.decay == "none":
            return self.config.weight
        left = 1 - step / self.config.stop
        return self.config.weight * (left if self.config.decay == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def losses(
        self, projected: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns the distance of each layer, a scalar in fp32, also under autocast.

        Args:
            projected: What the projectors made of the student's layers, (B, D, h, w) each.
            targets: Of each of the student's layers its target, (B, D, h', w'); None for `target: none`.
        """
        with torch.autocast(next(iter(projected.values())).device.type, enabled=False):
            return {
                layer: self._distance(projected[layer].float(), None if targets is None else targets[layer].float())
                for layer in self.layers
            }

    def total(self, losses: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        """Returns what the term adds to the loss: the mean over layers times the coefficient."""
        return self.weight(step) * torch.stack([*losses.values()]).mean()

    def idle(self, projected: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns what the term adds once it is off: a zero that depends on the projectors.

        Without it DDP would wait for gradients of weights that took no part.
        """
        return sum(0 * features.float().sum() for features in projected.values())

    def _projector(self, layer: str, channels: int) -> nn.Module:
        config, wanted = self.config, self.target_channels.get(layer, channels)
        if config.projector == "mlp":
            return PositionMLP([channels, *[config.width] * (config.projector_depth - 1), wanted])
        if config.projector == "conv":
            return nn.Conv2d(channels, wanted, 3, padding=1)
        if channels != wanted and config.distance != "manifold":
            raise ConfigError(
                f"align.{self.name}: layer {layer!r} has {channels} channels and its target {wanted}; "
                "projector: none cannot change that, use mlp or conv"
            )
        return nn.Identity()

    def _distance(self, found: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        if config.distance == "dispersive":
            return dispersive(found, config.temperature)
        if config.transform == "spatial":
            wanted = standardised(wanted, config.alpha)
        if config.distance == "contrastive":
            return contrastive(found, wanted, config.temperature)
        if config.resize == "target":
            wanted = resized(wanted, found.shape[-2:])
        else:
            found = resized(found, wanted.shape[-2:])
        if config.distance == "smooth_l1":
            return smooth_l1(found, wanted, config.beta)
        return (cosine if config.distance == "cosine" else manifold)(found, wanted)


class PositionMLP(nn.Sequential):
    """Linear layers with SiLU between, applied to each position of a map: REPA's projector.

    Args:
        widths: Channels before the first layer, between layers, and after the last.
    """

    def __init__(self, widths: Sequence[int]):
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.SiLU()]
        super().__init__(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, h, w) to (B, D, h, w)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def default_layers(backbone: Backbone) -> list[str]:
    """Returns the layer that is aligned where none is named.

    Of transformers it is the stream after 4 blocks for sizes S and B (12 blocks) and after 8 for L and XL (24 and 28),
    as in REPA, and after 0.3 of the blocks for others. Of U-Nets it is the middle block, as in U-REPA (Tian et al.,
    2025), or the encoder's last one in EDM's networks, which have none.

    Raises:
        ConfigError: The network has no such block.
    """
    if backbone.patch_size is not None:
        return [_after(backbone, REPA_DEPTHS, 0.3)]
    return [_middle(backbone)]


def default_ema_layers(backbone: Backbone, layers: Sequence[str] = ()) -> list[str]:
    """Returns the layers of the averaged network that are targets where none is named.

    Of transformers it is one for all: the stream after 20 of 28 blocks as in SRA (Jiang et al., 2025), and after two
    thirds of the blocks for others. Of U-Nets it is the student's own layers.

    Args:
        backbone: The network.
        layers: The student's layers; none stands for those of `default_layers`.

    Raises:
        ConfigError: A U-Net has no middle block and no layers are given.
    """
    if backbone.patch_size is not None:
        return [_after(backbone, SRA_DEPTHS, 2 / 3)]
    return list(layers) or [_middle(backbone)]


def _after(backbone: Backbone, published: Mapping[int, int], share: float) -> str:
    blocks = backbone.blocks()
    return blocks[published.get(len(blocks), max(1, round(share * len(blocks)))) - 1]


def _middle(backbone: Backbone) -> str:
    blocks = backbone.blocks()
    for name in ("mid_block", "middle_block"):
        if name in blocks:
            return name
    encoder = [name for name in blocks if name.startswith("enc.")]
    if not encoder:
        raise ConfigError(
            f"{type(backbone.network).__name__} has no middle block to align; name the student's layers: "
            f"{', '.join(blocks[:6])}{', ...' if len(blocks) > 6 else ''}"
        )
    return encoder[-1]
