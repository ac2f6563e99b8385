"""What a head reads: one (layer, level), or several side by side."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from diffrep.config import ProbeConfig
from diffrep.errors import ConfigError, DiffrepError
from diffrep.heads import pool_features
from diffrep.store import FeatureStore

ALL_LAYERS, ALL_LEVELS = "all layers", "all levels"
CHUNK = 4096


@dataclass(frozen=True)
class Reading:
    """Features of one or several (layer, level) pairs, pooled, flattened and concatenated.

    Attributes:
        layer: Address; "all layers" for several; the name of a baseline such as "pixels" for features from elsewhere.
        level: Canonical level, or "all levels".
        pairs: The (layer, level) pairs.
        pool: Side that maps are pooled to; None reads them as they are stored.
    """

    layer: str
    level: str
    pairs: tuple[tuple[str, str], ...] = ()
    pool: int | None = None

    def __str__(self) -> str:
        pool = "" if self.pool is None else f" pooled to {self.pool} x {self.pool}"
        return f"{self.layer}@{self.level}{pool}" if self.level else self.layer

    @property
    def combine(self) -> str:
        """Which way to combine features this is: "single", "layers", "levels" or "all"."""
        layers, levels = self.layer == ALL_LAYERS, self.level == ALL_LEVELS
        return ("all" if levels else "layers") if layers else ("levels" if levels else "single")

    def read(self, store: FeatureStore) -> torch.Tensor:
        """Returns the features of all samples, (N, D) fp32.

        Raises:
            DiffrepError: They hold NaN or infinity.
        """
        parts = []
        for layer, level in self.pairs:
            stored = store.tensor(layer, level)
            part = torch.cat([pooled(chunk, self.pool) for chunk in stored.split(CHUNK)])
            check_finite(part, f"{layer}@{level}")
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def check_finite(features: torch.Tensor, name: str) -> None:
    """Raises DiffrepError when features (N, ...) hold NaN or infinity, with the number of samples that do."""
    broken = (~torch.isfinite(features.flatten(1)).all(1)).sum().item()
    if broken:
        raise DiffrepError(
            f"the features of {name} hold NaN or infinity in {broken} of {len(features)} samples; float16 overflows "
            "above 65,504: extract with request.dtype=float32, or leave that layer out"
        )


def pooled(features: torch.Tensor, pool: int | None) -> torch.Tensor:
    """Pools maps (n, C, h, w) to at most `pool` cells a side, tokens (n, T, C) to their mean for 1; flattens, fp32."""
    return (features if pool is None else pool_features(features, pool)).float().flatten(1)


def readings(store: FeatureStore, config: ProbeConfig) -> list[Reading]:
    """Lists what the config asks to read of a store: every combination x pooling, each once.

    Raises:
        ConfigError: A pooling does not suit what is stored.
    """
    groups: list[tuple[str, str, tuple[tuple[str, str], ...]]] = []
    layers, levels = store.layers, list(store.levels)
    for combine in config.combine:
        if combine == "single":
            groups += [(layer, level, ((layer, level),)) for layer in layers for level in levels]
        elif combine == "layers":
            groups += [(ALL_LAYERS, level, tuple((layer, level) for layer in layers)) for level in levels]
        elif combine == "levels":
            groups += [(layer, ALL_LEVELS, tuple((layer, level) for level in levels)) for layer in layers]
        else:
            groups.append((ALL_LAYERS, ALL_LEVELS, tuple((layer, level) for layer in layers for level in levels)))
    found: dict[tuple[object, ...], Reading] = {}
    for layer, level, pairs in groups:
        for pool in config.pools:
            pool = None if pool == "stored" else pool
            sizes = tuple(pooled_shape(store, name, pool) for name, _ in pairs)
            # A pooling that changes nothing, or a combination of one, is what is there already.
            found.setdefault((pairs, sizes), Reading(layer, level, pairs, pool))
    return list(found.values())


def size_of(reading: Reading, store: FeatureStore) -> int:
    """Returns the number of stored elements of one sample that a reading needs."""
    return sum(prod(store.meta["layers"][layer]["shape"]) for layer, _ in reading.pairs)


def pooled_shape(store: FeatureStore, layer: str, pool: int | None) -> tuple[int, ...]:
    """Returns the shape of one sample's features after `pooled`, before they are flattened.

    Raises:
        ConfigError: The features are tokens and `pool` is neither None nor 1.
    """
    shape = tuple(store.meta["layers"][layer]["shape"])
    if pool is None or len(shape) == 1:
        return shape
    if len(shape) == 2:
        if pool != 1:
            raise ConfigError(
                f"{layer} is stored as tokens {shape}; they are read as stored, or pooled to 1, not to {pool}"
            )
        return shape[1:]
    return (shape[0], min(pool, shape[1]), min(pool, shape[2]))
