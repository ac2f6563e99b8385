"""Schemas of everything a user can set: frozen, no unknown keys, the same objects for Python, YAML and the command."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

LevelSpec = int | float | str


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, (str, int, float)) else value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, PurePath) else value


PathText = Annotated[str, BeforeValidator(_plain)]


class Section(BaseModel):
    """Base of all sections. A section with a `main_field` may be given as that field's bare value.

    So `data=/photos` on the command line sets `data.path` and keeps the other keys of `data` as they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    main_field: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _bare_value(cls, value: Any) -> Any:
        if cls.main_field and isinstance(value, (str, PurePath)):
            return {cls.main_field: str(value)}
        return value


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FeatureRequest:
    """What is wanted from a backbone: every layer at every level, for each image.

    Attributes:
        layers: Layer addresses, or aliases such as "blocks" (every top-level block).
        levels: Noise levels: native times (261), "sigma=0.7", "logsnr=1.2", "clean", "clean@-1".
        draws: Noise draws per level; the features are their mean.
        pool: "none" keeps maps (C, H, W), "mean" gives (C,), an integer k a grid (C, k, k).
        noise: "gaussian" mixes seeded noise in; "none" shows the network the clean image at the level's time.
        posterior: "mode" or "sample" of the codec's posterior, where it has one.
        tokens: Keep a transformer's tokens as (N, C) in place of a map.
        seed: Seeds noise and posterior draws, together with sample id, level and draw.
        dtype: Element type of the features that come back.

    Raises:
        pydantic.ValidationError: For a value outside the ranges above.
    """

    layers: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
    levels: Annotated[tuple[LevelSpec, ...], BeforeValidator(_listed), Field(min_length=1)]
    draws: PositiveInt = 1
    pool: Literal["none", "mean"] | PositiveInt = "none"
    noise: Literal["gaussian", "none"] = "gaussian"
    posterior: Literal["mode", "sample"] = "mode"
    tokens: bool = False
    seed: int = 0
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"


class BackboneConfig(Section):
    """Arguments of `diffrep.load_backbone`, which explains them; a bare string is the `source`."""

    main_field: ClassVar[str] = "source"

    source: PathText
    family: str | None = None
    config: dict[str, Any] | str | None = None
    codec: PathText | None = None
    schedule: PathText | None = None
    revision: str | None = None
    init_seed: int | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "xformers", "flash"] = "auto"
    channels_last: bool | None = None
    compile: bool = False


class DataConfig(Section):
    """A set of images; a bare string is the `path`.

    Attributes:
        path: Folder of images, `.npz` of arrays, folder of parquet or hub id of an HF set, root of a torchvision set,
            or the name of a bundled set such as "fashion-demo".
        kind: How to read `path`; "auto" looks at it.
        name: Class of `torchvision.datasets` for kind "torchvision", such as "CIFAR10".
        splits: Splits to read, in this order; None takes all there are.
        limit: First n samples of each split, or a number for each split by name.
        size: Side of the square the images are brought to; None keeps them as they are.
        fit: "resize" (bicubic, aspect ratio not kept), "crop" (resize the short side, centre crop) or "pad" (zeros).
        image_key: Column of the image for HF sets; None takes the first column that holds images.
        label_key: Column of the label for HF sets; None takes "label" or the first class-label column.
        download: Let torchvision download the set when it is not there.
    """

    main_field: ClassVar[str] = "path"

    path: PathText
    kind: Literal["auto", "folder", "torchvision", "hf", "npz"] = "auto"
    name: str | None = None
    splits: Annotated[tuple[str, ...] | None, BeforeValidator(_listed)] = None
    limit: PositiveInt | dict[str, PositiveInt] | None = None
    size: PositiveInt | None = None
    fit: Literal["resize", "crop", "pad"] = "resize"
    image_key: str | None = None
    label_key: str | None = None
    download: bool = False

    @model_validator(mode="after")
    def _name_for_torchvision(self) -> DataConfig:
        if (self.kind == "torchvision") != (self.name is not None):
            raise ValueError("'name' (a class of torchvision.datasets) goes with kind: torchvision, and only with it")
        return self


class ExtractConfig(Section):
    """Arguments of `diffrep extract`.

    Attributes:
        backbone: The frozen network.
        data: The images.
        request: What to read.
        out: Folder of the feature store.
        cond: A class label, a prompt, or a `.safetensors` file with the network's condition: prompt embeddings (T, C),
            or several tensors by name. None is "no class" or the empty prompt.
        batch_size: Rows of one forward: images x levels x draws share it.
        unit_size: Samples of one unit of work, the grain of resuming.
        workers: Processes that decode images; 0 decodes in the main process.
        on_error: "stop" at an unreadable image, or "skip" it and record it in `skipped.jsonl`.
    """

    backbone: BackboneConfig
    data: DataConfig
    request: FeatureRequest
    out: PathText
    cond: int | PathText | None = None
    batch_size: PositiveInt = 64
    unit_size: PositiveInt = 1000
    workers: Annotated[int, Field(ge=0)] = 0
    on_error: Literal["stop", "skip"] = "stop"


class AttentionConfig(Section):
    """The attention-pooled head on stored maps; see `diffrep.heads.AttentionPool`.

    Attributes:
        store: Store with the maps, of the same samples; None takes the store that is probed.
        layer: Address to train on; None takes the best linear one.
        level: Level to train on; None takes the best linear one.
        width: Token width inside the head.
        depth: Transformer blocks.
        heads: Attention heads of each block.
        dropout: Dropout on tokens and in the blocks.
        epochs: Passes over the training split.
        batch_size: Samples of one step.
        lr: Peak learning rate of AdamW, after a linear warm-up, cosine to zero.
        weight_decay: Decoupled weight decay.
        flip: Mirror maps at random; only sound when mirrored images keep their label.
    """

    store: PathText | None = None
    layer: str | None = None
    level: LevelSpec | None = None
    width: PositiveInt = 128
    depth: PositiveInt = 2
    heads: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 128
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    flip: bool = False


class ProbeConfig(Section):
    """Arguments of `diffrep probe`; a bare string is the `store`.

    Attributes:
        store: Feature store to judge.
        out: Run folder; None writes to `<store>/probe`.
        train_split: Split that heads are fitted and chosen on.
        test_split: Split that is scored once, with the chosen settings; None holds out `test_fraction` instead.
        test_fraction: Share of `train_split` held out, stratified, when there is no test split.
        val_fraction: Share of the training samples used to choose strengths, k, layer and level; stratified.
        strengths: L2 penalties of the logistic regression, as a multiple of the mean cross-entropy's scale.
        neighbours: Candidate k of the kNN classifier.
        temperature: Temperature of the kNN votes, exp(cosine / temperature); 0.07 in DINOv2.
        max_iter: Most L-BFGS iterations of one fit.
        finalists: The best cells on validation, this many, are judged again by cross-validation over training and
            validation samples together before one is chosen; 1 takes the best on validation as it is.
        folds: Folds of that cross-validation.
        attention: Also train an attention-pooled head, on maps; None trains none.
        seed: Seeds the validation split, the bootstrap and the trained head.
    """

    main_field: ClassVar[str] = "store"

    store: PathText
    out: PathText | None = None
    train_split: str = "train"
    test_split: str | None = "test"
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    strengths: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-3, 1e-2, 3e-2, 1e-1)
    neighbours: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (10, 20)
    temperature: Annotated[float, Field(gt=0)] = 0.07
    max_iter: PositiveInt = 60
    finalists: PositiveInt = 5
    folds: Annotated[int, Field(ge=2)] = 5
    attention: AttentionConfig | None = None
    seed: int = 0


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
