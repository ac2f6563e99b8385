"""Files of a store that somebody else may have made: none is read that lies outside."""

from __future__ import annotations

import os
from pathlib import Path

from diffrep.errors import StoreError
from diffrep.store.place import Place


def read_inside(place: Place, name: str) -> bytes:
    """Reads a file of a store.

    Raises:
        StoreError: It is missing, cannot be read, or leads out of the store.
    """
    check_inside(place, name)
    return place.read(name)


def check_inside(place: Place, name: str) -> Path | None:
    """Returns the local path of a file, None where there is none.

    Raises:
        StoreError: It is a link that leads out of the place, or no regular file, whose reading might never end.
    """
    path = place.file(name)
    if path is None:
        return None
    above = [path, *path.parents][: len(Path(name).parts)]
    if any(map(os.path.islink, above)):
        root, real = os.path.realpath(place.target), os.path.realpath(path)
        if os.path.commonpath([root, real]) != root:
            raise StoreError(f"{path} is a link that leads out of the store, to {real}; copy what it points to")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise StoreError(f"{path} is no file; remove it and extract again")
    return path
