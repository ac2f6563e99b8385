"""Finished stores as files of other formats: Parquet, Lance and plain numpy arrays."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from diffrep.config import LevelSpec
from diffrep.errors import BackendUnavailable, DiffrepError, StoreError, UnknownNameError
from diffrep.store.interop import for_numpy
from diffrep.store.reader import FeatureStore

if TYPE_CHECKING:
    import pyarrow

CHUNK = 1 << 23  # bytes of features that are read at once
GROUP = 1 << 26  # bytes of features of a row group of Parquet; they are read at once, and encoding takes eight times
FILE = 1 << 29  # bytes of a Parquet file, about what readers that spread over files like


@dataclass(frozen=True)
class _Column:
    """The features of one (layer, level): its name "layer@level", and a sample's shape and element type."""

    layer: str
    level: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def name(self) -> str:
        return f"{self.layer}@{self.level}"

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def read(self, store: FeatureStore, rows: range) -> np.ndarray:
        """Returns the features of consecutive samples, (n, ...)."""
        return for_numpy(store.take(self.layer, self.level, np.arange(rows.start, rows.stop))).numpy()


def export_store(
    store: FeatureStore | str | Path,
    out: str | Path,
    to: str,
    layer: str | None = None,
    level: LevelSpec | None = None,
    split: str | None = None,
) -> Path:
    """Writes a finished store, or a part of it, in another format.

    The samples are streamed: 8 MB of features are held at once, by Parquet some 600 MB. The target has a temporary
    name until it is whole. bfloat16 and float8, which these formats lack, become float32.

    - "parquet": files `data/SPLIT-00000-of-00007.parquet` of about 512 MB, named as the `datasets` library looks for
      them. Columns are "id", "label" where there are labels, "split", and a flat list of fixed size for each
      "layer@level"; the entry "diffrep" of the schema's metadata is JSON with "shapes" and the store's "meta".
    - "lance": a Lance data set with the same columns and metadata.
    - "npy": `SPLIT/layer@level.npy` (n, ...), `SPLIT/labels.npy`, `SPLIT/ids.json` and an `export.json` that names
      them; characters that a file's name may not have are written as in URLs, "inversion 3%2F10".

    Args:
        store: The store, or where it lies.
        out: Local folder that is made.
        to: One of the formats.
        layer: Address; None takes all layers.
        level: Level; None takes all levels.
        split: Split; None takes all.

    Returns:
        The folder.

    Raises:
        StoreError: There is no finished store, the target exists or cannot be written.
        UnknownNameError: There is no such format, or the store has no such layer, level or split.
        BackendUnavailable: The package that writes the format is not installed.
    """
    if to not in FORMATS:
        raise UnknownNameError("format", to, FORMATS)
    store = store if isinstance(store, FeatureStore) else FeatureStore(store)
    columns = _columns(store, layer, level)
    splits = {name: _span(store, name) for name in (store.splits if split is None else [split])}
    if "://" in str(out):
        raise StoreError(f"an export is written to a local folder, and out is {str(out)!r}; copy it there afterwards")
    out = Path(out)
    if out.exists():
        raise StoreError(f"{out} exists; give another out, or remove it")
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        FORMATS[to](store, temporary, columns, splits)
        temporary.rename(out)
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _columns(store: FeatureStore, layer: str | None, level: LevelSpec | None) -> list[_Column]:
    layers = store.layers if layer is None else [layer]
    levels = list(store.levels) if level is None else [level]
    keys = [store.key(la, le) for la in layers for le in levels]
    features = [for_numpy(store.take(*key, np.arange(1)))[0].numpy() for key in keys]
    return [_Column(*key, feature.shape, feature.dtype) for key, feature in zip(keys, features, strict=True)]


def _span(store: FeatureStore, split: str) -> range:
    """Returns where a split's samples lie in the store; units keep the order of the splits."""
    rows = store.rows(split)
    return range(int(rows[0]), int(rows[-1]) + 1)


