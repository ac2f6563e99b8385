"""VTAB-1k (Zhai et al., 2019): its 19 tasks, a reader of prepared task folders, and its means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffrep.data.folder import FileReader
from diffrep.errors import DataError, UnknownNameError

SPLITS = ("train800", "val200", "test")
UNION = "train800val200"


@dataclass(frozen=True)
class VtabTask:
    """A task of VTAB.

    Attributes:
        group: "Natural", "Specialized" or "Structured".
        classes: Number of classes.
    """

    group: str
    classes: int


# By the folder names of the prepared archives.
TASKS: dict[str, VtabTask] = {
    "caltech101": VtabTask("Natural", 102),
    "cifar": VtabTask("Natural", 100),
    "dtd": VtabTask("Natural", 47),
    "oxford_flowers102": VtabTask("Natural", 102),
    "oxford_iiit_pet": VtabTask("Natural", 37),
    "svhn": VtabTask("Natural", 10),
    "sun397": VtabTask("Natural", 397),
    "patch_camelyon": VtabTask("Specialized", 2),
    "eurosat": VtabTask("Specialized", 10),
    "resisc45": VtabTask("Specialized", 45),
    "diabetic_retinopathy": VtabTask("Specialized", 5),
    "clevr_count": VtabTask("Structured", 8),
    "clevr_dist": VtabTask("Structured", 6),
    "dmlab": VtabTask("Structured", 6),
    "kitti": VtabTask("Structured", 4),
    "dsprites_loc": VtabTask("Structured", 16),
    "dsprites_ori": VtabTask("Structured", 16),
    "smallnorb_azi": VtabTask("Structured", 18),
    "smallnorb_ele": VtabTask("Structured", 9),
}


def read_vtab(root: Path) -> tuple[dict[str, FileReader], None]:
    """Opens a prepared task folder: images, and train800.txt, val200.txt, test.txt with lines "relative/path label".

    The published recipe chooses settings on train800 against val200, fits again on both together and reports the whole
    test split. The archives hold the images of train800val200 a second time under other names, so that split is not
    read: it is the first two. Where its list is there, that is checked by labels and file sizes.

    Returns:
        Readers of train800, val200 and test, and no class names, which the archives lack.

    Raises:
        DataError: A list or an image is missing, a line cannot be read, or a label is above the task's classes.
    """
    lists = {name: _read_list(root, name) for name in SPLITS}
    if (root / f"{UNION}.txt").exists():
        parts, union = [*lists["train800"], *lists["val200"]], _read_list(root, UNION)
        if _contents(root, parts) != _contents(root, union):
            raise DataError(
                f"{root / UNION}.txt lists other samples ({len(union)}) than train800.txt and val200.txt together "
                f"({len(parts)}); prepare the folder again"
            )
    return {
        name: FileReader(root, [path for path, _ in lines], np.array([label for _, label in lines]), listed=True)
        for name, lines in lists.items()
    }, None


def vtab_means(scores: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Averages scores over the groups of VTAB and over all 19 tasks.

    Args:
        scores: A score for each task, by folder name.

    Returns:
        For "Natural", "Specialized", "Structured" and "all": "mean", which is None where tasks are missing, "tasks"
        (how many there are to be) and "missing" (their names).

    Raises:
        UnknownNameError: A name is no task.
    """
    for name in scores:
        if name not in TASKS:
            raise UnknownNameError("VTAB task", name, TASKS)
    groups = {group: [n for n, task in TASKS.items() if task.group == group] for group in _GROUPS}
    groups["all"] = list(TASKS)
    means: dict[str, dict[str, Any]] = {}
    for group, names in groups.items():
        missing = [name for name in names if name not in scores]
        mean = None if missing else float(np.mean([scores[name] for name in names]))
        means[group] = {"mean": mean, "tasks": len(names), "missing": missing}
    return means


_GROUPS = ("Natural", "Specialized", "Structured")


def _read_list(root: Path, name: str) -> list[tuple[str, int]]:
    file, task, found = root / f"{name}.txt", TASKS.get(root.resolve().name), {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {file}: {error}; a prepared VTAB-1k task holds images/ and {', '.join(SPLITS)} as .txt"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise DataError(f"{file}, line {number}: {line!r}; expected 'relative/path label' with an integer label")
        if task is not None and int(label) >= task.classes:
            raise DataError(f"{file}, line {number}: label {label}, and {root.name} has {task.classes} classes")
        if path in found:
            raise DataError(f"{file}, line {number}: {path!r} is listed twice")
        if not (root / path).is_file():
            raise DataError(f"{file}, line {number}: there is no file {str(root / path)!r}")
        found[path] = int(label)
    if not found:
        raise DataError(f"{file} lists no images")
    return list(found.items())


def _contents(root: Path, lines: list[tuple[str, int]]) -> list[tuple[int, int]]:
    return sorted((label, (root / path).stat().st_size) for path, label in lines)
