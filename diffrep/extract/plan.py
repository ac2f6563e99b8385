"""From a request to the least work that gives it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from diffrep.config import FeatureRequest
from diffrep.errors import ConfigError, LayerError
from diffrep.noise import Level, LevelTable
from diffrep.taps import Address

if TYPE_CHECKING:
    from diffrep.backbones import Backbone
    from diffrep.backbones.conditioning import Condition

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Plan:
    """The work for one image; everything else is a multiple of it.

    Attributes:
        addresses: What is read, by the name under which it is stored.
        aliases: Names in the request that stand for one of these addresses.
        levels: The levels.
        draws: Forward passes per level, by key: the request's draws, or 1 where all draws would be equal.
        shapes: Shape of one sample's feature, by layer.
        costs: FLOPs of one forward that stops after a layer, over those of the whole network.
        network_flops: FLOPs of one forward of the whole network.
        encode_flops: FLOPs of encoding one image.
        forward_flops: FLOPs of one truncated forward.
        dtype: Element type of the stored features.
    """

    addresses: dict[str, Address]
    aliases: dict[str, str]
    levels: LevelTable
    draws: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    costs: dict[str, float]
    network_flops: int
    encode_flops: int
    forward_flops: int
    dtype: str

    @property
    def forwards(self) -> int:
        """Forward passes per image."""
        return sum(self.draws.values())

    @property
    def flops(self) -> int:
        """FLOPs per image."""
        return self.encode_flops + self.forwards * self.forward_flops

    @property
    def bytes(self) -> int:
        """Bytes of features per image."""
        return sum(prod(shape) for shape in self.shapes.values()) * BYTES[self.dtype] * len(self.draws)

    def text(self, images: int = 1) -> str:
        """Returns the plan for a number of images, in lines."""
        levels = ", ".join(f"{key} (sigma {level.sigma:.3g})" for key, level in self.levels.levels.items())
        lines = [
            f"images    {images:,}",
            f"layers    {len(self.addresses)}: {', '.join(self.addresses)}",
            f"levels    {len(self.draws)}: {levels}",
            f"forwards  {self.forwards * images:,} ({self.forwards} an image)",
            f"FLOPs     {scaled(self.flops * images)} ({scaled(self.flops)} an image, "
            f"{self.encode_flops / self.flops:.0%} of it encoding)",
            f"bytes     {scaled(self.bytes * images)}B of features ({scaled(self.bytes)}B an image)",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def make_plan(
    backbone: Backbone, request: FeatureRequest, height: int, width: int, condition: Condition | None = None
) -> Plan:
    """Plans a request for images of (height, width) pixels.

    Args:
        backbone: The frozen network.
        request: What is wanted.
        height: Of the images.
        width: Of the images.
        condition: As `Backbone.condition` gives it; a prompt's length decides costs and attention maps. None takes the
            network's native length.

    Raises:
        LayerError: A layer does not exist.
        ConfigError: A level is outside the schedule, or the request's parts do not go together.
    """
    if request.tokens and isinstance(request.pool, int):
        raise ConfigError(f"pool={request.pool} makes a grid of a map; with tokens=True use pool 'none' or 'mean'")
    addresses = backbone.addresses(request.layers)
    expanded = {layer: list(backbone.addresses([layer])) for layer in request.layers}
    aliases = {layer: names[0] for layer, names in expanded.items() if len(names) == 1 and names != [layer]}
    levels = LevelTable((spec, backbone.schedule.level(spec)) for spec in request.levels)
    varied = request.posterior == "sample" and backbone.codec.random
    draws = {key: request.draws if varied or _is_noised(level, request) else 1 for key, level in levels.levels.items()}
    latent = backbone.codec.latent_size(height, width)
    try:
        maps = backbone.shapes(addresses, *latent, tokens=request.tokens, condition=condition)
        flops, total = backbone.flops(addresses, *latent, condition)
    except (RuntimeError, ValueError) as error:
        native = backbone.image_size
        raise ConfigError(
            f"{backbone.name} cannot run on images of {height}x{width} pixels ({error}); its native size is "
            f"{native}x{native}, which data.size={native} brings them to"
        ) from error
    flat = [name for name, shape in maps.items() if len(shape) < 2]
    if flat:
        raise LayerError(f"layer {flat[0]!r} gives one vector for each sample, {maps[flat[0]]}, and no tokens or map")
    return Plan(
        addresses,
        aliases,
        levels,
        draws,
        {name: pooled_shape(shape, request.pool) for name, shape in maps.items()},
        {name: count / total for name, count in flops.items()},
        total,
        backbone.encode_flops(height, width),
        max(flops.values()),
        request.dtype,
    )


def pooled_shape(shape: tuple[int, ...], pool: str | int) -> tuple[int, ...]:
    """Returns the shape of a feature after pooling: maps are (C, H, W), tokens (N, C)."""
    if pool == "none":
        return shape
    if len(shape) == 2:
        return shape[1:]
    if pool == "mean":
        return shape[:1]
    return (shape[0], min(pool, shape[1]), min(pool, shape[2]))


def scaled(number: float) -> str:
    """Writes a number with three digits and a unit prefix: 1.23 G."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} E"


def _is_noised(level: Level, request: FeatureRequest) -> bool:
    return level.noise > 0 and request.noise == "gaussian"
