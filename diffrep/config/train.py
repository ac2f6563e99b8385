"""Schemas of training: denoising, and feature distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from diffrep.config.schema import BackboneConfig, DataConfig, LevelSpec, PathText, Positive, Section, listed


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


class AdapterConfig(Section):
    """Sizes of the adapters between a student's features and its teacher's; the defaults are CleanDIFT's.

    Attributes:
        blocks: Feed-forward blocks of an adapter.
        expansion: Inner width of a block over the layer's channels.
        depth: Blocks of the mapping network, which turns a time into what modulates the adapters.
        width: Width of the mapping network, an even number; its blocks are three times as wide inside.
    """

    blocks: PositiveInt = 3
    expansion: Positive = 1.0
    depth: PositiveInt = 2
    width: Annotated[int, Field(gt=0, multiple_of=2)] = 256


class DistillConfig(Section):
    """Distillation of features: a student that reads clean images learns what its teacher makes of noised ones.

    At most one of `cond`, `captions` and `labels` says what both are conditioned on.

    Attributes:
        teacher: The frozen backbone; the student starts as a copy of it. It runs in float32, or under
            `mixed_precision`.
        layers: Addresses or aliases of the layers whose features are learned.
        times: First and last level the teacher sees; None is all of its schedule, of a discrete one timestep 1 to the
            last.
        bins: Equal parts of that range; the teacher sees each image once in each.
        time_init: Level whose native time the student is first told; None is 261 of 1,000 discrete timesteps, and
            elsewhere the time of Stable Diffusion's noise-to-signal ratio there.
        learn_time: Learn the student's time too.
        loss: Distance of features, averaged over positions: "cosine" (minus the cosine over channels), "mse" or "l1".
        posterior: "sample" or "mode" of the codec's posterior, where it has one.
        adapter: Sizes of the adapters.
        cond: One condition for all images, as for extraction: a label, a prompt or a `.safetensors` file.
        captions: A prompt for each image: a `.json` file {sample id: prompt}, or a text such as "a photo of a
            {label}", which takes the name of the image's class.
        labels: Condition on the image's own label.
    """

    teacher: BackboneConfig
    layers: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)] = ("blocks",)
    times: tuple[LevelSpec, LevelSpec] | None = None
    bins: PositiveInt = 3
    time_init: LevelSpec | None = None
    learn_time: bool = True
    loss: Literal["cosine", "mse", "l1"] = "cosine"
    posterior: Literal["mode", "sample"] = "sample"
    adapter: AdapterConfig = AdapterConfig()
    cond: int | PathText | None = None
    captions: PathText | None = None
    labels: bool = False

    @model_validator(mode="after")
    def _one_condition(self) -> DistillConfig:
        given = [name for name in ("cond", "captions") if getattr(self, name) is not None]
        given += ["labels"] if self.labels else []
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; an image has one condition")
        if self.captions is not None and not (self.captions.endswith(".json") or "{label}" in self.captions):
            raise ValueError(
                f"captions is {self.captions!r}; give a .json file of prompts by sample id, or a text with {{label}} "
                "in it. One prompt for all images is cond"
            )
        return self

    @model_validator(mode="after")
    def _the_trainer_decides(self) -> DistillConfig:
        if self.teacher.device != "auto" or self.teacher.dtype not in ("auto", "float32"):
            raise ValueError(
                "teacher.device and teacher.dtype are the run's: the teacher lies where the student is trained, in "
                "float32; mixed_precision=bf16 makes both faster"
            )
        return self


# Keys of `TrainConfig` that mean nothing to a distillation, with their defaults.
_OF_DENOISING = {"schedule": ScheduleConfig(), "timesteps": "uniform"}


class TrainConfig(Section):
    """Arguments of `diffrep train`: denoising training of a small model, or distillation of a teacher's features.

    Attributes:
        model: The network of denoising training.
        schedule: Its noise schedule and what it predicts.
        distill: Teacher, layers and adapters of feature distillation, in place of `model` and `schedule`.
        data: The training images; the run never reads a split that is not named there.
        out: Run folder.
        steps: Optimiser steps.
        batch_size: Images of one step, over all processes.
        accumulate: Parts that a process's images of one step are cut into, one after the other; their mean is taken,
            so only memory and speed change.
        lr: Peak learning rate of AdamW.
        warmup: Steps of linear warm-up.
        decay: What follows it: "cosine" down to zero, or "none".
        weight_decay: Decoupled weight decay.
        clip: Largest gradient norm.
        ema: Decay of the weight average that is exported.
        flip: Mirror images at random.
        timesteps: Of denoising training: "uniform" over the schedule, or "low": t = T u^2 with u uniform, which spends
            more steps on little noise, where features are read.
        mixed_precision: "bf16" runs the forward under autocast.
        compile: Compile the network with torch.compile.
        checkpoint_every: Steps between checkpoints.
        keep: Checkpoints kept.
        log_every: Steps between lines of `log.jsonl`.
        seed: Seeds initial weights, data order, timesteps and noise.
        export_dtype: Element type of the exported weights.
        workers: Processes that decode images.
    """

    model: ModelConfig | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    distill: DistillConfig | None = None
    data: DataConfig
    out: PathText
    steps: PositiveInt
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 500
    decay: Literal["cosine", "none"] = "cosine"
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
    def _one_objective(self) -> TrainConfig:
        if (self.model is None) == (self.distill is None):
            given = "neither is given" if self.model is None else "both are given"
            raise ValueError(f"give model (denoising training) or distill (with a teacher), one of the two; {given}")
        changed = [name for name, default in _OF_DENOISING.items() if getattr(self, name) != default]
        if self.distill is not None and changed:
            raise ValueError(
                f"only for denoising training: {', '.join(changed)}; the teacher has its own noise schedule, and "
                "distill.times says which part of it is used"
            )
        return self

    @model_validator(mode="after")
    def _splits_are_named(self) -> TrainConfig:
        if self.data.splits is None:
            raise ValueError("data.splits must name what is trained on, such as data.splits=train")
        return self
