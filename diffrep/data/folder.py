"""Folders of image files: flat, one folder a class, or one folder a split with classes below."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffrep.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"})
SPLIT_NAMES = ("train", "val", "valid", "validation", "test")


class FolderReader:
    """Image files below a root; ids are their POSIX paths relative to it, in sorted order."""

    def __init__(self, root: Path, files: list[str], classes: list[str] | None, level: int):
        self.root = root
        self.ids = files
        numbers = {name: i for i, name in enumerate(classes)} if classes else None
        self.labels = np.array([numbers[f.split("/")[level]] for f in files]) if numbers else None

    def image(self, index: int) -> Image.Image:
        """Reads one file."""
        try:
            image = Image.open(self.root / self.ids[index])
            image.load()
            return image
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the image: {error}") from error

    def fingerprint(self) -> list[object]:
        """Returns (path, bytes) of every file."""
        return [(name, (self.root / name).stat().st_size) for name in self.ids]


def read_folder(root: Path) -> tuple[dict[str, FolderReader], list[str] | None]:
    """Finds the images below `root`.

    Folders named train, val, valid, validation or test at the top are splits, otherwise everything is split "all". The
    next folder level, where every image has one, gives the classes, numbered in sorted order over all splits.

    Returns:
        A reader for each split, and the class names or None.

    Raises:
        DataError: There is no such folder or no image in it.
    """
    if not root.is_dir():
        raise DataError(f"no image folder {str(root)!r}")
    files = sorted(
        Path(folder, name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")
    )
    if not files:
        raise DataError(f"no image in {str(root)!r}; looked for {', '.join(sorted(EXTENSIONS))} at any depth")
    tops = {f.split("/")[0] for f in files if "/" in f}
    has_splits = bool(tops) and tops <= set(SPLIT_NAMES) and all("/" in f for f in files)
    level = 1 if has_splits else 0
    labelled = all(f.count("/") > level for f in files)
    classes = sorted({f.split("/")[level] for f in files}) if labelled else None
    if not has_splits:
        return {"all": FolderReader(root, files, classes, level)}, classes
    names = [name for name in SPLIT_NAMES if name in tops]
    split_files = {name: [f for f in files if f.startswith(name + "/")] for name in names}
    return {name: FolderReader(root, split_files[name], classes, level) for name in names}, classes
