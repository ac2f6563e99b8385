"""What a run says of itself: a line of `log.jsonl` every few steps, trackers, the progress bar."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import nn

from diffrep import dist
from diffrep.config import TrainConfig
from diffrep.errors import DiffrepError
from diffrep.train.objective import Loss
from diffrep.train.sharding import local, whole
from diffrep.train.trackers import Trackers

# Dense bf16 or fp16 operations a second, from the makers' data sheets.
PEAK = {
    "A100": 312e12,
    "A10": 125e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Returns what a device can do at most, in operations a second; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # The longest name that fits: an L40S is no L4.
    known = max((card for card in PEAK if card in name), key=len, default=None)
    return None if known is None else PEAK[known]


class Stopwatch:
    """Adds up the time of a part of each step; on CUDA by events, which the step does not wait for."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> Stopwatch:
        self._began = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        self._spans.append((self._began, self._now()))

    def milliseconds(self) -> float | None:
        """Returns the mean since the last call; None where nothing was timed."""
        spans, self._spans = self._spans, []
        if not spans:
            return None
        if self._cuda:
            spans[-1][1].synchronize()
            return sum(began.elapsed_time(ended) for began, ended in spans) / len(spans)
        return sum(ended - began for began, ended in spans) / len(spans) * 1000

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Log:
    """The run's log.

    `log.jsonl` has on each line: step, loss, lr, grad_norm (before clipping, of the last step), images_per_s, seconds
    (of training so far, over all sessions, without measurements), data_wait (share of the time that steps waited for
    data), each part of the objective ("denoise", "align/TERM/LAYER"), loss_bins (the denoising loss in equal parts of
    the way to noise; None for an empty one), teacher_ms (of targets, a step), tflops (of the model's forwards and
    backwards, on one device) and mfu (the share of what the device can do, where that is known).

    Args:
        accelerator: The run's.
        run: Its folder.
        config: Its settings.
        first: Steps that are done already.
        flops: Of the model's forward on one sample; None where it is not known.
        teacher: Times the targets; None where there are none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: Path,
        config: TrainConfig,
        first: int,
        flops: int | None = None,
        teacher: Stopwatch | None = None,
    ):
        self.accelerator, self.config, self.flops, self.teacher = accelerator, config, flops, teacher
        self.file = run / "log.jsonl"
        self.bar = tqdm(total=config.steps, initial=first, desc=dist.label("train"), unit="step")
        self.last: float | None = None
        self.seconds = _seconds(self.file)
        self._peak = peak_flops(accelerator.device)
        self._first = first
        self._losses: list[Loss] = []
        self._waited = 0.0
        self._since = time.perf_counter()
        self._trackers = Trackers(accelerator, run, config, first)

    def step(self, done: int, loss: Loss, norm: torch.Tensor, lr: float, waited: float, module: nn.Module) -> None:
        """Takes note of a step and, when it is time, writes a line.

        Args:
            done: Steps that are done, this one too.
            loss: What the objective gave.
            norm: Norm of the gradients.
            lr: Learning rate.
            waited: Seconds waited for data since the run began.
            module: What is trained, which is looked at when the loss is not finite.
        """
        self._losses.append(loss)
        self.bar.update()
        if done % self.config.log_every and done != self.config.steps:
            return
        mean = self.last = self.check(done, module)
        spent = time.perf_counter() - self._since
        self.seconds += spent
        speed = len(self._losses) * self.config.batch_size / spent
        line = {"step": done, "loss": mean, "lr": lr, "grad_norm": whole(norm).item(), "images_per_s": speed}
        line |= {"seconds": self.seconds, "data_wait": (waited - self._waited) / spent}
        line |= self._parts() | self._work(speed)
        if self.accelerator.is_main_process:
            self.write(line)
            self.bar.set_postfix(loss=f"{mean:.4f}")
        self._losses, self._waited = [], waited
        self.resume()

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line, and tells the trackers its numbers."""
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.track(line)

    def track(self, line: dict[str, Any]) -> None:
        """Tells the trackers the numbers of a line."""
        numbers = {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}
        bins = enumerate(line.get("loss_bins", []))
        self._trackers.log(numbers | {f"loss_bins/{i}": value for i, value in bins if value is not None}, line["step"])

    def resume(self) -> None:
        """Starts the clock again, after something that is no training."""
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock: what comes is no training."""
        self.seconds += time.perf_counter() - self._since
        self.resume()

    def check(self, done: int, module: nn.Module) -> float | None:
        """Returns the mean loss since the last line.

        Raises:
            DiffrepError: It is not finite; says in which step, time bin and layer.
        """
        if not self._losses:
            return self.last
        totals = torch.stack([loss.total for loss in self._losses])
        mean = self.accelerator.reduce(totals.mean(), "mean").item()
        if not math.isfinite(mean):
            raise DiffrepError(self._explain(done, mean, totals, module))
        return mean

    def close(self) -> None:
        """Ends the bar and the trackers."""
        self.bar.close()
        self._trackers.close()

    def _parts(self) -> dict[str, Any]:
        """Returns the means of the objective's parts over steps and processes, and the loss by bins."""
        names = list(self._losses[-1].parts)
        rows = [loss for loss in self._losses if list(loss.parts) == names]  # a term may have ended on the way
        found: dict[str, Any] = {}
        if names:
            means = torch.stack([torch.stack([loss.parts[name].float() for name in names]) for loss in rows]).mean(0)
            found = dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
        if self._losses[-1].values is not None:
            sums, counts = self._binned(torch.cat([loss.places for loss in self._losses]), self._values())
            together = self.accelerator.reduce(torch.stack([sums, counts]), "sum").tolist()
            found["loss_bins"] = [s / n if n else None for s, n in zip(*together, strict=True)]
        return found

    def _values(self) -> torch.Tensor:
        return torch.cat([loss.values for loss in self._losses]).float()

    def _binned(self, places: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bins = self.config.bins
        index = (places * bins).long().clamp(0, bins - 1)
        zeros = torch.zeros(bins, device=values.device)
        return zeros.index_add(0, index, values), zeros.index_add(0, index, torch.ones_like(values))

    def _work(self, speed: float) -> dict[str, float]:
        found = {}
        if self.teacher is not None:
            spent = self.teacher.milliseconds()
            found |= {} if spent is None else {"teacher_ms": spent}
        if self.flops is not None:
            # A backward pass is about two forwards.
            done = 3 * self.flops * speed / self.accelerator.num_processes
            found["tflops"] = done / 1e12
            found |= {} if self._peak is None else {"mfu": done / self._peak}
        return found

    def _explain(self, done: int, mean: float, totals: torch.Tensor, module: nn.Module) -> str:
        """Says where a loss became NaN or infinite, as this process sees it."""
        wrong = (~torch.isfinite(totals)).nonzero().flatten().tolist()
        text = f"the loss is {mean} before step {done}"
        if wrong:
            loss = self._losses[wrong[0]]
            text = f"the loss is {mean}: first in step {done - len(self._losses) + wrong[0] + 1}"
            if loss.values is not None:
                _, counts = self._binned(loss.places, torch.zeros_like(loss.values))
                sums, _ = self._binned(loss.places, (~torch.isfinite(loss.values)).float())
                bins = [
                    f"{i} ({int(s)} of {int(n)} samples)"
                    for i, (s, n) in enumerate(zip(sums, counts, strict=True))
                    if s
                ]
                text += f", in time bin {', '.join(bins)} of {self.config.bins}" if bins else ""
            parts = [name for name, value in loss.parts.items() if not torch.isfinite(value) and name != "denoise"]
            text += f", in {', '.join(parts)}" if parts else ""
        weights = [name for name, weight in module.named_parameters() if not torch.isfinite(local(weight)).all()]
        if weights:
            text += f"; {len(weights)} weights are not finite, the first in layer {weights[0].rpartition('.')[0]!r}"
        return f"{text}. The last checkpoint stays; lower lr, or train with mixed_precision=no"


def _seconds(file: Path) -> float:
    lines = file.read_text().splitlines() if file.exists() else []
    return float(json.loads(lines[-1]).get("seconds", 0.0)) if lines else 0.0
