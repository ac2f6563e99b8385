"""Schemas of training: diffusion models with or without alignment, and feature distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from diffrep.config.align import AlignConfig
from diffrep.config.objective import ObjectiveConfig
from diffrep.config.sample import WatchConfig
from diffrep.config.schema import BackboneConfig, DataConfig, LevelSpec, PathText, Positive, Section, Share, listed


class ModelConfig(Section):
    """The network to train, new or from a checkpoint.

    Attributes:
        kind: "UNet2DModel" of diffusers, or a family of official checkpoints: "dit", "sit" (time runs to the data),
            "repa" (time runs from the data), "adm", "edm".
        args: Its arguments: of a diffusers class as in the `config.json` that diffusers writes; of a family as in
            `load_backbone`, also a variant's name such as "B/2" or {variant: B/2, input_size: 16}.
        source: A backbone to go on from, in place of `kind` and `args`.
    """

    kind: Literal["UNet2DModel", "dit", "sit", "repa", "adm", "edm"] = "UNet2DModel"
    args: dict[str, Any] | str | None = None
    source: BackboneConfig | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.args is None) == (self.source is None):
            given = "neither is given" if self.args is None else "both are given"
            raise ValueError(
                f"give args (a new network) or source (a backbone to go on from), one of the two; {given}"
            )
        if self.kind == "UNet2DModel" and isinstance(self.args, str):
            raise ValueError(f"args of UNet2DModel are its constructor's, not a variant's name; got {self.args!r}")
        return self


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


def _terms(value: Any) -> Any:
    """Takes null for no terms, and drops terms that are null: so an override takes away what a base file has."""
    if isinstance(value, dict):
        return {name: term for name, term in value.items() if term is not None}
    return {} if value is None else value


# Keys of `TrainConfig` that mean nothing to a distillation, with their defaults.
_OF_DIFFUSION = {
    "objective": None,
    "align": {},
    "store": None,
    "targets": None,
    "codec": None,
    "label_dropout": 0.1,
    "checkpointing": False,
    "watch": None,
}


class TrainConfig(Section):
    """Arguments of `diffrep train`: a diffusion model, with alignment or without, or distillation of features.

    Attributes:
        model: The network of diffusion training.
        objective: What it learns to predict; None is flow matching for "sit" and "repa", EDM for "edm", DDPM else.
        align: Alignment terms by a name of your choice; several add up. Null, for one or for all, takes away what a
            base file has.
        distill: Teacher, layers and adapters of feature distillation, in place of all of these.
        data: The training images; the run never reads a split that is not named there.
        store: In place of `data`: a store of latents (or pixels) and targets, which `diffrep extract` makes of family
            "prepare".
        store_split: Split of the store that is trained on.
        targets: A second store of the same images, which holds the targets where `store` does not, say in eight bits.
        codec: Autoencoder that turns `data` into latents in each step: a folder or hub id. None trains on pixels.
        label_dropout: Share of labels that become "no class", for networks that have one.
        out: Run folder.
        steps: Optimiser steps.
        batch_size: Images of one step, over all processes.
        accumulate: Parts that a process's images of one step are cut into, one after the other; their mean is taken,
            so only memory and speed change. Terms that compare samples with one another see one part at a time.
        lr: Peak learning rate of AdamW.
        warmup: Steps of linear warm-up.
        decay: What follows it: "cosine" down to zero, or "none".
        weight_decay: Decoupled weight decay.
        betas: AdamW's.
        clip: Largest gradient norm.
        ema: Decay of the weight average that is exported.
        flip: Mirror images at random.
        mixed_precision: "bf16" runs the forward under autocast.
        compile: Compile the network with torch.compile.
        checkpointing: Recompute the blocks' activations in the backward pass: less memory, about a third more work.
        checkpoint_every: Steps between checkpoints.
        keep: Checkpoints kept.
        log_every: Steps between lines of `log.jsonl`.
        bins: Equal parts of the way to noise that the loss is logged for.
        trackers: Beside `log.jsonl`, which is always written: "tensorboard", "wandb", "trackio".
        watch: What is measured of the averaged weights on the way.
        seed: Seeds initial weights, data order, times and noise.
        export_dtype: Element type of the exported weights.
        workers: Processes that decode images.
    """

    model: ModelConfig | None = None
    objective: ObjectiveConfig | None = None
    align: Annotated[dict[str, AlignConfig], BeforeValidator(_terms)] = {}
    distill: DistillConfig | None = None
    data: DataConfig | None = None
    store: PathText | None = None
    store_split: str = "train"
    targets: PathText | None = None
    codec: PathText | None = None
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    out: PathText
    steps: PositiveInt
    batch_size: PositiveInt = 128
    accumulate: PositiveInt = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 500
    decay: Literal["cosine", "none"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Share, Share] = (0.9, 0.999)
    clip: Annotated[float, Field(gt=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    flip: bool = False
    # A bare no is false in YAML.
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)] = (
        "bf16"
    )
    compile: bool = False
    checkpointing: bool = False
    checkpoint_every: PositiveInt = 1000
    keep: PositiveInt = 2
    log_every: PositiveInt = 50
    bins: PositiveInt = 5
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], BeforeValidator(listed)] = ()
    watch: WatchConfig | None = None
    seed: int = 0
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    workers: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_objective(self) -> TrainConfig:
        if (self.model is None) == (self.distill is None):
            given = "neither is given" if self.model is None else "both are given"
            raise ValueError(f"give model (a diffusion model) or distill (with a teacher), one of the two; {given}")
        changed = [name for name, default in _OF_DIFFUSION.items() if getattr(self, name) != default]
        if self.distill is not None and changed:
            raise ValueError(
                f"only for diffusion models: {', '.join(changed)}; the teacher has its own noise schedule and codec, "
                "and distill.times says which levels are used"
            )
        return self

    @model_validator(mode="after")
    def _one_source(self) -> TrainConfig:
        if (self.data is None) == (self.store is None):
            given = "neither is given" if self.data is None else "both are given"
            raise ValueError(f"give data (images) or store (of 'diffrep extract'), one of the two; {given}")
        if self.data is not None and self.data.splits is None:
            raise ValueError("data.splits must name what is trained on, such as data.splits=train")
        if self.targets is not None and self.store is None:
            raise ValueError("targets is a second store beside store; give store too")
        if self.store is not None and self.codec is not None:
            raise ValueError("codec encodes data; a store holds what it gave already")
        stored = [name for name, term in self.align.items() if term.stored is not None]
        if self.data is not None and stored:
            raise ValueError(f"align.{stored[0]}.stored: only a store has stored targets; give store, or an encoder")
        online = [name for name, term in self.align.items() if term.encoder is not None and term.stored is None]
        if self.store is not None and online:
            raise ValueError(
                f"align.{online[0]}.encoder: a store has no images for it; extract its targets and name them in stored"
            )
        return self
