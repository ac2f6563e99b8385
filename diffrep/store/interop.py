"""Features as a data set of the Hugging Face `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffrep.errors import BackendUnavailable

if TYPE_CHECKING:
    import datasets

    from diffrep.store.reader import FeatureStore

# Samples that are read at once.
CHUNK = 256


def to_dataset(store: FeatureStore, names: list[str], rows: np.ndarray) -> datasets.Dataset:
    """Returns some tensors ("layer@level") and rows of a store; see `FeatureStore.to_dataset`.

    Raises:
        BackendUnavailable: The `datasets` package is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise BackendUnavailable(
            "an HF data set needs the datasets package: pip install 'diffrep[datasets]'"
        ) from None
    columns: dict[str, Any] = {"id": datasets.Value("string")}
    named = store.classes is not None
    if store.labels is not None:
        number = datasets.ClassLabel(names=store.classes) if named else datasets.Value("int64")
        several = store.labels.ndim == 2
        columns["label"] = datasets.List(number, length=-1 if named else store.labels.shape[1]) if several else number
    for name in names:
        columns[name] = _column(datasets, store._files.take(name, np.arange(1))[0])
    # The library caches by its arguments, and the store's state holds each unit's checksum. It would take a list for
    # shards and call the generator for each entry; a tuple it leaves alone.
    arguments = {"store": store, "names": tuple(names), "rows": rows}
    return datasets.Dataset.from_generator(_samples, features=datasets.Features(columns), gen_kwargs=arguments)


def for_numpy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor as float32 where numpy lacks its element type, else as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn) else tensor


def _column(datasets: Any, feature: torch.Tensor) -> Any:
    dtype = str(for_numpy(feature).dtype).removeprefix("torch.")
    if feature.ndim == 1:
        return datasets.List(datasets.Value(dtype), length=len(feature))
    return getattr(datasets, f"Array{feature.ndim}D")(tuple(feature.shape), dtype)


def _samples(store: FeatureStore, names: tuple[str, ...], rows: np.ndarray) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), CHUNK):
        some = rows[start : start + CHUNK]
        columns: dict[str, Any] = {"id": store.ids_of(some)}
        labels = store.labels_of(some)
        if labels is not None:
            # Names go with class numbers: those of the ones in a 0/1 row.
            by_name = labels.ndim == 2 and store.classes is not None
            columns["label"] = [np.flatnonzero(one).tolist() for one in labels] if by_name else labels.tolist()
        columns |= {name: for_numpy(store._files.take(name, some)).numpy() for name in names}
        yield from (dict(zip(columns, sample, strict=True)) for sample in zip(*columns.values(), strict=True))
