"""Folders of image files: flat, one folder a class, or one folder a split with classes below."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from diffrep.data.images import EXTENSIONS, check_text, decode
from diffrep.data.labels import label_digest
from diffrep.errors import DataError

SPLIT_NAMES = ("train", "val", "valid", "validation", "test")


class FileReader:
    """Image files of one split.

    Args:
        root: Folder that the paths are relative to.
        files: Paths, which are the ids too.
        labels: (n,) or (n, L) int64, or None.
        listed: The labels stand in a list, not in the paths, so the fingerprint covers them.
    """

    def __init__(self, root: Path, files: list[str], labels: np.ndarray | None, listed: bool = False):
        self.root, self.ids, self.labels, self.listed = root, files, labels, listed

    def image(self, index: int) -> Image.Image:
        """Reads one file."""
        return decode(self.root / self.ids[index])

    def fingerprint(self) -> list[object]:
        """Returns (path, bytes) of every file, and a digest of listed labels."""
        files: list[object] = [(name, (self.root / name).stat().st_size) for name in self.ids]
        return [*files, label_digest(self.labels)] if self.listed else files


def files_below(root: Path, suffixes: Collection[str]) -> list[str]:
    """Returns the paths, relative to `root` and sorted, of the files with one of these suffixes at any depth.

    Links are followed; hidden files, and what is no file (pipes, devices), are passed over.

    Raises:
        DataError: A folder cannot be listed, a link leads back to a folder it lies in, or a name is not UTF-8.
    """
    found: list[str] = []
    # Of each folder: its path below root, and the real paths of those it lies in and its own.
    folders = [("", (os.path.realpath(root),))]
    while folders:
        inside, above = folders.pop()
        try:
            with os.scandir(root / inside) as entries:
                for entry in entries:
                    path = f"{inside}/{entry.name}" if inside else entry.name
                    suffix = os.path.splitext(entry.name)[1].lower()
                    if entry.is_dir():
                        folders.append((path, (*above, _real_path(entry, above))))
                    elif suffix in suffixes and entry.name[0] != "." and entry.is_file():
                        check_text(path)
                        found.append(path)
        except OSError as error:
            raise DataError(f"cannot list {str(root / inside)!r}: {error}") from error
    return sorted(found)


def _real_path(folder: os.DirEntry[str], above: tuple[str, ...]) -> str:
    if not folder.is_symlink():
        return os.path.join(above[-1], folder.name)
    real = os.path.realpath(folder.path)
    if real in above:
        raise DataError(f"the link {folder.path!r} leads back to {real!r}, which it lies in; remove it")
    return real


def read_folder(root: Path) -> tuple[dict[str, FileReader], list[str] | None]:
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
    files = files_below(root, EXTENSIONS)
    if not files:
        raise DataError(f"no image in {str(root)!r}; looked for {', '.join(sorted(EXTENSIONS))} at any depth")
    tops = {f.split("/")[0] for f in files if "/" in f}
    has_splits = bool(tops) and tops <= set(SPLIT_NAMES) and all("/" in f for f in files)
    level = 1 if has_splits else 0
    labelled = all(f.count("/") > level for f in files)
    classes = sorted({f.split("/")[level] for f in files}) if labelled else None
    numbers = {name: i for i, name in enumerate(classes or ())}
    names = [name for name in SPLIT_NAMES if name in tops] if has_splits else ["all"]
    readers = {}
    for name in names:
        inside = [f for f in files if f.startswith(name + "/")] if has_splits else files
        labels = np.array([numbers[f.split("/")[level]] for f in inside]) if labelled else None
        readers[name] = FileReader(root, inside, labels)
    return readers, classes
