"""Trackers beside `log.jsonl`: TensorBoard, Weights & Biases and trackio, as Accelerate speaks to them."""

from __future__ import annotations

import importlib.util
import json
import uuid
import warnings
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from diffrep.config import TrainConfig, to_plain
from diffrep.errors import BackendUnavailable
from diffrep.store.layout import write_whole

PROJECT, FOLDER = "diffrep", "tracking"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises where a tracker's package is missing.

    Raises:
        BackendUnavailable: It is.
    """
    # The packages are called as the trackers are.
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            f"trackers={missing[0]} needs a package that is not installed: pip install {' '.join(missing)}; "
            "log.jsonl is written in any case"
        )


class Trackers:
    """The trackers of a run, on its main process.

    No tracker can end a run: one that raises is warned of and left out from then on, and `log.jsonl` has it all. Only
    at the start of a new run, when nothing is lost, it raises.

    A resumed run goes on in the tracker's own record: TensorBoard drops the steps that come again, and the others find
    it by the id in `tracking/id`.

    Args:
        accelerator: The run's.
        run: Its folder.
        config: Its settings.
        first: Steps that are done already.

    Raises:
        BackendUnavailable: A tracker of a new run does not start.
    """

    def __init__(self, accelerator: Accelerator, run: Path, config: TrainConfig, first: int):
        self._running: dict[str, GeneralTracker] = {}
        for name in config.trackers if accelerator.is_main_process else ():
            try:
                self._running[name] = _start(name, run, config, first)
            except Exception as error:
                if not first:
                    raise BackendUnavailable(
                        f"trackers={name} does not start: {error}; mend that, or leave it out: log.jsonl is written "
                        "in any case"
                    ) from error
                _lost(name, error)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Tells the trackers the numbers of a step."""
        self._each(lambda tracker: tracker.log(numbers, step=step))

    def close(self) -> None:
        """Lets the trackers finish."""
        self._each(lambda tracker: tracker.finish())
        self._running.clear()

    def _each(self, act: Any) -> None:
        for name, tracker in list(self._running.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._running[name]
                _lost(name, error)


def _start(name: str, run: Path, config: TrainConfig, first: int) -> GeneralTracker:
    own = _id(run / FOLDER / "id")
    given: dict[str, dict[str, Any]] = {
        "tensorboard": {"logging_dir": str(run / FOLDER)} | ({"purge_step": first + 1} if first else {}),
        "wandb": {"id": own, "name": run.name, "resume": "allow", "dir": str(run / FOLDER)},
        "trackio": {"name": f"{run.name}-{own}", "resume": "allow"},
    }
    tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **given[name])
    tracker.start()
    if not first:
        plain = to_plain(config)
        # TensorBoard takes no sections.
        tracker.store_init_configuration({"config": json.dumps(plain)} if name == "tensorboard" else plain)
    return tracker


def _id(file: Path) -> str:
    """Returns the name of a run among all runs, drawn when it begins."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, uuid.uuid4().hex[:12].encode())
    return file.read_text()


def _lost(name: str, error: Exception) -> None:
    warnings.warn(
        f"the tracker {name} failed and is left out from now on: {error}; log.jsonl has all numbers", stacklevel=4
    )
