"""Reading annotation files, with one clear error each."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from diffrep.data.pairs import Box
from diffrep.errors import DataError, UnknownNameError


def read_json(file: Path) -> Any:
    """Reads a JSON file.

    Raises:
        DataError: It is missing or not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def read_lines(file: Path) -> list[str]:
    """Reads the lines of a text file that are not blank.

    Raises:
        DataError: It is missing or not text.
    """
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def read_numbered(file: Path) -> dict[int, str]:
    """Reads lines "number text".

    Raises:
        DataError: The file or a line cannot be read.
    """
    found = {}
    for line in read_lines(file):
        number, _, text = line.strip().partition(" ")
        if not number.isdecimal() or not text:
            raise DataError(f"{file}: {line!r}; expected a number and a text")
        found[int(number)] = text.strip()
    return found


def read_table(file: Path) -> tuple[list[str], list[list[str]]]:
    """Reads a table of comma-separated values.

    Returns:
        The header, and the rows, each as long as the header.

    Raises:
        DataError: It cannot be read, holds no rows, or a row has another length.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            rows = [row for row in csv.reader(text, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    if len(rows) < 2:
        raise DataError(f"{file} holds no pairs; its first line names the columns, each other is a pair")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise DataError(f"{file}, row {number}: {len(row)} columns where the header has {len(rows[0])}")
    return rows[0], rows[1:]


def points_of(values: Any, where: str) -> np.ndarray:
    """Returns points (K, 2) float64; None among the values, or NaN in one, makes NaN: a point that is not visible.

    Raises:
        DataError: They are not pairs of numbers.
    """
    try:
        rows = [(np.nan, np.nan) if value is None else tuple(value) for value in values]
        points = np.array(rows, dtype=np.float64).reshape(len(rows), 2)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: points are a list of [x, y] or null, given: {str(values)[:80]}") from error
    points[np.isnan(points).any(axis=1)] = np.nan
    return points


def box_of(values: Any, where: str) -> Box:
    """Returns a box (x0, y0, x1, y1).

    Raises:
        DataError: It is not four numbers, or has no area.
    """
    x0, y0, x1, y1 = _four(values, "[x0, y0, x1, y1]", where)
    if not (x1 > x0 and y1 > y0):
        raise DataError(f"{where}: the box {[x0, y0, x1, y1]} has no area; it must be x0, y0, x1, y1")
    return x0, y0, x1, y1


def box_of_extent(values: Any, where: str) -> Box:
    """Returns a box (x0, y0, x1, y1) that is given by its corner and extent, [x, y, width, height].

    Raises:
        DataError: It is not four numbers, or has no area.
    """
    x, y, width, height = _four(values, "x, y, width, height here", where)
    return box_of((x, y, x + width, y + height), where)


def box_around(points: np.ndarray) -> Box | None:
    """Returns the box of points (K, 2), without those that are NaN; None where it would have no area."""
    visible = points[~np.isnan(points).any(axis=1)]
    if not len(visible):
        return None
    low, high = visible.min(axis=0), visible.max(axis=0)
    return (*low.tolist(), *high.tolist()) if (high > low).all() else None


def split_named(wanted: str | None, available: dict[str, Any], what: str) -> Any:
    """Returns the entry of a split, of "test" when none is named.

    Args:
        wanted: Name, or None.
        available: Entries by the names that users write.
        what: Name of the set, for the message.

    Raises:
        UnknownNameError: There is no such split.
    """
    name = "test" if wanted is None else wanted
    if name not in available:
        raise UnknownNameError(f"split of {what}", name, available)
    return available[name]


def _four(values: Any, form: str, where: str) -> tuple[float, float, float, float]:
    try:
        a, b, c, d = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: a box is {form}, given: {str(values)[:80]}") from error
    return a, b, c, d
