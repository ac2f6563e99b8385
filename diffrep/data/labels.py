"""Labels as numbers: (n,) int64, or (n, L) int64 of 0 and 1 for sources with several labels a sample."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from diffrep.errors import DataError, UnknownNameError

# Of a multi-label set, whose labels have a column for each.
MAX_CLASSES = 1 << 20


def integers(values: Any, what: str) -> np.ndarray:
    """Returns labels that are numbers already, (n,) or (n, L).

    Args:
        values: Integers or booleans, or equally long rows of 0 and 1.
        what: What they are, for the message.

    Raises:
        DataError: They are anything else.
    """
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(0, dtype=object)
    array = array.astype(np.int64) if array.dtype.kind in "iub" or (not array.size and array.ndim == 1) else array
    if array.dtype != np.int64 or array.ndim not in (1, 2):
        raise DataError(f"{what} are not integers")
    if array.ndim == 2 and not np.isin(array, (0, 1)).all():
        raise DataError(f"{what} have several columns, which must hold 0 and 1 only")
    return array


def number_labels(values: list[Any], place: Callable[[int], str]) -> tuple[np.ndarray, list[str] | None]:
    """Numbers labels as files hold them.

    Args:
        values: All integers, which are kept; all names, which are numbered in sorted order; or all lists of one of the
            two, which make rows of 0 and 1.
        place: Says where a value stands, for messages.

    Returns:
        (n,) or (n, L) int64, and the names or None.

    Raises:
        DataError: A value is neither, or of another kind than the ones before.
    """
    several = isinstance(values[0], list)
    rows = [value if isinstance(value, list) else [value] for value in values]
    kind = next((type(label) for row in rows for label in row), int)
    for i, row in enumerate(rows):
        fits = isinstance(values[i], list) == several and kind in (int, str)
        if not fits or any(type(label) is not kind or label == "" or (kind is int and label < 0) for label in row):
            raise DataError(
                f"{place(i)}: label {values[i]!r} is not usable; labels are all integers from 0 on, all names, or all "
                "lists of one of these"
            )
    classes = sorted({label for row in rows for label in row}) if kind is str else None
    if classes is not None:
        numbers = {name: i for i, name in enumerate(classes)}
        rows = [[numbers[label] for label in row] for row in rows]
    if several:
        if classes is not None:
            _refuse_twice(values, place)
        return multi_hot(rows, None if classes is None else len(classes), place), classes
    return np.array([row[0] for row in rows], dtype=np.int64), classes


def multi_hot(rows: list[list[int]], count: int | None, place: Callable[[int], str]) -> np.ndarray:
    """Turns class numbers into rows of 0 and 1, (n, L).

    Rows that are 0 and 1 already are told by a number that comes twice in a row, which class numbers never do. Where
    every row is 0, 1 or 1, 0, and no number of classes is given, they are read as 0 and 1 too: as class numbers they
    would give each sample both classes.

    Args:
        rows: The numbers of each sample's classes.
        count: L; None takes one more than the highest number.
        place: Says where a row stands, for messages.

    Raises:
        DataError: A number comes twice in a row, is not below `count`, or there are more than `MAX_CLASSES`.
    """
    if rows and count is None and all(sorted(row) == [0, 1] for row in rows):
        return np.array(rows, dtype=np.int64)
    if any(len(set(row)) < len(row) for row in rows):
        lengths = {len(row) for row in rows}
        if len(lengths) == 1 and lengths <= {count or len(rows[0])} and all(set(row) <= {0, 1} for row in rows):
            return np.array(rows, dtype=np.int64)
        _refuse_twice(rows, place)
    count = count or max((number for row in rows for number in row), default=-1) + 1
    if count > MAX_CLASSES:
        raise DataError(f"{place(0)} and the others name {count:,} classes, and at most {MAX_CLASSES:,} are allowed")
    hot = np.zeros((len(rows), count), dtype=np.int64)
    for i, row in enumerate(rows):
        if any(not 0 <= number < count for number in row):
            raise DataError(f"{place(i)}: the labels {row} are not all from 0 to {count - 1}")
        hot[i, row] = 1
    return hot


def _refuse_twice(rows: list[list[Any]], place: Callable[[int], str]) -> None:
    for i, row in enumerate(rows):
        if len(set(row)) < len(row):
            raise DataError(f"{place(i)}: the labels {row} name a class twice")


def from_text(text: str) -> int | float | str:
    """Returns an integer where the text is one, a float where it is another number, else the text."""
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) else text


def label_columns(label_key: str | tuple[str, ...], known: Iterable[str]) -> list[str]:
    """Returns the columns that `data.label_key` names: one, several separated by commas, or a list.

    Raises:
        UnknownNameError: There is no such column.
    """
    known = list(known)
    several = label_key.split(",") if isinstance(label_key, str) and label_key not in known else label_key
    names = [several] if isinstance(several, str) else [name.strip() for name in several]
    for name in names:
        if name not in known:
            raise UnknownNameError("label column", name, known)
    return names


def label_digest(labels: np.ndarray | None) -> str:
    """Identifies labels that the files' names do not tell."""
    return hashlib.sha256(b"" if labels is None else labels.tobytes()).hexdigest()[:16]
