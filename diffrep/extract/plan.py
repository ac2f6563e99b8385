"""From a request to the least work that gives it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from diffrep.config import FeatureRequest
from diffrep.errors import ConfigError, LayerError
from diffrep.extract.pooling import pooled_shape
from diffrep.noise import Level, LevelTable, Trajectory, read_levels
from diffrep.taps import Address

if TYPE_CHECKING:
    from diffrep.backbones import Backbone
    from diffrep.backbones.conditioning import Condition

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class Leg:
    """What is run of a trajectory.

    Attributes:
        trajectory: The calls.
        wanted: Keys of the levels whose features are read.
        draws: Trajectories per image.
        full: Number of calls, the first ones, that run the whole network and move the state on.
        guided: Whether each of them comes with a call under the null condition.
    """

    trajectory: Trajectory
    wanted: frozenset[str]
    draws: int
    full: int
    guided: bool

    @classmethod
    def of(cls, trajectory: Trajectory, levels: LevelTable, draws: int, whole: bool, guided: bool) -> Leg:
        """Takes the least that reads the trajectory's levels in a table, or the whole way."""
        keys = [level.key for level in trajectory.levels]
        wanted = frozenset(keys).intersection(levels.levels)
        last = max(map(keys.index, wanted))
        return cls(trajectory, wanted, draws, trajectory.updates if whole else last, guided)

    @property
    def calls(self) -> int:
        """Calls with the condition; one that is not full ends after the deepest layer."""
        return max(self.full, max(self.before.values()) + 1)

    @property
    def before(self) -> dict[str, int]:
        """Number of whole calls before that of each level that is wanted, by key."""
        levels = self.trajectory.levels
        return {level.key: place for place, level in enumerate(levels) if level.key in self.wanted}

    @property
    def forwards(self) -> int:
        """Forward passes per image."""
        return self.draws * (self.calls + self.full * self.guided)

    def __str__(self) -> str:
        parts = [f"{self.full} to the end"] if self.full else []
        parts += ["1 to the deepest layer"] if self.calls > self.full else []
        guide = ", and as many under the null condition" if self.guided else ""
        return f"{self.trajectory.name}; calls of the network: {' and '.join(parts)}{guide}"


