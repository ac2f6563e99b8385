"""Training through Accelerate, with an average of the weights and exact resume."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

from diffrep import dist
from diffrep.config import TrainConfig, to_plain, to_yaml, write_results
from diffrep.errors import ConfigError
from diffrep.store.layout import write_json, write_whole
from diffrep.train.average import Average
from diffrep.train.checkpoints import Checkpoints, full_disk, refuse_another, refuse_other_data, replace_folder
from diffrep.train.data import open_training
from diffrep.train.distill import Distillation
from diffrep.train.feed import Feed
from diffrep.train.generative import Generative
from diffrep.train.log import Log
from diffrep.train.objective import Batch, Loss, Objective
from diffrep.train.order import StepBatches, StepRandom
from diffrep.train.sharding import check_sharding, check_units
from diffrep.train.signals import StopRequest
from diffrep.train.trackers import check_trackers
from diffrep.train.watch import Watch


def run_train(config: TrainConfig) -> Path | None:
    """Trains a network, or goes on with the run in `config.out`.

    Writes `config.yaml`, `log.jsonl` (see `diffrep.train.log.Log`), `checkpoints/step-*`, `watch.jsonl` and `samples/`
    where `config.watch` is set and, at the end, `model/`: a folder that `diffrep.load_backbone` opens, with the
    averaged weights. Beside them lie projectors of alignment terms, or of a distillation the adapters and the level
    that the student is read at (`distill.json`). A resumed run may be given other `steps`, and its cosine then ends
    there, and another number of processes.

    SIGTERM and SIGUSR1 end the run after a checkpoint.

    Returns:
        The path of `model/`; None for a run that was asked to end before.

    Raises:
        ConfigError: The run folder belongs to another config or to other data, or the batch does not divide among the
            processes.
        CheckpointError: A checkpoint cannot be read or written, or the disk is full.
        BackendUnavailable: A tracker's package is missing, or it does not start.
        DiffrepError: The loss is not finite.
    """
    try:
        with full_disk(config.out):
            return _train(config)
    except BaseException:
        dist.abandon()
        raise


def _train(config: TrainConfig) -> Path | None:
    run = Path(config.out)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("mixed_precision=fp16 needs a GPU; use bf16 or no")
    check_trackers(config.trackers)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        dynamo_backend="inductor" if config.compile else "no",
        # One process measures while the others wait.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    check_sharding(accelerator, config)
    world = accelerator.num_processes
    if config.batch_size % (world * config.accumulate):
        parts = "" if config.accumulate == 1 else f" in {config.accumulate} parts each"
        raise ConfigError(f"batch_size {config.batch_size} does not divide among {world} processes{parts}")
    if accelerator.is_main_process:
        refuse_another(run, config)
    accelerator.wait_for_everyone()

    set_seed(config.seed)
    objective = _objective(config, accelerator.device)
    data = open_training(config, objective.image_channels)
    objective.attach(data)
    network = objective.module()
    check_units(accelerator, network)
    if accelerator.is_main_process:  # now that nothing is wrong with it
        run.mkdir(parents=True, exist_ok=True)
        refuse_other_data(run, data.describe())
        write_json(run / "config.json", to_plain(config))
        write_whole(run / "config.yaml", to_yaml(config).encode())
    accelerator.wait_for_everyone()
    groups = objective.parameters(network)
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, fused=True
    )
    model, optimizer = accelerator.prepare(network, optimizer)
    network.train()
    average = Average(network, config.ema, accelerator.is_main_process)
    checkpoints = Checkpoints(accelerator, run, config.keep, network, average)
    first = checkpoints.resume()
    objective.follow(average)
    watch = None
    if config.watch is not None and accelerator.is_main_process:
        watch = Watch(config.watch, config, objective.averaged, objective.layers, data, accelerator.device, run)

    order = StepBatches(
        len(data), config.batch_size, config.seed, first, config.steps, accelerator.process_index, world, config.flip
    )
    feed = Feed(data, order, config.workers, accelerator.device)
    log = Log(accelerator, run, config, first, objective.flops, objective.teacher_watch)
    loop = _Loop(config, accelerator, objective, network, model, optimizer, average, checkpoints, log, watch)
    with StopRequest(accelerator) as stop:
        finished = loop.run(first, feed, stop)
    log.close()
    if finished:
        average.refresh()
    if finished and accelerator.is_main_process:
        partial = run / "partial-model"
        shutil.rmtree(partial, ignore_errors=True)
        with average.swapped():
            facts = objective.facts(network)
            objective.export(network, partial, getattr(torch, config.export_dtype))
        replace_folder(partial, run / "model")
        if log.last is not None:  # else the run was done before and its results stand
            metrics = {"steps": config.steps, "images": config.steps * config.batch_size, "loss": log.last}
            write_results(run, config, config.seed, metrics | facts)
    accelerator.wait_for_everyone()
    prepared = (model, optimizer)
    del model, optimizer, loop
    dist.teardown(accelerator, *prepared)
    return run / "model" if finished else None


def _objective(config: TrainConfig, device: torch.device) -> Objective:
    return Generative(config, device) if config.distill is None else Distillation(config.distill, device)


class _Loop:
    """The steps of a run, and what is done between them."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        objective: Objective,
        network: torch.nn.Module,
        model: torch.nn.Module,
        optimizer: Any,
        average: Average,
        checkpoints: Checkpoints,
        log: Log,
        watch: Watch | None,
    ):
        self.config, self.accelerator, self.objective = config, accelerator, objective
        self.network, self.model, self.optimizer = network, model, optimizer
        self.average, self.checkpoints, self.log, self.watch = average, checkpoints, log, watch

    def run(self, first: int, feed: Feed, stop: StopRequest) -> bool:
        """Takes the steps from `first` on; returns whether all were taken."""
        config = self.config
        # Of a run that was killed between a checkpoint and its measurement, too.
        if self._due(first):
            self._measure(first)
        for step, ((rows, _), tensors) in enumerate(feed, start=first):
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * rate(step, config) * group.get("scale", 1.0)
            loss = backward(self.objective, self.model, config, step, Batch(rows, tensors), self.accelerator)
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.step()
            done = step + 1
            self.log.step(done, loss, norm, self.optimizer.param_groups[0]["lr"], feed.waited, self.network)
            asked = stop.asked(done) and done < config.steps
            if asked or done % config.checkpoint_every == 0 or done == config.steps:
                self.log.check(done, self.network)
                self.checkpoints.save(done)
            if asked:
                self.accelerator.print(f"stopped at step {done}; run the same command again to go on")
                return False
            if self._due(done):
                self._measure(done)
        return True

    def _due(self, done: int) -> bool:
        watch = self.config.watch
        if watch is None or done == 0:
            return watch is not None and watch.start
        return done % watch.every == 0 or done == self.config.steps

    def _measure(self, done: int) -> None:
        self.log.pause()
        self.average.refresh()
        if self.watch is not None and not self.watch.measured(done):
            self.log.track({"step": done} | self.watch.measure(done))
        self.accelerator.wait_for_everyone()
        self.log.resume()


