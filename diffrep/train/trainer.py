"""Training through Accelerate, with an average of the weights and exact resume."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from diffrep import dist
from diffrep.backbones.folders import build
from diffrep.config import TrainConfig, to_plain, to_yaml, validate, write_results
from diffrep.data import open_images
from diffrep.errors import CheckpointError, ConfigError, DiffrepError
from diffrep.store.layout import changes, read_json, write_json, write_whole
from diffrep.train.distill import Distillation
from diffrep.train.objective import Denoising, Objective
from diffrep.train.order import StepBatches, step_rng

EMA_FILE = "ema.safetensors"
# Keys that may change between a run and its resume without changing a single number of it.
# `steps` too: a run may be cut short or drawn out, and its learning rate then decays to the new end.
FREE_KEYS = ("steps", "out", "checkpoint_every", "keep", "log_every", "workers")


def run_train(config: TrainConfig) -> Path:
    """Trains a network, or goes on with the run in `config.out`.

    Writes `config.yaml`, `log.jsonl` (loss, learning rate, gradient norm, images/s), `checkpoints/step-*` and, at the
    end, `model/`: a folder that `diffrep.load_backbone` opens, with the averaged weights. Of a distillation it holds
    the adapters too, and the level that the student is read at (`distill.json`). A resumed run may be given other
    `steps`; its cosine then ends there.

    Returns:
        The path of `model/`.

    Raises:
        ConfigError: The run folder belongs to another config, or the batch does not divide among the processes.
        DiffrepError: The loss is not finite.
    """
    run = Path(config.out)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("mixed_precision=fp16 needs a GPU; use bf16 or no")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, dynamo_backend="inductor" if config.compile else "no"
    )
    world = accelerator.num_processes
    if config.batch_size % (world * config.accumulate):
        parts = "" if config.accumulate == 1 else f" in {config.accumulate} parts each"
        raise ConfigError(f"batch_size {config.batch_size} does not divide among {world} processes{parts}")
    if accelerator.is_main_process:
        _refuse_another(run, config)
    accelerator.wait_for_everyone()

    set_seed(config.seed)
    objective, network, channels = _open(config, accelerator.device)
    images = open_images(config.data, channels)
    objective.attach(images)
    if accelerator.is_main_process:  # now that nothing is wrong with it
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "config.json", to_plain(config))
        write_whole(run / "config.yaml", to_yaml(config).encode())
    accelerator.wait_for_everyone()
    groups = objective.parameters(network)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(network, optimizer)
    ema = EMAModel(network.parameters(), decay=config.ema)
    first = _resume(accelerator, run, network, ema)

    rank = accelerator.process_index
    batches = StepBatches(len(images), config.batch_size, config.seed, first, config.steps, rank, world)
    pinned = accelerator.device.type == "cuda"
    loader = DataLoader(images, batch_sampler=batches, num_workers=config.workers, pin_memory=pinned)
    log = _Log(accelerator, run / "log.jsonl", config, first)
    for step, (rows, pixels) in enumerate(zip(batches, loader, strict=True), start=first):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _rate(step, config) * group.get("scale", 1.0)
        loss = _backward(objective, model, config, step, rows, pixels, accelerator)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        done = step + 1
        log.step(done, loss, norm, optimizer.param_groups[0]["lr"])
        if done % config.checkpoint_every == 0 or done == config.steps:
            log.check(done)
            _save(accelerator, run, done, config.keep, network, ema)
    log.close()
    if accelerator.is_main_process:
        facts = _export(network, ema, objective, run / "model", config.export_dtype)
        if log.last is not None:  # else the run was done before and its results stand
            metrics = {"steps": config.steps, "images": config.steps * config.batch_size, "loss": log.last}
            write_results(run, config, config.seed, metrics | facts)
    accelerator.wait_for_everyone()
    prepared = (model, optimizer)
    del model, optimizer
    dist.teardown(accelerator, *prepared)
    return run / "model"


class _Log:
    """One line of log.jsonl every `log_every` steps, and the progress bar."""

    def __init__(self, accelerator: Accelerator, file: Path, config: TrainConfig, first: int):
        self.accelerator, self.file, self.config = accelerator, file, config
        self.bar = tqdm(total=config.steps, initial=first, desc=dist.label("train"), unit="step")
        self.losses: list[torch.Tensor] = []
        self.last: float | None = None
        self.since = time.perf_counter()

    def step(self, done: int, loss: torch.Tensor, norm: torch.Tensor, lr: float) -> None:
        """Takes note of a step and, when it is time, writes a line."""
        self.losses.append(loss)
        self.bar.update()
        if done % self.config.log_every and done != self.config.steps:
            return
        mean = self.last = self.check(done)
        if self.accelerator.is_main_process:
            speed = len(self.losses) * self.config.batch_size / (time.perf_counter() - self.since)
            line = {"step": done, "loss": mean, "lr": lr, "grad_norm": float(norm), "images_per_s": speed}
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
            self.bar.set_postfix(loss=f"{mean:.4f}")
        self.losses, self.since = [], time.perf_counter()

    def check(self, done: int) -> float | None:
        """Returns the mean loss since the last line; raises DiffrepError when it is not finite."""
        if not self.losses:
            return self.last
        mean = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        if not math.isfinite(mean):
            raise DiffrepError(f"the loss is {mean} before step {done}; lower lr, or train with mixed_precision=no")
        return mean

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def _open(config: TrainConfig, device: torch.device) -> tuple[Objective, torch.nn.Module, int]:
    """Returns the objective, what is trained for it, and the channels of its images."""
    if config.distill is not None:
        distillation = Distillation(config.distill, device)
        return distillation, distillation.student(), distillation.teacher.image_channels
    network = build(config.model.kind, config.model.args)
    return Denoising(config.schedule, config.timesteps), network, network.config.in_channels


def _backward(
    objective: Objective,
    model: torch.nn.Module,
    config: TrainConfig,
    step: int,
    rows: list[int],
    images: torch.Tensor,
    accelerator: Accelerator,
) -> torch.Tensor:
    """Adds up the gradients of this process's part of a step and returns its mean loss, detached.

    Args:
        objective: What is minimised.
        model: The prepared network.
        config: The run's config.
        step: Which step.
        rows: Places of the images in the data set.
        images: (B, C, H, W) in [0, 1], on the CPU.
        accelerator: Says where to, and what of the step is this process's.
    """
    # The draws are made for the whole batch and then cut, so they do not depend on the number of processes.
    rng = step_rng(config.seed, "step", step)
    drawn = objective.draw((config.batch_size, *images.shape[1:]), rng)
    mirrored = torch.from_numpy(rng.random(config.batch_size) < 0.5)
    offset = accelerator.process_index * len(images)
    if config.flip:
        mine = mirrored[offset : offset + len(images)]
        images = torch.where(mine.view(-1, 1, 1, 1), images.flip(-1), images)
    size, device = len(images) // config.accumulate, accelerator.device
    losses = []
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        here = [one[offset + start : offset + start + size].to(device) for one in drawn]
        inputs = objective.inputs(images[part].to(device), rows[part], here)
        last = start + size == len(images)
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                loss = objective.loss(model, *inputs) / config.accumulate
            accelerator.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.decay == "none":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


def _refuse_another(run: Path, config: TrainConfig) -> None:
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


def _flat(plain: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Returns settings by their dotted keys, without those that may change."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        if not above and key in FREE_KEYS:
            continue
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _resume(accelerator: Accelerator, run: Path, network: torch.nn.Module, ema: EMAModel) -> int:
    saved = _checkpoints(run)
    if not saved:
        return 0
    step = int(saved[-1].name.removeprefix("step-"))
    try:
        accelerator.load_state(str(saved[-1]))
        averages = load_file(saved[-1] / EMA_FILE)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {saved[-1]}: {error}; delete it to go on from the one before"
        ) from error
    ema.shadow_params = [averages[name].to(accelerator.device) for name, _ in network.named_parameters()]
    ema.optimization_step = step
    log = run / "log.jsonl"
    if accelerator.is_main_process and log.exists():
        # A line that was being written when the run was killed has no end; lines after the checkpoint come again.
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_whole(log, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())
    accelerator.print(f"resumed {run} at step {step}")
    return step


def _save(accelerator: Accelerator, run: Path, step: int, keep: int, network: torch.nn.Module, ema: EMAModel) -> None:
    """Writes a checkpoint whole or not at all, then drops the oldest."""
    folder = run / "checkpoints"
    partial = folder / f"partial-{step:07d}"
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            # Not through accelerate's custom objects, which are read back as pickles that may run code.
            names = [name for name, _ in network.named_parameters()]
            save_file(dict(zip(names, ema.shadow_params, strict=True)), partial / EMA_FILE)
            target = folder / f"step-{step:07d}"
            if target.exists():
                shutil.rmtree(target)
            os.replace(partial, target)
            for old in _checkpoints(run)[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the checkpoint of step {step} to {folder}: {error}") from error
    accelerator.wait_for_everyone()


def _export(network: torch.nn.Module, ema: EMAModel, objective: Objective, target: Path, dtype: str) -> dict[str, Any]:
    ema.store(network.parameters())
    ema.copy_to(network.parameters())
    facts = objective.facts(network)
    objective.export(network, target, getattr(torch, dtype))
    ema.restore(network.parameters())
    return facts