@dataclass(frozen=True)
class Plan:
    """The work for one image; everything else is a multiple of it.

    Attributes:
        addresses: What is read, by the name under which it is stored.
        aliases: Names in the request that stand for one of these addresses.
        levels: The levels.
        draws: How many features are averaged at each level, by key: the request's draws, or 1 where all draws would be
            equal. Off trajectories each is a forward.
        shapes: Shape of one sample's feature, by layer.
        costs: FLOPs of one forward that stops after a layer, over those of the whole network.
        network_flops: FLOPs of one forward of the whole network.
        encode_flops: FLOPs of encoding one image.
        forward_flops: FLOPs of one truncated forward.
        dtype: Element type of the stored features.
        legs: The trajectories that the levels lie on; none where levels are read one by one.
        guide_flops: FLOPs of one forward under the null condition.
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
    legs: tuple[Leg, ...] = ()
    guide_flops: int = 0

    @property
    def forwards(self) -> int:
        """Forward passes per image."""
        return sum(leg.forwards for leg in self.legs) if self.legs else sum(self.draws.values())

    @property
    def rows(self) -> int:
        """Rows of one batch that an image makes."""
        return max(leg.draws for leg in self.legs) if self.legs else self.forwards

    @property
    def flops(self) -> int:
        """FLOPs per image."""
        if not self.legs:
            return self.encode_flops + self.forwards * self.forward_flops
        whole = self.network_flops + self.guide_flops
        spent = [leg.draws * (leg.full * whole + (leg.calls - leg.full) * self.forward_flops) for leg in self.legs]
        return self.encode_flops + sum(spent)

    @property
    def bytes(self) -> int:
        """Bytes of features per image."""
        return sum(prod(shape) for shape in self.shapes.values()) * BYTES[self.dtype] * len(self.draws)

    def text(self, images: int = 1) -> str:
        """Returns the plan for a number of images, in lines."""
        levels = ", ".join(
            f"{key} ({f't {level.time:.9g}, ' if self.legs else ''}sigma {level.sigma:.3g})"
            for key, level in self.levels.levels.items()
        )
        lines = [
            f"images    {images:,}",
            f"layers    {len(self.addresses)}: {', '.join(self.addresses)}",
            f"levels    {len(self.draws)}: {levels}",
            *(f"path      {leg}" for leg in self.legs),
            f"forwards  {self.forwards * images:,} ({self.forwards} an image)",
            f"FLOPs     {scaled(self.flops * images)} ({scaled(self.flops)} an image, "
            f"{self.encode_flops / max(1, self.flops):.0%} of it encoding)",
            f"bytes     {scaled(self.bytes * images)}B of features ({scaled(self.bytes)}B an image)",
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def make_plan(
    backbone: Backbone,
    request: FeatureRequest,
    height: int,
    width: int,
    condition: Condition | None = None,
    uncond: Condition | None = None,
    whole: bool = False,
) -> Plan:
    """Plans a request for images of (height, width) pixels.

    Args:
        backbone: The frozen network.
        request: What is wanted.
        height: Of the images.
        width: Of the images.
        condition: As `Backbone.condition` gives it; a prompt's length decides costs and attention maps. None takes the
            network's native length.
        uncond: Likewise, of the calls that guidance adds.
        whole: Run trajectories to their end, whatever level is the last one wanted. Generations always are.

    Raises:
        LayerError: A layer does not exist.
        ConfigError: A level is outside the schedule, or the request's parts do not go together.
    """
    _check(request, whole)
    addresses = backbone.addresses(request.layers)
    expanded = {layer: list(backbone.addresses([layer])) for layer in request.layers}
    aliases = {layer: names[0] for layer, names in expanded.items() if len(names) == 1 and names != [layer]}
    found, trajectories = read_levels(backbone.schedule, request.levels, request.noise)
    levels, generated, guided = LevelTable(found), request.noise == "generation", request.guidance != 1
    varied = generated or (request.posterior == "sample" and backbone.codec.random)
    draws = {key: request.draws if varied or _is_noised(level, request) else 1 for key, level in levels.levels.items()}
    shared = request.draws if varied else 1  # by the levels of a trajectory
    legs = tuple(Leg.of(path, levels, shared, whole or generated, guided) for path in trajectories)
    latent = backbone.codec.latent_size(height, width)
    try:
        maps = backbone.shapes(addresses, *latent, tokens=request.tokens, condition=condition)
        flops, total = backbone.flops(addresses, *latent, condition)
        same = _shapes(uncond) == _shapes(condition)
        guide = 0 if not guided else total if same else backbone.flops({}, *latent, uncond)[1]
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
        0 if generated else backbone.encode_flops(height, width),
        max(flops.values()),
        request.dtype,
        legs,
        guide,
    )


def scaled(number: float) -> str:
    """Writes a number with three digits and a unit prefix: 1.23 G."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} Z"


def _check(request: FeatureRequest, whole: bool) -> None:
    if request.tokens and isinstance(request.pool, int):
        raise ConfigError(f"pool={request.pool} makes a grid of a map; with tokens=True use pool 'none' or 'mean'")
    if request.guidance != 1 and request.noise != "generation":
        raise ConfigError(f"guidance={request.guidance:g} is for noise='generation', and noise is {request.noise!r}")
    if whole and request.noise not in ("inversion", "generation"):
        raise ConfigError(f"whole=True runs a trajectory to its end, and noise={request.noise!r} has none")


def _shapes(condition: Condition | None) -> dict[str, tuple[int, ...]]:
    return {name: tuple(rows.shape[1:]) for name, rows in (condition or {}).items()}


def _is_noised(level: Level, request: FeatureRequest) -> bool:
    return level.noise > 0 and request.noise == "gaussian"
