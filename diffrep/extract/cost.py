"""What an extraction costs, before it begins: work, bytes, hours of a GPU, and what will not fit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffrep.data.tars import expand
from diffrep.errors import DataError
from diffrep.extract.cards import CARDS, SHOWN
from diffrep.extract.plan import BYTES, Plan, scaled
from diffrep.extract.pooling import pooled_shape

if TYPE_CHECKING:
    from diffrep.backbones import Backbone
    from diffrep.config import DataConfig, ExtractConfig

# A share of the peak that networks of many small layers reach in bfloat16; large transformers come to more.
UTILISATION = 0.35
GB = 10**9
# Of one unit; a process holds about two, the one in the making and the one that is written.
LARGE, GOOD = 2 * GB, 256 * 10**6
# What index and claims were tried with: scripts/bench/index.py.
MANY = 1_000_000


@dataclass(frozen=True)
class Cost:
    """Costs of a plan for a number of images.

    Attributes:
        plan: The work for one image.
        images: How many there are.
        unit_size: Samples of a unit; None where a unit is a shard.
        shards: How many those are, where that is known.
        done: Images whose features are there already.
        dtype: Of the network, on a GPU.
        weights: Bytes of network and codec in this dtype.
        latents: Bytes of one image's latents when they are read from a store of latents; 0 when images are encoded.
        cards: Names of GPUs, of `CARDS`.
        utilisation: Share of a card's peak that is reached, above 0 and at most 1.
        target: Where the features go.
        free: Bytes free there, where that is known.
    """

    plan: Plan
    images: int
    unit_size: int | None = 1000
    shards: int | None = None
    done: int = 0
    dtype: str = "bfloat16"
    weights: int = 0
    latents: int = 0
    cards: tuple[str, ...] = SHOWN
    utilisation: float = UTILISATION
    target: str = ""
    free: int | None = None

    @classmethod
    def of(cls, config: ExtractConfig, backbone: Backbone, plan: Plan, images: int, **more: Any) -> Cost:
        """Takes from a config and its backbone what they know; `more` are attributes."""
        given = config.backbone.dtype
        dtype = "bfloat16" if given == "auto" else given  # what "auto" is on a GPU
        modules = [backbone.network, backbone.codec.module()]
        count = sum(p.numel() for module in modules if module is not None for p in module.parameters())
        latents = 0
        if config.latents is not None:
            side = config.data.size or backbone.image_size
            cells = backbone.codec.latent_channels * prod(backbone.codec.latent_size(side, side))
            # fp32; a request that samples the posterior needs its spread too.
            latents = 4 * cells * (2 if config.request.posterior == "sample" and backbone.codec.random else 1)
        settings = {"unit_size": config.unit_size, "target": config.out} | more
        return cls(plan, images, dtype=dtype, weights=BYTES[dtype] * count, latents=latents, **settings)

    @property
    def units(self) -> int | None:
        """Units of work, taking all images for one split; None where shards were not counted."""
        return self.shards if self.unit_size is None else ceil(self.images / self.unit_size)

    @property
    def encoder_flops(self) -> int:
        """FLOPs of encoding all images; 0 when their latents are read."""
        return 0 if self.latents else self.plan.encode_flops * self.images

    @property
    def network_flops(self) -> int:
        """FLOPs of all forward passes."""
        return (self.plan.flops - self.plan.encode_flops) * self.images

    @property
    def flops(self) -> int:
        """FLOPs of everything."""
        return self.encoder_flops + self.network_flops

    @property
    def bytes(self) -> int:
        """Bytes of all features."""
        return self.plan.bytes * self.images

    @property
    def layer_bytes(self) -> dict[str, int]:
        """Bytes of all features of each layer at one level; all levels take the same."""
        size = BYTES[self.plan.dtype]
        return {name: prod(shape) * size * self.images for name, shape in self.plan.shapes.items()}

    @property
    def unit_bytes(self) -> int | None:
        """Bytes of a unit's features, of the mean shard where units are shards; None where these were not counted."""
        if self.unit_size is not None:
            return self.plan.bytes * min(self.unit_size, self.images)
        return ceil(self.bytes / self.shards) if self.shards else None

    def hours(self, card: str) -> float | None:
        """Returns the GPU-hours on a card, or None where its memory does not hold the weights."""
        if self.weights > CARDS[card].memory * GB:
            return None
        return self.flops / (CARDS[card].peak(self.dtype) * self.utilisation) / 3600

    def lines(self) -> list[str]:
        """Returns the costs that a plan's own text does not tell, as lines of it."""
        where = "by reading latents" if self.latents else ""
        work = f"{scaled(self.encoder_flops)}FLOPs to encode {where}".rstrip()
        lines = [f"work      {work}, {scaled(self.network_flops)}FLOPs of the network"]
        levels = len(self.plan.draws)
        each = f" at each of {levels} levels" if levels > 1 else ""
        for name, count in self.layer_bytes.items():
            lines.append(f"layer     {name}: {scaled(count // self.images)}B an image, {scaled(count)}B in all{each}")
        if self.unit_bytes is not None:
            kind = "a shard" if self.unit_size is None else f"{min(self.unit_size, self.images):,} samples"
            lines.append(f"unit      {scaled(self.unit_bytes)}B for {kind}; a process holds about two in memory")
        if self.latents:
            count = f"{scaled(self.latents * self.images)}B"
            once = f"{scaled(self.plan.encode_flops * self.images)}FLOPs"
            lines.append(f"latents   {count} in a store that is made once, with {once}, where it is not there yet")
        lines += [self._card(name) for name in self.cards]
        return lines + [f"warning   {text}" for text in self.warnings()]

    def warnings(self) -> list[str]:
        """Returns what will not go well, each with a way out."""
        found = [self._disk(), self._large_unit(), self._many_units()]
        for name in self.cards:
            if self._lacks_bfloat16(name):
                found.append(f"{name} has no bfloat16; its hours are those of backbone.dtype=float16")
        return [text for text in found if text]

    def as_json(self) -> dict[str, Any]:
        """Returns everything as plain values: FLOPs, bytes, hours."""
        return {
            "images": self.images,
            "done": self.done,
            "units": self.units,
            "unit_size": self.unit_size,
            "forwards": self.plan.forwards * self.images,
            "flops": {"encoder": self.encoder_flops, "network": self.network_flops, "total": self.flops},
            "bytes": {
                "total": self.bytes,
                "layers": {name: dict.fromkeys(self.plan.draws, count) for name, count in self.layer_bytes.items()},
                "unit": self.unit_bytes,
                "latents": self.latents * self.images,
                "free": self.free,
            },
            "gpu": {
                "dtype": self.dtype,
                "utilisation": self.utilisation,
                "weights": self.weights,
                "hours": {name: self.hours(name) for name in self.cards},
            },
            "warnings": self.warnings(),
        }

    def _card(self, name: str) -> str:
        hours, peak = self.hours(name), CARDS[name].peak(self.dtype)
        if hours is None:
            weights = f"{scaled(self.weights)}B of weights in {self.dtype}"
            return f"{name:9} its {CARDS[name].memory} GB do not hold the {weights}"
        dtype = "float16" if self._lacks_bfloat16(name) else self.dtype
        share = f"{self.utilisation:.0%} of {peak / 1e12:g} TFLOP/s in {dtype}"
        return f"{name:9} {written(hours)} GPU-hours at {share}"

    def _lacks_bfloat16(self, card: str) -> bool:
        return self.dtype == "bfloat16" and not CARDS[card].bfloat16

    def _disk(self) -> str | None:
        needed = self.plan.bytes * (self.images - self.done)
        if self.free is None or needed <= self.free:
            return None
        rest = " that are missing" if self.done else ""
        ways = " or ".join(self._fitting()) or "nothing in this request alone; take another disk, or fewer images"
        return (
            f"the features{rest}, {scaled(needed)}B, do not fit into the {scaled(self.free)}B free at {self.target}; "
            f"what would: {ways}"
        )

    def _fitting(self) -> list[str]:
        """Lists single changes of the request with which the features fit, the least loss first."""
        shapes, item = list(self.plan.shapes.values()), BYTES[self.plan.dtype]
        room = self.free / ((self.images - self.done) * len(self.plan.draws))  # for an image at one level
        sizes = sorted(map(prod, shapes))
        found = []
        for dtype in ("float16", "float8_e4m3fn"):
            if BYTES[dtype] < item and sum(sizes) * BYTES[dtype] <= room:
                found.append(f"request.dtype={dtype}")
                break
        pools = [16, 8, 4, 2] if all(len(shape) == 3 for shape in shapes) else []
        pools += ["mean"] if all(len(shape) > 1 for shape in shapes) else []
        smaller = {pool: sum(prod(pooled_shape(shape, pool)) for shape in shapes) for pool in pools}
        fitting = [pool for pool, size in smaller.items() if size < sum(sizes) and size * item <= room]
        found += [f"request.pool={pool}" for pool in dict.fromkeys([*fitting[:1], *fitting[-1:]])]
        few = sum(size * item <= room for size in accumulate(sizes))
        if few:
            found.append(f"{few} of the {len(sizes)} layers")
        levels = int(room * len(self.plan.draws) // (sum(sizes) * item))
        if levels:
            found.append(f"{levels} of the {len(self.plan.draws)} levels")
        return found

    def _large_unit(self) -> str | None:
        if self.unit_bytes is None or self.unit_bytes <= LARGE:
            return None
        if self.unit_size is None:
            return f"a shard's features take {scaled(self.unit_bytes)}B, and a process holds about two; cut the shards"
        size = max(1, GOOD // self.plan.bytes)
        return (
            f"a unit takes {scaled(self.unit_bytes)}B, and a process holds about two; unit_size={size} makes "
            f"it {scaled(self.plan.bytes * size)}B"
        )

    def _many_units(self) -> str | None:
        if self.unit_size is None or self.units <= 2 * MANY:
            return None
        size = min(ceil(self.images / MANY), max(self.unit_size, LARGE // self.plan.bytes))
        if size <= self.unit_size:
            return f"{self.units:,} units are more than the {MANY:,} that were tried; make several stores"
        return (
            f"{self.units:,} units are more than the {MANY:,} that were tried; unit_size={size} makes "
            f"{ceil(self.images / size):,}"
        )


class Announced:
    """A reader of images of which only the number is known, for plans of a data set that is not here.

    Args:
        count: How many.
    """

    labels = None

    def __init__(self, count: int):
        self.count = count
        self.ids = range(count)

    def image(self, index: int) -> Image.Image:
        """Raises DataError."""
        raise DataError("these images were only counted, with --images; run without it to read them")

    def fingerprint(self) -> list[object]:
        """Returns the number."""
        return [self.count]


def count_shards(config: DataConfig) -> int | None:
    """Returns the number of shards that a pattern in braces names; None where they would have to be listed."""
    if "{" not in config.path or "*" in config.path or config.splits is not None:
        return None
    return len(expand(config.path))


def written(hours: float) -> str:
    """Writes hours with three digits and thousands separated: 0.0123, 4.56, 78,900."""
    if hours < 100:
        return f"{hours:.3g}"
    digits = len(str(int(hours))) - 3
    return f"{round(hours, -digits):,.0f}"