def _cut(rows: range, size: int) -> list[range]:
    return [range(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def _described(store: FeatureStore, columns: list[_Column]) -> dict[str, Any]:
    return {"shapes": {column.name: list(column.shape) for column in columns}, "meta": store.meta}


def _schema(pa: Any, store: FeatureStore, columns: list[_Column]) -> pyarrow.Schema:
    fields = [("id", pa.string())]
    label = _labels(store, range(1)) if store.labelled else None
    if label is not None:
        fields.append(("label", pa.int64() if label.ndim == 1 else pa.list_(pa.int64(), label.shape[1])))
    fields.append(("split", pa.string()))
    for column in columns:
        fields.append((column.name, pa.list_(pa.from_numpy_dtype(column.dtype), prod(column.shape))))
    metadata = {"diffrep": json.dumps(_described(store, columns))}
    if label is not None and label.ndim == 1 and store.classes is not None:
        # How the datasets library writes that a column holds class numbers with names.
        named = {"label": {"names": store.classes, "_type": "ClassLabel"}}
        metadata["huggingface"] = json.dumps({"info": {"features": named}})
    return pa.schema(fields, metadata)


def _batch(
    pa: Any, schema: pyarrow.Schema, store: FeatureStore, columns: list[_Column], split: str, rows: range
) -> pyarrow.RecordBatch:
    arrays = [pa.array(_ids(store, rows), pa.string())]
    if store.labelled:
        arrays.append(_listed(pa, _labels(store, rows)))
    arrays.append(pa.array([split] * len(rows), pa.string()))
    arrays += [_listed(pa, column.read(store, rows).reshape(len(rows), -1)) for column in columns]
    return pa.record_batch(arrays, schema=schema)


def _listed(pa: Any, values: np.ndarray) -> pyarrow.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _fitting(size: int, columns: list[_Column]) -> int:
    """Returns how many samples have about so many bytes of features."""
    return max(1, size // sum(column.bytes for column in columns))


def _write_parquet(store: FeatureStore, folder: Path, columns: list[_Column], splits: dict[str, range]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise BackendUnavailable("Parquet needs the pyarrow package: pip install 'diffrep[datasets]'") from None
    schema = _schema(pa, store, columns)
    group = _fitting(GROUP, columns)
    size = group * max(1, FILE // GROUP)
    (folder / "data").mkdir()
    # Features hardly ever repeat: dictionaries and statistics of them cost half the speed, compression the rest.
    options = {"use_dictionary": ["split"], "write_statistics": ["id", "label", "split"], "compression": "none"}
    for split, rows in splits.items():
        files = _cut(rows, size)
        for number, part in enumerate(files):
            name = f"{_file_name(split)}-{number:05d}-of-{len(files):05d}.parquet"
            with pq.ParquetWriter(folder / "data" / name, schema, **options) as writer:
                for chunk in _cut(part, group):
                    writer.write_batch(_batch(pa, schema, store, columns, split, chunk), row_group_size=len(chunk))


def _write_lance(store: FeatureStore, folder: Path, columns: list[_Column], splits: dict[str, range]) -> None:
    try:
        import lance
        import pyarrow as pa
    except ImportError:
        raise BackendUnavailable("Lance needs the pylance package: pip install 'diffrep[lance]'") from None
    schema = _schema(pa, store, columns)
    failed: list[DiffrepError] = []

    def batches() -> Iterator[pyarrow.RecordBatch]:
        try:
            for split, rows in splits.items():
                for chunk in _cut(rows, _fitting(CHUNK, columns)):
                    yield _batch(pa, schema, store, columns, split, chunk)
        except DiffrepError as error:
            failed.append(error)
            raise

    try:
        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(folder), schema=schema)
    except OSError:
        # Lance turns any error of the reader into an OSError with a traceback in its text.
        if failed:
            raise failed[0] from None
        raise


def _write_npy(store: FeatureStore, folder: Path, columns: list[_Column], splits: dict[str, range]) -> None:
    listing = {}
    for split, rows in splits.items():
        place = folder / _file_name(split)
        place.mkdir()
        names = {column.name: f"{place.name}/{_file_name(column.name)}.npy" for column in columns}
        listing[split] = {"samples": len(rows), "ids": f"{place.name}/ids.json", "features": names}
        with open(place / "ids.json", "w") as file:
            lines = (json.dumps(sample_id) for chunk in _cut(rows, 1 << 16) for sample_id in _ids(store, chunk))
            file.write("[\n" + next(lines))
            file.writelines(f",\n{line}" for line in lines)
            file.write("\n]\n")
        if store.labelled:
            listing[split]["labels"] = f"{place.name}/labels.npy"
            first = _labels(store, range(1))
            _save_array(place / "labels.npy", rows, first, lambda chunk: _labels(store, chunk))
        for column in columns:
            first = column.read(store, range(1))
            _save_array(folder / names[column.name], rows, first, lambda chunk, c=column: c.read(store, chunk))
    text = json.dumps({"splits": listing, **_described(store, columns)}, indent=1)
    (folder / "export.json").write_text(text + "\n")


def _ids(store: FeatureStore, rows: range) -> list[str]:
    return store.ids_of(np.arange(rows.start, rows.stop))


def _labels(store: FeatureStore, rows: range) -> np.ndarray:
    return store.labels_of(np.arange(rows.start, rows.stop)).numpy()


def _save_array(file: Path, rows: range, first: np.ndarray, read: Callable[[range], np.ndarray]) -> None:
    """Writes an array of all rows; one row, `first` (1, ...), tells the rest of its shape and its element type."""
    # Written, not mapped: a full disk is an error then, and not the end of the process.
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (len(rows), *first.shape[1:])}
    with open(file, "wb") as handle:
        np.lib.format.write_array_header_1_0(handle, header)
        for chunk in _cut(rows, max(1, CHUNK // first.nbytes)):
            handle.write(np.ascontiguousarray(read(chunk)))


def _file_name(text: str) -> str:
    """Returns a name as a file may have it; one that begins with a dot would be hidden, or another folder."""
    name = quote(text, safe="@:= ")
    return "%2E" + name[1:] if name.startswith(".") else name


FORMATS: dict[str, Callable[[FeatureStore, Path, list[_Column], dict[str, range]], None]] = {
    "parquet": _write_parquet,
    "lance": _write_lance,
    "npy": _write_npy,
}
