"""Checkpoints of a run: whole or not there, bounded in number, read back exactly."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from diffrep.config import TrainConfig, to_plain, validate
from diffrep.errors import CheckpointError, ConfigError, StoreError
from diffrep.store.layout import changes, read_json, write_json, write_whole
from diffrep.train.average import Average

# Keys that may change between a run and its resume without changing a single number of it.
# `steps` too: a run may be cut short or drawn out, and its learning rate then decays to the new end.
FREE_KEYS = ("steps", "out", "checkpoint_every", "keep", "log_every", "bins", "trackers", "watch", "workers")
DATA = "data.json"
# What accelerate writes a network to that is spread over processes.
SPREAD = "pytorch_model_fsdp_0"
LEAST_ROOM = 2**20  # bytes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What saving and loading raise: torch says of a full disk that a writer failed, and a sharded checkpoint collects
# what went wrong anywhere in an exception that is no Exception.
FAILURES = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError, CheckpointException)


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

    A checkpoint holds weights, average and optimizer, the same whatever the number of processes that wrote it; the
    run's randomness and its place in the data follow from the step. All processes call the methods.

    Args:
        accelerator: Writes and reads weights and optimizer.
        run: The run's folder.
        keep: How many are kept.
        network: What is trained, without what Accelerate has put around it.
        average: Is written and read with them.
    """

    def __init__(self, accelerator: Accelerator, run: Path, keep: int, network: nn.Module, average: Average):
        self.accelerator, self.run, self.keep, self.average = accelerator, run, keep, average
        self.folder = run / "checkpoints"

        # DDP and torch.compile put words of their own before the names of the weights.
        def bare_weights(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
            weights[:] = [network.state_dict()] if weights else []

        def bare_models(models: list[nn.Module], folder: str) -> None:
            models[:] = [network] if models else []

        accelerator.register_save_state_pre_hook(bare_weights)
        accelerator.register_load_state_pre_hook(bare_models)

    def found(self) -> list[Path]:
        """Returns those that are there, the newest last."""
        return sorted(self.folder.glob("step-*"), key=_step_of)

    def resume(self) -> int:
        """Goes back to the newest one and returns its step; 0 without any.

        Raises:
            CheckpointError: It cannot be read.
        """
        saved = self.found()
        step = _step_of(saved[-1]) if saved else 0
        if self.accelerator.is_main_process:
            for name in ("log.jsonl", "watch.jsonl"):
                _cut(self.run / name, step)
        if not saved:
            return 0
        spread = (saved[-1] / SPREAD).is_dir()
        if spread != self.accelerator.is_fsdp2:
            raise CheckpointError(
                f"{saved[-1]} was written with{'' if spread else 'out'} FSDP; go on with it as it was written"
            )
        try:
            self.accelerator.load_state(str(saved[-1]))
            self.average.load(saved[-1], step)
        except FAILURES as error:
            raise CheckpointError(
                f"cannot read the checkpoint {saved[-1]}: {error}; delete it to go on from the one before"
            ) from error
        self.accelerator.print(f"resumed {self.run} at step {step}")
        return step

    def save(self, step: int) -> None:
        """Writes a checkpoint whole or not at all, then drops the oldest.

        Raises:
            CheckpointError: It cannot be written; the ones before stay.
        """
        partial = self.folder / f"partial-{step:07d}"
        # One after another, since a process that fails must not leave the others waiting in the next.
        for work, everywhere in (
            (self._clear, False),
            (lambda: self.accelerator.save_state(str(partial)), True),
            (lambda: self.average.save(partial), True),
            (lambda: self._accept(partial, step), False),
        ):
            error = self._attempt(work if everywhere or self.accelerator.is_main_process else lambda: None)
            if error is not None:
                reason = _reason(error, self.run)
                if self.accelerator.is_main_process:
                    shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(
                    f"cannot write the checkpoint of step {step} to {self.folder}: {reason}; the checkpoints before "
                    "it stay, run again to go on"
                ) from error

    def _attempt(self, work: Callable[[], Any]) -> BaseException | None:
        """Does a part of the work and returns what failed, here or in another process."""
        failed: BaseException | None = None
        try:
            work()
        except FAILURES as error:
            failed = error
        count = torch.tensor(float(failed is not None), device=self.accelerator.device)
        anywhere = self.accelerator.reduce(count, "sum").item() > 0
        return failed or (RuntimeError("another process could not") if anywhere else None)

    def _clear(self) -> None:
        """Takes away what a run that was killed has left."""
        for rest in self.folder.glob("partial-*"):
            shutil.rmtree(rest)

    def _accept(self, partial: Path, step: int) -> None:
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        replace_folder(partial, self.folder / f"step-{step:07d}")
        for old in self.found()[: -self.keep]:
            shutil.rmtree(old)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _reason(error: BaseException, folder: Path) -> str:
    """Returns why something could not be written, in one line; torch does not say of a full disk that it is full."""
    if shutil.disk_usage(folder).free < LEAST_ROOM:
        return "the disk is full"
    return str(error).partition("\n")[0]


def replace_folder(partial: Path, target: Path) -> None:
    """Gives a folder that is complete its name, in place of what was there."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


@contextmanager
def full_disk(run: str) -> Iterator[None]:
    """Says in one line what to do where something could not be written for lack of room.

    Raises:
        CheckpointError: It could not.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, StoreError) as error:
        reasons = [os.strerror(code) for code in DISK_FULL if os.strerror(code) in str(error)]
        if not reasons:
            raise
        raise CheckpointError(
            f"cannot write to {run}: {reasons[0]}; its checkpoints stay: make room and run again"
        ) from error


def _cut(file: Path, step: int) -> None:
    """Drops the lines after a step, which come again.

    A line that was being written when the run was killed has no end.
    """
    if file.exists():
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_whole(file, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())
