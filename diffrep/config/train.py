"""Schemas of denoising training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from diffrep.config.schema import DataConfig, PathText, Section


class ModelConfig(Section):
    """The network to train: a diffusers class and its constructor's arguments.

    Attributes:
        kind: Name of the diffusers class.
        args: Its arguments, as in the `config.json` that diffusers writes.
    """

    kind: Literal["UNet2DModel"] = "UNet2DModel"
    args: dict[str, Any]


class ScheduleConfig(Section):
    """Noise schedule of a training run: arguments of diffusers' `DDPMScheduler`."""

    num_train_timesteps: PositiveInt = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


class TrainConfig(Section):
    """Arguments of `diffrep train`: denoising training of a small model.

    Attributes:
        model: The network.
        schedule: The noise schedule and what the network predicts.
        data: The training images; the run never reads a split that is not named there.
        out: Run folder.
        steps: Optimiser steps.
        batch_size: Images of one step, over all processes.
        lr: Peak learning rate of AdamW.
        warmup: Steps of linear warm-up; then cosine decay to zero.
        weight_decay: Decoupled weight decay.
        clip: Largest gradient norm.
        ema: Decay of the weight average that is exported.
        flip: Mirror images at random.
        timesteps: "uniform" over the schedule, or "low": t = T u^2 with u uniform, which spends more steps on little
            noise, where features are read.
        mixed_precision: "bf16" runs the forward under autocast.
        compile: Compile the network with torch.compile.
        checkpoint_every: Steps between checkpoints.
        keep: Checkpoints kept.
        log_every: Steps between lines of `log.jsonl`.
        seed: Seeds initial weights, data order, timesteps and noise.
        export_dtype: Element type of the exported weights.
        workers: Processes that decode images.
    """

    model: ModelConfig
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig
    out: PathText
    steps: PositiveInt
    batch_size: PositiveInt = 128
    lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 500
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    flip: bool = False
    timesteps: Literal["uniform", "low"] = "uniform"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    checkpoint_every: PositiveInt = 1000
    keep: PositiveInt = 2
    log_every: PositiveInt = 50
    seed: int = 0
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _splits_are_named(self) -> TrainConfig:
        if self.data.splits is None:
            raise ValueError("data.splits must name what is trained on, such as data.splits=train")
        return self
