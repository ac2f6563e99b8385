"""Images with stable ids: `open_images` finds the right reader for a `DataConfig`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from diffrep.config import DataConfig
from diffrep.data.arrays import read_hf, read_npz, read_torchvision
from diffrep.data.folder import files_below, read_folder
from diffrep.data.images import EXTENSIONS, ImageSet, Transform, pick_splits
from diffrep.data.listing import is_remote
from diffrep.data.shards import ShardSet, open_shards
from diffrep.data.table import read_table
from diffrep.data.tars import read_tars
from diffrep.data.vtab import read_vtab, vtab_means
from diffrep.errors import ConfigError, DataError, suggest

BUNDLED = {"fashion-demo": "4,000 training and 1,000 test images of Fashion-MNIST, 28x28, one channel, 10 classes"}
KEYED = ("hf", "csv", "webdataset")
__all__ = ["BUNDLED", "ImageSet", "ShardSet", "Transform", "open_data", "open_images", "vtab_means"]


def open_images(config: DataConfig, channels: int) -> ImageSet:
    """Opens a data set whose samples can be read in any order.

    Args:
        config: What to open and how to bring images to the backbone's input.
        channels: Channels of the backbone's images, 1 or 3; images are converted.

    Raises:
        BackendUnavailable: A package that this kind of data needs is not installed.
        ConfigError: The channel count is neither 1 nor 3, a key is set that this kind of data has not, or the set
            would be streamed.
        DataError: Nothing readable is there.
        UnknownNameError: A split, column or set name does not exist.
    """
    if config.stream or is_remote(config.path):
        raise ConfigError(
            f"data {config.path!r} is streamed, which 'diffrep extract' can do; this reads images in any order, from "
            "a local set and without data.stream"
        )
    return open_data(config, channels)


def open_data(config: DataConfig, channels: int) -> ImageSet | ShardSet:
    """Opens a data set as `open_images` does; a streamed one, or one behind a URL, is a `ShardSet`."""
    if channels not in (1, 3):
        raise ConfigError(
            f"the backbone takes images of {channels} channels, and images have 1 or 3; a latent network needs "
            "its codec (a vae/ beside it, or backbone.codec=FOLDER)"
        )
    transform = Transform(channels, config.size, config.fit)
    if config.stream or is_remote(config.path):
        return open_shards(config, transform)
    path, kind = Path(config.path).expanduser(), config.kind
    if config.path in BUNDLED and not path.exists():
        path, kind = Path(str(resources.files(__name__) / "bundled" / f"{config.path}.npz")), "npz"
    kind = _guess_kind(path, config.path) if kind == "auto" else kind
    image_key, label_key = config.image_key, config.label_key
    if kind not in KEYED and (image_key or label_key):
        raise ConfigError(f"data.image_key and data.label_key are for the kinds {KEYED}, and this is {kind!r}")
    if kind == "npz":
        readers, classes = read_npz(path)
    elif kind == "torchvision":
        readers, classes = read_torchvision(config.name, path, config.splits, config.download)
    elif kind == "hf":
        readers, classes = read_hf(str(path) if path.exists() else config.path, config.splits, image_key, label_key)
    elif kind == "csv":
        readers, classes = read_table(path, image_key, label_key)
    elif kind == "webdataset":
        if isinstance(label_key, tuple):
            raise ConfigError(f"data.label_key of shards is one key of their .json, given: {list(label_key)}")
        readers, classes = read_tars(config.path, image_key, label_key)
    elif kind == "vtab":
        readers, classes = read_vtab(path)
    else:
        readers, classes = read_folder(path)
    chosen = pick_splits(list(readers), config.splits)
    return ImageSet({name: readers[name] for name in chosen}, transform, classes, config.limit)


def _guess_kind(path: Path, given: str) -> str:
    by_suffix = {".npz": "npz", ".csv": "csv", ".tsv": "csv", ".tar": "webdataset"}
    if not path.is_dir():
        if path.suffix.lower() in by_suffix:
            return by_suffix[path.suffix.lower()]
        raise DataError(f"no data at {given!r}; {suggest(given, list(BUNDLED))} A hub id needs data.kind=hf")
    if (path / "train800.txt").is_file() and (path / "val200.txt").is_file():
        return "vtab"
    suffixes = {Path(name).suffix.lower() for name in files_below(path, EXTENSIONS | {".tar", ".parquet"})}
    if ".parquet" in suffixes:
        return "hf"
    # An archive often lies beside the images that were unpacked from it.
    return "webdataset" if ".tar" in suffixes and not suffixes & EXTENSIONS else "folder"