def backward(
    objective: Objective,
    model: torch.nn.Module,
    config: TrainConfig,
    step: int,
    batch: Batch,
    accelerator: Accelerator,
) -> Loss:
    """Adds up the gradients of this process's part of a step and returns its mean loss, detached.

    Args:
        objective: What is minimised.
        model: The prepared module.
        config: The run's config.
        step: Steps that are done.
        batch: This process's samples.
        accelerator: Says what of the step is this process's.
    """
    # The draws are made for the whole batch and then cut, so they do not depend on the number of processes.
    rng = StepRandom(config.seed, step, accelerator.device)
    drawn = objective.draw((config.batch_size, *batch.clean.shape[1:]), rng)
    count = len(batch.rows)
    offset = accelerator.process_index * count
    size = count // config.accumulate
    losses = []
    for start in range(0, count, size):
        here = slice(start, start + size)
        mine = [one[offset + start : offset + start + size].to(accelerator.device) for one in drawn]
        part = Batch(batch.rows[here], {name: tensor[here] for name, tensor in batch.tensors.items()})
        inputs = objective.inputs(part, tuple(mine))
        last = start + size == count
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                loss = objective.loss(model, step, *inputs)
            accelerator.backward(loss.total / config.accumulate)
        losses.append(loss)
    return _mean(losses)


def _mean(losses: list[Loss]) -> Loss:
    """Returns the mean of the losses of equal parts of a batch, detached."""
    total = torch.stack([loss.total.detach() for loss in losses]).mean()
    parts = {name: torch.stack([loss.parts[name] for loss in losses]).mean() for name in losses[0].parts}
    if losses[0].values is None:
        return Loss(total, parts)
    places, values = (torch.cat([getattr(loss, name) for loss in losses]) for name in ("places", "values"))
    return Loss(total, parts, places, values)


def rate(step: int, config: TrainConfig) -> float:
    """Returns what the learning rate is multiplied by in a step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.decay == "none":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))
