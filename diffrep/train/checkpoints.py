"""Checkpoints of a run: whole or not there, bounded in number, read back exactly."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from diffrep.config import TrainConfig, to_plain, validate
from diffrep.errors import CheckpointError, ConfigError
from diffrep.store.layout import changes, read_json, write_json, write_whole
from diffrep.train.average import Average

# Keys that may change between a run and its resume without changing a single number of it.
# `steps` too: a run may be cut short or drawn out, and its learning rate then decays to the new end.
FREE_KEYS = ("steps", "out", "checkpoint_every", "keep", "log_every", "bins", "trackers", "watch", "workers")
DATA = "data.json"


def refuse_another(run: Path, config: TrainConfig) -> None:
    """Raises where a run folder belongs to other settings.

    Raises:
        ConfigError: It does; every key that differs is named.
    """
    stored = run / "config.json"
    if not stored.exists():
        return
    # Keys that the stored run does not know had their defaults' meaning.
    before = validate(TrainConfig, read_json(stored), str(stored))
    differ = changes(*(_flat(to_plain(one)) for one in (before, config)))
    if differ:
        raise ConfigError(
            f"{run} holds a run with other settings ({'; '.join(differ)}); use another out, or the same settings"
        )


def refuse_other_data(run: Path, described: dict[str, Any]) -> None:
    """Writes down what a run is trained on, or raises where that has changed since.

    Raises:
        ConfigError: It has; every key that differs is named.
    """
    file = run / DATA
    if file.exists():
        differ = changes(_flat(read_json(file)), _flat(described))
        if differ:
            raise ConfigError(f"{run} was trained on other data ({'; '.join(differ)}); use another out, or those data")
    else:
        write_json(file, described)


def _flat(plain: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Returns settings by their dotted keys, without those that may change."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        if not above and key in FREE_KEYS:
            continue
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


class Checkpoints:
    """The folder `checkpoints/step-*` of a run.

    Args:
        accelerator: Writes and reads weights and optimizer.
        run: The run's folder.
        keep: How many are kept.
        average: Is written and read with them.
    """

    def __init__(self, accelerator: Accelerator, run: Path, keep: int, average: Average):
        self.accelerator, self.run, self.keep, self.average = accelerator, run, keep, average
        self.folder = run / "checkpoints"

    def found(self) -> list[Path]:
        """Returns those that are there, the newest last."""
        return sorted(self.folder.glob("step-*"))

    def resume(self) -> int:
        """Goes back to the newest one and returns its step; 0 without any.

        Raises:
            CheckpointError: It cannot be read.
        """
        saved = self.found()
        if not saved:
            return 0
        step = int(saved[-1].name.removeprefix("step-"))
        try:
            self.accelerator.load_state(str(saved[-1]))
            self.average.load(saved[-1], step)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot read the checkpoint {saved[-1]}: {error}; delete it to go on from the one before"
            ) from error
        if self.accelerator.is_main_process:
            for name in ("log.jsonl", "watch.jsonl"):
                _cut(self.run / name, step)
        self.accelerator.print(f"resumed {self.run} at step {step}")
        return step

    def save(self, step: int) -> None:
        """Writes a checkpoint whole or not at all, then drops the oldest.

        Raises:
            CheckpointError: It cannot be written; the ones before stay.
        """
        partial = self.folder / f"partial-{step:07d}"
        try:
            if self.accelerator.is_main_process and self.folder.is_dir():
                for rest in self.folder.glob("partial-*"):  # of a run that was killed
                    shutil.rmtree(rest)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.average.save(partial)
                target = self.folder / f"step-{step:07d}"
                if target.exists():
                    shutil.rmtree(target)
                os.replace(partial, target)
                for old in self.found()[: -self.keep]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {error}; the checkpoints before it "
                "stay, run again to go on"
            ) from error
        self.accelerator.wait_for_everyone()


def _cut(file: Path, step: int) -> None:
    """Drops the lines after a step, which come again.

    A line that was being written when the run was killed has no end.
    """
    if file.exists():
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_whole(file, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())
