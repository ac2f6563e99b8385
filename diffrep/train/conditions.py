"""What each image of a data set is conditioned on in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffrep.backbones import Backbone
from diffrep.backbones.conditioning import Condition
from diffrep.config import DistillConfig
from diffrep.data import ImageSet
from diffrep.errors import ConfigError, DataError
from diffrep.extract.job import read_cond


class Conditions:
    """What each image of a data set is conditioned on.

    Args:
        config: Says what.
        teacher: Knows which tensors it stands for.
        images: Has labels, class names and ids.

    Raises:
        ConfigError: The condition does not fit the network, or the data have no labels or class names.
        DataError: The captions cannot be read, or an image has none.
    """

    def __init__(self, config: DistillConfig, teacher: Backbone, images: ImageSet):
        self.teacher = teacher
        self._of_row: list[int] | list[str] | None = None
        if config.labels or "{label}" in (config.captions or ""):
            if not images.labelled or images.multilabel:
                raise ConfigError(
                    "distill.labels and a caption with {label} need data that have one label each; give distill.cond, "
                    "one condition for all"
                )
            self._of_row = [images.label(row) for row in range(len(images))]
        if config.captions is not None:
            self._of_row = _captions(config.captions, images, self._of_row)
        # Here too for conditions that differ: the first says whether they fit.
        first = read_cond(config.cond) if self._of_row is None else self._of_row[:1]
        self._all = teacher.condition(first, 1)
        if self._of_row is None:
            teacher.conditioner.release()

    def __call__(self, rows: Sequence[int]) -> Condition:
        """Returns the condition of some rows of the data set; one row serves all where they have the same."""
        if self._of_row is None:
            return self._all
        return self.teacher.condition([self._of_row[row] for row in rows], len(rows))


def _captions(given: str, images: ImageSet, labels: list[int] | None) -> list[str]:
    if labels is not None:
        if images.classes is None:
            raise ConfigError("distill.captions names {label}, and the classes of these data have no names")
        return [given.replace("{label}", images.classes[label].replace("_", " ")) for label in labels]
    try:
        texts = json.loads(Path(given).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the captions in {given}: {error}") from error
    ids = [images.id(row) for row in range(len(images))]
    if not isinstance(texts, dict):
        raise DataError(f"{given} must hold an object {{sample id: prompt}}, such as {{{ids[0]!r}: 'a dog'}}")
    without = [name for name in ids if not isinstance(texts.get(name), str)]
    if without:
        raise DataError(f"{given} has no caption for {len(without)} of {len(ids)} images, such as {without[0]!r}")
    return [texts[name] for name in ids]
