"""Images held as arrays: `.npz` files, torchvision sets and Hugging Face sets."""

from __future__ import annotations

import hashlib
import inspect
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffrep.data.images import pick_splits
from diffrep.errors import BackendUnavailable, DataError, UnknownNameError


class ArrayReader:
    """Images of an uint8 array (N, H, W) or (N, H, W, C); ids are "split:index"."""

    def __init__(self, split: str, images: np.ndarray, labels: np.ndarray | None, source: list[object]):
        self.ids = [f"{split}:{i}" for i in range(len(images))]
        self.images, self.labels, self.source = images, labels, source

    def image(self, index: int) -> Image.Image:
        """Wraps one row."""
        return Image.fromarray(self.images[index])

    def fingerprint(self) -> list[object]:
        """Returns the file's name and size."""
        return self.source


def read_npz(file: Path) -> tuple[dict[str, ArrayReader], list[str] | None]:
    """Reads `{split}_images` (uint8), `{split}_labels` (integers, optional) and `classes` (names, optional).

    Raises:
        DataError: The file is missing, damaged, or holds no such arrays.
    """
    try:
        arrays = dict(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    splits = [name.removesuffix("_images") for name in arrays if name.endswith("_images")]
    if not splits:
        raise DataError(f"{file} holds {sorted(arrays)}; expected arrays named like 'train_images', 'train_labels'")
    source: list[object] = [file.name, file.stat().st_size]
    readers = {}
    for split in splits:
        images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels")
        images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)):
            raise DataError(
                f"{file}: {split}_images is {images.dtype} {images.shape}; expected uint8 (N, H, W) or (N, H, W, 3)"
            )
        if labels is not None and len(labels) != len(images):
            raise DataError(f"{file}: {len(images)} images and {len(labels)} labels in split {split!r}")
        if labels is not None and not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"{file}: the labels of split {split!r} are {labels.dtype}; they must be integers")
        readers[split] = ArrayReader(split, images, labels, source)
    return readers, [str(c) for c in arrays["classes"]] if "classes" in arrays else None


class MapReader:
    """Rows of any indexable set that gives PIL images; ids are "split:index"."""

    def __init__(self, split: str, rows: Any, get: Any, labels: np.ndarray | None, source: list[object]):
        self.ids = [f"{split}:{i}" for i in range(len(rows))]
        self.rows, self.get, self.labels, self.source = rows, get, labels, source

    def image(self, index: int) -> Image.Image:
        """Decodes one row."""
        try:
            return self.get(self.rows, index)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot read the image: {error}") from error

    def fingerprint(self) -> list[object]:
        """Returns what identifies the source's files, the number of rows and a digest of the labels."""
        labels = b"" if self.labels is None else self.labels.tobytes()
        return [*self.source, len(self.ids), hashlib.sha256(labels).hexdigest()[:16]]


def _digest(rows: Any) -> str:
    """Identifies a torchvision set by its pixels where it holds them, else by the names and sizes of its files."""
    data = getattr(rows, "data", None)
    if isinstance(data, (np.ndarray, torch.Tensor)):
        return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()[:16]
    root = Path(str(getattr(rows, "root", "")))
    files = sorted((f.name, f.stat().st_size) for f in root.rglob("*") if f.is_file()) if root.is_dir() else []
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _first_of_pair(rows: Any, index: int) -> Image.Image:
    return rows[index][0]


def _column(rows: Any, index: int, key: str) -> Image.Image:
    return rows[index][key]


def read_torchvision(
    name: str, root: Path, splits: tuple[str, ...] | None, download: bool
) -> tuple[dict[str, MapReader], list[str] | None]:
    """Opens a classification set of `torchvision.datasets`.

    Raises:
        UnknownNameError: torchvision has no such set.
        DataError: The set is not below `root`, or its splits must be named.
    """
    from torchvision import datasets

    known = [n for n in datasets.__all__ if hasattr(getattr(datasets, n), "__getitem__")]
    if name not in known:
        raise UnknownNameError("torchvision data set", name, known)
    factory = getattr(datasets, name)
    parameters = inspect.signature(factory).parameters
    if "train" not in parameters and "split" in parameters and splits is None:
        raise DataError(f"torchvision {name} has splits of its own naming; name them in data.splits")
    readers, classes = {}, None
    if "train" in parameters:
        # Anything that is not "train" would quietly open the test images.
        splits = pick_splits(["train", "test"], splits)
    for split in splits or ("all",):
        wanted = {"root": root, "download": download, "train": split == "train", "split": split}
        try:
            rows = factory(**{key: value for key, value in wanted.items() if key in parameters})
        except (RuntimeError, ValueError, FileNotFoundError) as error:
            raise DataError(
                f"torchvision {name} below {str(root)!r}: {error}; data.download=true fetches it"
            ) from error
        targets = next((getattr(rows, n) for n in ("targets", "labels", "_labels") if hasattr(rows, n)), None)
        labels = None if targets is None else np.asarray(targets, dtype=np.int64)
        readers[split] = MapReader(split, rows, _first_of_pair, labels, ["torchvision", name, split, _digest(rows)])
        classes = classes or getattr(rows, "classes", None)
    return readers, [str(c) for c in classes] if classes else None


def read_hf(
    path: str, splits: tuple[str, ...] | None, image_key: str | None, label_key: str | None
) -> tuple[dict[str, MapReader], list[str] | None]:
    """Opens a Hugging Face set: a folder of parquet files named by split, or a hub id.

    Raises:
        BackendUnavailable: The `datasets` package is not installed.
        DataError: The set cannot be opened or has no image column.
    """
    try:
        import datasets
    except ImportError:
        raise BackendUnavailable(
            "parquet and hub sets need the datasets package: pip install 'diffrep[datasets]'"
        ) from None
    quiet = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        loaded = datasets.load_dataset(path)
    except Exception as error:  # the library raises many kinds: files, network, schema
        raise DataError(f"cannot open the HF data set {path!r}: {error}") from error
    finally:
        if quiet:
            datasets.enable_progress_bar()
    folder = Path(path)
    files = sorted((f.relative_to(folder).as_posix(), f.stat().st_size) for f in folder.rglob("*.parquet"))
    source = files or [path, *(rows._fingerprint for rows in loaded.values())]
    readers, classes = {}, None
    for split in loaded if splits is None else splits:
        if split not in loaded:
            raise UnknownNameError("split", split, list(loaded))
        rows = loaded[split]
        image_key = image_key or next((k for k, f in rows.features.items() if isinstance(f, datasets.Image)), None)
        if image_key not in rows.features:
            raise DataError(f"{path}: no image column {image_key or ''}; columns: {list(rows.features)}")
        guesses = [k for k, f in rows.features.items() if k == "label" or isinstance(f, datasets.ClassLabel)]
        label_key = label_key or (guesses[0] if guesses else None)
        if label_key is not None and label_key not in rows.features:
            raise UnknownNameError("label column", label_key, list(rows.features))
        try:
            labels = None if label_key is None else np.asarray(rows[label_key], dtype=np.int64)
        except (TypeError, ValueError):
            raise DataError(f"{path}: the labels in column {label_key!r} are not integers") from None
        classes = classes or (getattr(rows.features[label_key], "names", None) if label_key else None)
        get = partial(_column, key=image_key)
        readers[split] = MapReader(split, rows.select_columns([image_key]), get, labels, ["hf", *source, split])
    return readers, classes
