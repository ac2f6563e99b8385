"""Images held as arrays: `.npz` files, torchvision sets and Hugging Face sets."""

from __future__ import annotations

import hashlib
import inspect
import io
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffrep.data.images import decode, image_errors, pick_splits
from diffrep.data.labels import integers, label_columns, label_digest, multi_hot
from diffrep.errors import BackendUnavailable, DataError, UnknownNameError

# A packed .npz may say that it holds this much, or so many times its size; zeros alone are packed 1,000 times.
NPZ_BYTES, NPZ_RATIO = 1 << 30, 200


class ArrayReader:
    """Images of an uint8 array (N, H, W) or (N, H, W, C); ids are "split:index"."""

    def __init__(self, split: str, images: np.ndarray, labels: np.ndarray | None, source: list[object]):
        self.ids = [f"{split}:{i}" for i in range(len(images))]
        self.images, self.labels, self.source = images, labels, source

    def image(self, index: int) -> Image.Image:
        """Wraps one row."""
        with image_errors():
            return Image.fromarray(self.images[index])

    def fingerprint(self) -> list[object]:
        """Returns the file's name and size."""
        return self.source


def read_npz(file: Path) -> tuple[dict[str, ArrayReader], list[str] | None]:
    """Reads `{split}_images` (uint8), `{split}_labels` (integers or 0/1 rows, optional), `classes` (names, optional).

    Raises:
        DataError: The file is missing, damaged, or holds no such arrays.
    """
    arrays = _load_npz(file)
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
        if labels is not None and labels.shape[:1] != images.shape[:1]:
            raise DataError(f"{file}: {len(images)} images and {labels.size} labels in split {split!r}")
        if labels is not None:
            labels = integers(labels, f"{file}: the labels of split {split!r}")
        readers[split] = ArrayReader(split, images, labels, source)
    return readers, [str(c) for c in arrays["classes"].flat] if "classes" in arrays else None


def _load_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(file) as packed:
            size = sum(member.file_size for member in packed.infolist())
        if size > max(NPZ_BYTES, NPZ_RATIO * file.stat().st_size):
            raise DataError(
                f"{file} would unpack to {size:,} bytes, more than {NPZ_RATIO} times its own; store it with np.savez"
            )
        with np.load(file, allow_pickle=False) as arrays:
            return {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on damaged files
        raise DataError(f"cannot read {file}: {error or type(error).__name__}") from error


class MapReader:
    """Rows of any indexable set that gives PIL images; ids are "split:index"."""

    def __init__(self, split: str, rows: Any, get: Any, labels: np.ndarray | None, source: list[object]):
        self.ids = [f"{split}:{i}" for i in range(len(rows))]
        self.rows, self.get, self.labels, self.source = rows, get, labels, source

    def image(self, index: int) -> Image.Image:
        """Decodes one row."""
        with image_errors():
            return self.get(self.rows, index)

    def fingerprint(self) -> list[object]:
        """Returns what identifies the source's files, the number of rows and a digest of the labels."""
        return [*self.source, len(self.ids), label_digest(self.labels)]


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


def _column(rows: Any, index: int, key: str, mode: str | None, follow: bool) -> Image.Image:
    """Decodes an image as the `datasets` package does, but only from the formats that are read elsewhere too."""
    found = rows[index][key]
    if found is None or found["bytes"] is None and not (follow and found["path"]):
        raise DataError("cannot read the image: the row holds none; paths to other files are not followed")
    source = Path(found["path"]) if found["bytes"] is None else io.BytesIO(found["bytes"])
    image = decode(source, upright=True)
    return image if mode is None or image.mode == mode else image.convert(mode)


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
        targets = _targets(rows)
        labels = None if targets is None else integers(targets, f"the labels of torchvision {name}")
        readers[split] = MapReader(split, rows, _first_of_pair, labels, ["torchvision", name, split, _digest(rows)])
        classes = classes or getattr(rows, "classes", None) or getattr(rows, "categories", None)
    # A class of ImageNet is a tuple of synonyms, whose first one two classes may share.
    return readers, [c if isinstance(c, str) else ", ".join(c) for c in classes] if classes else None


def _targets(rows: Any) -> Any:
    """Finds the labels of a torchvision set without decoding its images; each set keeps them in its own way."""
    for name in ("targets", "labels", "_labels", "y"):
        if hasattr(rows, name):
            return getattr(rows, name)
    pairs = getattr(rows, "_samples", None)
    return None if pairs is None or any(label is None for _, label in pairs) else [label for _, label in pairs]


def read_hf(
    path: str, splits: tuple[str, ...] | None, image_key: str | None, label_key: str | tuple[str, ...] | None
) -> tuple[dict[str, MapReader], list[str] | None]:
    """Opens a Hugging Face set: a folder of parquet files named by split, or a hub id.

    Labels are a column of integers, a column of lists of class numbers, or several columns of 0 and 1.

    Raises:
        BackendUnavailable: The `datasets` package is not installed.
        DataError: The set cannot be opened, has no image column, or its labels are not integers.
        UnknownNameError: There is no such split or label column.
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
    chosen = pick_splits(list(loaded), splits)
    features = next(iter(loaded.values())).features
    image_key = image_key or next((k for k, f in features.items() if isinstance(f, datasets.Image)), None)
    if not isinstance(features.get(image_key), datasets.Image):
        raise DataError(f"{path}: no image column {image_key or ''}; columns: {list(features)}")
    guesses = [k for k, f in features.items() if k == "label" or isinstance(f, datasets.ClassLabel)]
    guesses += [k for k, f in features.items() if isinstance(getattr(f, "feature", None), datasets.ClassLabel)]
    label_key = label_key or (guesses[0] if guesses else None)
    keys = [] if label_key is None else label_columns(label_key, features)
    labels, classes = _hf_labels(path, loaded, keys) if keys else (dict.fromkeys(loaded), None)
    # Sets of image files come as paths, which `datasets` found; those in a parquet file could name any file.
    get = partial(_column, key=image_key, mode=features[image_key].mode, follow=not files)
    readers = {}
    for split in chosen:
        rows = loaded[split].select_columns([image_key]).cast_column(image_key, datasets.Image(decode=False))
        readers[split] = MapReader(split, rows, get, labels[split], ["hf", *source, split])
    return readers, classes


def _hf_labels(path: str, loaded: Any, keys: list[str]) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Returns the labels of every split, so that the number of classes does not depend on the splits that are read."""
    if len(keys) > 1:
        columns = {
            split: [integers(rows[key][:], f"{path}: the labels in column {key!r}") for key in keys]
            for split, rows in loaded.items()
        }
        what = f"{path}: the labels in columns {keys}"
        return {split: integers(np.stack(found, 1), what) for split, found in columns.items()}, keys
    key = keys[0]
    values = {split: rows[key][:] for split, rows in loaded.items()}
    feature = next(iter(loaded.values())).features[key]
    what = f"{path}: the labels in column {key!r}"
    inner = getattr(feature, "feature", None)
    if inner is None:
        return {split: integers(found, what) for split, found in values.items()}, getattr(feature, "names", None)
    together = [row for found in values.values() for row in found]
    if not all(row is not None and all(type(number) is int for number in row) for row in together):
        raise DataError(f"{what} are not integers")
    names = getattr(inner, "names", None)
    hot = multi_hot(together, len(names) if names else None, lambda i: f"{path}: row {i} of column {key!r}")
    ends = np.cumsum([len(found) for found in values.values()])
    return dict(zip(values, np.split(hot, ends[:-1]), strict=True)), names
