"""Principal components of stored features: targets of a smaller width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from diffrep.errors import ConfigError
from diffrep.store import FeatureStore
from diffrep.store.layout import write_whole

ROWS = 256  # samples of a store that are read at a time


def fit_pca(
    features: torch.Tensor | FeatureStore,
    file: str | Path,
    width: int,
    layer: str | None = None,
    split: str | None = None,
) -> float:
    """Writes the projection on the first principal components of features, for `EncoderConfig.pca`.

    Of maps each position is a vector. Components are of unit length, not whitened, their largest entry positive.

    Args:
        features: Vectors (N, D) or maps (N, D, h, w); or a store, which is read a part at a time.
        file: `.safetensors` file: mean (D,) and components (K, D), fp32.
        width: K.
        layer: Of a store: address, such as "targets.dino"; it is read at the store's first level.
        split: Of a store; None takes all samples.

    Returns:
        The share of the variance that the components keep.

    Raises:
        ConfigError: K is more than D or not less than the number of vectors, or no layer of the store is named.
        UnknownNameError: The store has no such layer or split.
    """
    if isinstance(features, FeatureStore) and layer is None:
        raise ConfigError(f"name the layer that is projected, one of {', '.join(features.layers)}")
    count, offset, total, products = 0, None, 0.0, 0.0
    for part in _parts(features, layer, split):
        vectors = part.double().movedim(1, -1).flatten(0, -2)
        # Moments about a vector near the mean, which lose no digits to it.
        offset = vectors.mean(0) if offset is None else offset
        vectors = vectors - offset
        count, total, products = count + len(vectors), total + vectors.sum(0), products + vectors.T @ vectors
    dimensions = 0 if offset is None else len(offset)
    if not 0 < width <= dimensions or width >= count:
        raise ConfigError(
            f"width={width}: {count:,} vectors of {dimensions} channels have 1 to {min(dimensions, count - 1)} "
            "principal components"
        )
    centre = total / count
    variances, vectors = torch.linalg.eigh(products / count - torch.outer(centre, centre))
    components = vectors.T.flip(0)[:width]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    content = {"mean": (offset + centre).float(), "components": (components * largest.sign()).float().contiguous()}
    write_whole(Path(file), save(content))
    return float(variances.flip(0)[:width].sum() / variances.sum())


def _parts(features: torch.Tensor | FeatureStore, layer: str | None, split: str | None) -> Iterator[torch.Tensor]:
    if not isinstance(features, FeatureStore):
        yield from features.split(ROWS)
        return
    store, level = features, next(iter(features.levels))
    rows = torch.arange(len(store)).numpy() if split is None else store.rows(split)
    for start in range(0, len(rows), ROWS):
        yield store.take(layer, level, rows[start : start + ROWS]).float()
