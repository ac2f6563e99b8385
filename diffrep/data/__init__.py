"""Images with stable ids: `open_images` finds the right reader for a `DataConfig`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from diffrep.config import DataConfig
from diffrep.data.arrays import read_hf, read_npz, read_torchvision
from diffrep.data.folder import read_folder
from diffrep.data.images import ImageSet, Transform, pick_splits
from diffrep.errors import ConfigError, DataError, suggest

BUNDLED = {"fashion-demo": "4,000 training and 1,000 test images of Fashion-MNIST, 28x28, one channel, 10 classes"}
__all__ = ["BUNDLED", "ImageSet", "Transform", "open_images"]


def open_images(config: DataConfig, channels: int) -> ImageSet:
    """Opens a data set.

    Args:
        config: What to open and how to bring images to the backbone's input.
        channels: Channels of the backbone's images, 1 or 3; images are converted.

    Raises:
        ConfigError: The channel count is neither 1 nor 3.
        DataError: Nothing readable is there.
        UnknownNameError: A split, column or set name does not exist.
    """
    if channels not in (1, 3):
        raise ConfigError(
            f"the backbone takes images of {channels} channels, and images have 1 or 3; a latent network needs "
            "its codec (a vae/ beside it, or backbone.codec=FOLDER)"
        )
    path, kind = Path(config.path).expanduser(), config.kind
    if config.path in BUNDLED and not path.exists():
        path, kind = Path(str(resources.files(__name__) / "bundled" / f"{config.path}.npz")), "npz"
    kind = _guess_kind(path, config.path) if kind == "auto" else kind
    if kind == "npz":
        readers, classes = read_npz(path)
    elif kind == "torchvision":
        readers, classes = read_torchvision(config.name, path, config.splits, config.download)
    elif kind == "hf":
        readers, classes = read_hf(
            str(path) if path.exists() else config.path, config.splits, config.image_key, config.label_key
        )
    else:
        readers, classes = read_folder(path)
    chosen = pick_splits(list(readers), config.splits)
    transform = Transform(channels, config.size, config.fit)
    return ImageSet({name: readers[name] for name in chosen}, transform, classes, config.limit)


def _guess_kind(path: Path, given: str) -> str:
    if path.suffix == ".npz":
        return "npz"
    if path.is_dir():
        return "hf" if next(path.rglob("*.parquet"), None) else "folder"
    raise DataError(f"no data at {given!r}; {suggest(given, list(BUNDLED))} A hub id needs data.kind=hf")
