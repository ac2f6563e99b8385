"""The files of a feature store and what stands in them.

    store/meta.json  index.json  units/0000/0000123.safetensors  units/0000/0000123.json      (1,000 units a folder)

A unit is a fixed range of samples of one split. It holds a tensor "{layer}@{level}" (n, ...) for each pair, `row`
(int64, the sample's place in the data set) and, for labelled data, `label` (int64); its JSON holds the ids, the
samples that were skipped, and the SHA-256 of the tensors' file. meta.json says what the features are; index.json
is written when all units are there.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from diffrep.errors import StoreError

# Goes up when a change makes the same request give other numbers; old stores then refuse to be extended.
NUMERICS = 1
META, INDEX = "meta.json", "index.json"


@dataclass(frozen=True)
class Unit:
    """A range of samples.

    Attributes:
        number: Position among all units.
        split: Split of all its samples.
        rows: Places in the data set.
    """

    number: int
    split: str
    rows: range


def list_units(splits: dict[str, range], unit_size: int) -> list[Unit]:
    """Cuts each split into units."""
    cuts = [
        (split, range(start, min(start + unit_size, rows.stop)))
        for split, rows in splits.items()
        for start in range(rows.start, rows.stop, unit_size)
    ]
    return [Unit(number, split, rows) for number, (split, rows) in enumerate(cuts)]


def tensor_file(store: Path, number: int) -> Path:
    """Returns the path of a unit's tensors."""
    return store / "units" / f"{number // 1000:04d}" / f"{number:07d}.safetensors"


def info_file(store: Path, number: int) -> Path:
    """Returns the path of a unit's JSON; the unit exists when this file does."""
    return tensor_file(store, number).with_suffix(".json")


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that is seen whole or not at all.

    It has a temporary name until the block ends; then come fsync, rename and fsync of the folder.

    Raises:
        StoreError: The file cannot be written; nothing of it stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; finished units stay, run again to go on"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is seen whole or not at all; see `open_whole`."""
    with open_whole(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Tells in what a folder's stored settings differ from those of now: "KEY: OLD there, NEW now", by key.

    A key that is missing counts as None.
    """
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return [f"{key}: {before.get(key)} there, {now.get(key)} now" for key in differ]
