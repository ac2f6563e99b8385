"""Denoising training through Accelerate, with an average of the weights and exact resume."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from diffrep import dist
from diffrep.backbones.folders import build
from diffrep.config import TrainConfig, to_plain, to_yaml, write_results
from diffrep.data import open_images
from diffrep.errors import CheckpointError, ConfigError, DiffrepError
from diffrep.store.layout import changes, read_json, write_json, write_whole
from diffrep.train.objective import Denoising
from diffrep.train.order import StepBatches, step_rng

EMA_FILE = "ema.safetensors"
# Keys that may change between a run and its resume without changing a single number of it.
# `steps` too: a run may be cut short or drawn out, and its learning rate then decays to the new end.
FREE_KEYS = ("steps", "out", "checkpoint_every", "keep", "log_every", "workers")


def run_train(config: TrainConfig) -> Path:
    """Trains a network, or goes on with the run in `config.out`.

    Writes `config.yaml`, `log.jsonl` (loss, learning rate, gradient norm, images/s), `checkpoints/step-*` and, at the
    end, `model/`: a folder that `diffrep.load_backbone` opens, with the averaged weights. A resumed run may be given
    other `steps`; its cosine then ends there.

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
    if config.batch_size % world:
        raise ConfigError(f"batch_size {config.batch_size} does not divide among {world} processes")
    if accelerator.is_main_process:
        _claim(run, config)
    accelerator.wait_for_everyone()

    set_seed(config.seed)
    network = build(config.model.kind, config.model.args)
    images = open_images(config.data, channels=network.config.in_channels)
    objective = Denoising(config.schedule, config.timesteps)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(network, optimizer)
    ema = EMAModel(network.parameters(), decay=config.ema)
    first = _resume(accelerator, run, network, ema)

    rank = accelerator.process_index
    batches = StepBatches(len(images), config.batch_size, config.seed, first, config.steps, rank, world)
    pinned = accelerator.device.type == "cuda"
    loader = DataLoader(images, batch_sampler=batches, num_workers=config.workers, pin_memory=pinned)
    log = _Log(accelerator, run / "log.jsonl", config, first)
    for step, clean in enumerate(loader, start=first):
        clean, t, eps = _step_inputs(objective, config, step, clean, accelerator)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _rate(step, config.warmup, config.steps)
        with accelerator.autocast():
            loss = objective.loss(model, clean, t, eps)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        done = step + 1
        log.step(done, loss.detach(), norm, optimizer.param_groups[0]["lr"])
        if done % config.checkpoint_every == 0 or done == config.steps:
            log.check(done)
            _save(accelerator, run, done, config.keep, network, ema)
    log.close()
    if accelerator.is_main_process:
        _export(network, ema, objective, run / "model", config.export_dtype)
        if log.last is not None:  # else the run was done before and its results stand
            metrics = {"steps": config.steps, "images": config.steps * config.batch_size, "loss": log.last}
            write_results(run, config, config.seed, metrics)
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


def _step_inputs(
    objective: Denoising, config: TrainConfig, step: int, clean: torch.Tensor, accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The draws are made for the whole batch and then cut, so they do not depend on the number of processes.
    rng = step_rng(config.seed, "step", step)
    t, eps = objective.draw((config.batch_size, *clean.shape[1:]), rng)
    mirrored = torch.from_numpy(rng.random(config.batch_size) < 0.5)
    mine = slice(accelerator.process_index * len(clean), (accelerator.process_index + 1) * len(clean))
    if config.flip:
        clean = torch.where(mirrored[mine].view(-1, 1, 1, 1), clean.flip(-1), clean)
    device = accelerator.device
    return (clean * 2 - 1).to(device), t[mine].to(device), eps[mine].to(device)


def _rate(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _claim(run: Path, config: TrainConfig) -> None:
    plain = to_plain(config)
    stored = run / "config.json"
    if stored.exists():
        differ = changes(*({k: one[k] for k in one if k not in FREE_KEYS} for one in (read_json(stored), plain)))
        if differ:
            raise ConfigError(
                f"{run} holds a run with other settings ({'; '.join(differ)}); use another out, or the same settings"
            )
    run.mkdir(parents=True, exist_ok=True)
    write_json(stored, plain)
    write_whole(run / "config.yaml", to_yaml(config).encode())


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


def _export(network: torch.nn.Module, ema: EMAModel, objective: Denoising, target: Path, dtype: str) -> None:
    ema.store(network.parameters())
    ema.copy_to(network.parameters())
    torch.nn.Module.to(network, getattr(torch, dtype)).save_pretrained(target)
    torch.nn.Module.float(network)
    ema.restore(network.parameters())
    objective.scheduler.save_pretrained(target / "scheduler")
