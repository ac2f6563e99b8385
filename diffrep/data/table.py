"""Tables of image paths and labels: `.csv` and `.tsv` files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from diffrep.data.folder import SPLIT_NAMES, FileReader
from diffrep.data.labels import from_text, label_columns, number_labels
from diffrep.errors import DataError, UnknownNameError

IMAGE, LABEL, SPLIT = "path", "label", "split"


def read_table(
    file: Path, image_key: str | None, label_key: str | tuple[str, ...] | None
) -> tuple[dict[str, FileReader], list[str] | None]:
    """Reads a table with a header: a path a line, and optionally its label or labels and its split.

    Args:
        file: The table; tabs separate the columns of a `.tsv`, commas those of any other.
        image_key: Column of the paths, relative to the table's folder; None takes "path", else the first column.
        label_key: Column of the label, integers or names; several columns of 0 and 1 for several labels; None takes
            "label" where there is one.

    Returns:
        A reader for each value of the column "split", or one for "all", and the class names or None.

    Raises:
        DataError: The table, a path or a label is not usable; the message names the line.
        UnknownNameError: There is no such column.
    """
    lines, rows = _read_rows(file)
    columns = list(rows[0])
    image_key = image_key or (IMAGE if IMAGE in columns else columns[0])
    if image_key not in columns:
        raise UnknownNameError("image column", image_key, columns)
    paths = [row[image_key] for row in rows]
    _check_paths(file, lines, paths)
    label_key = label_key or (LABEL if LABEL in columns else None)
    keys = [] if label_key is None else label_columns(label_key, columns)
    labels, classes = _read_labels(file, lines, rows, keys) if keys else (None, None)
    splits = np.array([row.get(SPLIT, "all") for row in rows])
    if "" in splits:
        raise DataError(f"{file}, line {lines[list(splits).index('')]}: the split is empty")
    names = sorted(set(splits.tolist()), key=lambda s: (SPLIT_NAMES.index(s) if s in SPLIT_NAMES else 99, s))
    readers = {}
    for name in names:
        inside = np.flatnonzero(splits == name)
        part = None if labels is None else labels[inside]
        readers[name] = FileReader(file.parent, [paths[i] for i in inside], part, listed=True)
    return readers, classes


def _read_rows(file: Path) -> tuple[list[int], list[dict[str, str]]]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
            found = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {file}: {error}") from error
    if not found:
        raise DataError(f"the table {file} holds no samples; its first line names the columns, each other is a sample")
    for line, row in found:
        # DictReader files surplus fields under None and fills missing ones with None.
        if None in row or None in row.values():
            given = sum(value is not None for key, value in row.items() if key) + len(row.get(None, ()))
            raise DataError(f"{file}, line {line}: {given} columns where the header has {len(row) - (None in row)}")
    return [line for line, _ in found], [row for _, row in found]


def _check_paths(file: Path, lines: list[int], paths: list[str]) -> None:
    seen: dict[str, int] = {}
    for line, path in zip(lines, paths, strict=True):
        if path in seen:
            raise DataError(f"{file}, line {line}: {path!r} stands in line {seen[path]} already")
        if not (file.parent / path).is_file():
            raise DataError(f"{file}, line {line}: there is no file {str(file.parent / path)!r}")
        seen[path] = line


def _read_labels(
    file: Path, lines: list[int], rows: list[dict[str, str]], keys: list[str]
) -> tuple[np.ndarray, list[str] | None]:
    if len(keys) == 1:
        return number_labels([from_text(row[keys[0]]) for row in rows], lambda i: f"{file}, line {lines[i]}")
    for line, row in zip(lines, rows, strict=True):
        for key in keys:
            if row[key] not in ("0", "1"):
                raise DataError(
                    f"{file}, line {line}: {row[key]!r} in column {key!r}; several label columns hold 0 or 1"
                )
    return np.array([[int(row[key]) for key in keys] for row in rows], dtype=np.int64), keys
