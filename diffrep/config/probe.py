"""Schemas of probing: what is fitted on stored features, and how it is chosen and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from diffrep.config.schema import DataConfig, LevelSpec, NotNegative, PathText, Positive, Section, Share, listed

Norm = Literal["none", "batch", "layer", "standard"]
Head = Literal["logistic", "sgd", "ridge", "knn", "ncm"]
TrainedKind = Literal[
    "attention", "diffssl-attention", "difformer", "aggregation", "conv", "mlp", "linear", "matryoshka"
]
KINDS = TrainedKind.__args__
ATTENTIVE = ("attention", "diffssl-attention", "difformer")


class SGDConfig(Section):
    """Linear heads trained with SGD, every norm x learning rate x weight decay of a reading in one pass.

    The defaults are DINOv2's protocol (`dinov2/eval/linear.py`) with a shorter list of learning rates.

    Attributes:
        norms: What stands before the linear map: "none", "batch" (batch norm without affine), "layer" (layer norm
            without affine), "standard" (mean and deviation of the training samples).
        lrs: Learning rates, for a batch of 256 when `scale_lr` is on.
        scale_lr: Multiply learning rates by batch_size / 256.
        weight_decays: L2 weight decays.
        momentum: Momentum of SGD.
        epochs: Passes over the training samples.
        iterations: Steps in all, in place of epochs.
        batch_size: Samples of one step.
        init_std: Standard deviation of the first weights; biases start at 0.
    """

    norms: Annotated[tuple[Norm, ...], BeforeValidator(listed), Field(min_length=1)] = ("batch",)
    lrs: Annotated[tuple[Positive, ...], BeforeValidator(listed), Field(min_length=1)] = (1e-3, 1e-2, 5e-2, 1e-1)
    scale_lr: bool = True
    weight_decays: Annotated[tuple[NotNegative, ...], BeforeValidator(listed), Field(min_length=1)] = (0.0,)
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    epochs: PositiveInt = 10
    iterations: PositiveInt | None = None
    batch_size: PositiveInt = 128
    init_std: NotNegative = 0.01


class TrainedConfig(Section):
    """One head that needs epochs, trained with Lightning on stored features; see `diffrep.heads`.

    Attributes:
        kind: Which head; None takes the name under which it stands in `trained`.
        store: Store with its features, of the same samples; None takes the store that is probed.
        layers: Addresses to read; None takes the best logistic one (DifFormer and aggregation network: every layer of
            their store).
        levels: Levels to read; None takes the best logistic one (DifFormer and aggregation network: every level).
        pool: Adaptive pooling of maps before the head, to at most this side; None reads them as stored.
        norm: Norm of the head's input, where the head has a choice; None takes its usual one ("layer" for DifFormer,
            "batch" for flat heads).
        width: Token width, channels of the convolutions, or those of the aggregation network's descriptors.
        depth: Transformer blocks.
        heads: Attention heads of each block; divides `width`.
        hidden: Widths of the MLP's hidden layers.
        nesting: Prefix lengths of the Matryoshka head.
        tied: Matryoshka with one shared matrix (MRL-E).
        dropout: Dropout in the head.
        epochs: Most passes over the training split.
        patience: Stop after this many epochs without a better validation result; None never stops early.
        batch_size: Samples of one step, over all processes.
        optimizer: "adamw", or "sgd" without momentum as diffssl uses.
        lr: Peak learning rate, after a linear warm-up over a tenth, cosine to zero.
        weight_decay: Decoupled weight decay.
        label_smoothing: Of the cross-entropy.
        flip: Mirror maps at random; only sound when mirrored images keep their label.
        loggers: "csv" and "tensorboard" (extra `trackers`), into the run folder.
        precision: Lightning's precision.
        checkpoint_every: Epochs between the checkpoints a stopped run goes on from.
    """

    kind: TrainedKind | None = None
    store: PathText | None = None
    layers: Annotated[tuple[str, ...] | None, BeforeValidator(listed)] = None
    levels: Annotated[tuple[LevelSpec, ...] | None, BeforeValidator(listed)] = None
    pool: PositiveInt | None = None
    norm: Norm | None = None
    width: PositiveInt = 128
    depth: PositiveInt = 2
    heads: PositiveInt = 4
    hidden: Annotated[tuple[PositiveInt, ...], BeforeValidator(listed)] = (512,)
    nesting: Annotated[tuple[PositiveInt, ...], BeforeValidator(listed)] = (8, 16, 32, 64)
    tied: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    epochs: PositiveInt = 20
    patience: PositiveInt | None = None
    batch_size: PositiveInt = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    flip: bool = False
    loggers: Annotated[tuple[Literal["csv", "tensorboard"], ...], BeforeValidator(listed)] = ("csv",)
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    checkpoint_every: PositiveInt = 1


class LowDataConfig(Section):
    """Accuracy with few training samples, for the chosen readings and settings.

    Attributes:
        shots: Samples of each class.
        fractions: Shares of the training samples, stratified.
        tries: Draws of each; try i is seeded with seed + i. The table gives their mean and standard error.
        heads: Heads to fit, among those of the probe; None takes those of logistic, knn and ncm that it fits.
    """

    shots: Annotated[tuple[PositiveInt, ...], BeforeValidator(listed)] = (1, 5, 10)
    fractions: Annotated[tuple[Share, ...], BeforeValidator(listed)] = (0.01, 0.1)
    tries: PositiveInt = 5
    heads: Annotated[tuple[Head, ...] | None, BeforeValidator(listed)] = None


class ProbeConfig(Section):
    """Arguments of `diffrep probe`; a bare string is the `store`.

    Attributes:
        store: Feature store to judge.
        out: Run folder; None writes to `<store>/probe`.
        data: The images, for the report's most and least certain ones; None opens those that the store was made from.
        train_split: Split that heads are fitted and chosen on.
        val_split: Split that settings are chosen on; None takes `val_fraction` of the training split.
        test_split: Split that is scored once, with the chosen settings; None holds out `test_fraction` instead.
        test_fraction: Share of `train_split` held out, stratified, when `test_split` is None.
        val_fraction: Share of the training samples used to choose strengths, k, layer and level; stratified.
        missing: "refuse" or "allow" classes of the training split that have no sample in the test split, or in a
            `val_split`. Classes of the validation and test samples that have no sample to fit on are refused by both;
            "any" allows them too, and their samples count as wrong.
        metric: What is chosen by and reported: "accuracy" or "mean_per_class"; multi-label data always use mean
            average precision.
        pools: Sides k that maps are pooled to before a head flattens them, "stored" for as they are.
        combine: What a head reads: "single" (each layer and level by itself), "layers" (all layers of a level
            together), "levels" (all levels of a layer together), "all".
        heads: Heads that are fitted on every reading.
        strengths: L2 penalties of the logistic regression, as a multiple of the mean cross-entropy's scale.
        max_iter: Most L-BFGS iterations of one logistic regression.
        ridges: Penalties of the ridge classifier, as a share of the features' mean variance.
        neighbours: Candidate k of the kNN classifier.
        temperature: Temperature of the kNN votes, exp(cosine / temperature); 0.07 in DINOv2.
        sgd: Linear heads trained with SGD, for "sgd" among the heads.
        finalists: The best readings on validation, this many for each of logistic, sgd and ridge, are judged again by
            cross-validation over training and validation samples together before one is chosen; 1 takes the best on
            validation as it is.
        folds: Folds of that cross-validation.
        trained: Heads that need epochs, by a name of your own or their kind.
        baselines: What the linear probe is compared with: "pixels" (the images themselves, at most 32 x 32), and
            "untrained" (the same network with random weights, at the chosen level and at the least noisy one).
        low_data: Also measure with few samples; None does not.
        seeds: Repetitions with seeds seed, seed + 1, ...: each draws its own validation samples, first weights and
            data order, chooses for itself, and is scored once. Trained heads and baselines read the layer and level
            that the first seed chose, and `low_data` has its own draws.
        seed: Seeds splits, the bootstrap and the trained heads.
        device: Where heads are fitted; "auto" takes a GPU when there is one.
    """

    main_field: ClassVar[str] = "store"

    store: PathText
    out: PathText | None = None
    data: DataConfig | None = None
    train_split: str = "train"
    val_split: str | None = None
    test_split: str | None = "test"
    test_fraction: Share = 0.2
    val_fraction: Share = 0.2
    missing: Literal["refuse", "allow", "any"] = "refuse"
    metric: Literal["accuracy", "mean_per_class"] = "accuracy"
    pools: Annotated[tuple[PositiveInt | Literal["stored"], ...], BeforeValidator(listed), Field(min_length=1)] = (
        "stored",
    )
    combine: Annotated[
        tuple[Literal["single", "layers", "levels", "all"], ...], BeforeValidator(listed), Field(min_length=1)
    ] = ("single",)
    heads: Annotated[tuple[Head, ...], BeforeValidator(listed), Field(min_length=1)] = ("logistic", "knn")
    strengths: Annotated[tuple[Positive, ...], BeforeValidator(listed), Field(min_length=1)] = (1e-3, 1e-2, 3e-2, 1e-1)
    max_iter: PositiveInt = 60
    ridges: Annotated[tuple[Positive, ...], BeforeValidator(listed), Field(min_length=1)] = (1e-3, 1e-2, 1e-1, 1.0)
    neighbours: Annotated[tuple[PositiveInt, ...], BeforeValidator(listed), Field(min_length=1)] = (10, 20)
    temperature: Positive = 0.07
    sgd: SGDConfig = SGDConfig()
    finalists: PositiveInt = 5
    folds: Annotated[int, Field(ge=2)] = 5
    trained: dict[str, TrainedConfig] = {}
    baselines: Annotated[tuple[Literal["pixels", "untrained"], ...], BeforeValidator(listed)] = ()
    low_data: LowDataConfig | None = None
    seeds: PositiveInt = 1
    seed: int = 0
    device: str = "auto"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or Path(self.store) / "probe")

    @property
    def low_data_heads(self) -> tuple[str, ...]:
        """Heads that are fitted with few samples."""
        if self.low_data is None or self.low_data.heads is not None:
            return self.low_data.heads if self.low_data else ()
        return tuple(head for head in self.heads if head in ("logistic", "knn", "ncm"))

    @model_validator(mode="after")
    def _trained_heads_have_a_kind(self) -> ProbeConfig:
        for name, head in self.trained.items():
            kind = head.kind or name
            if kind not in KINDS:
                raise ValueError(f"trained.{name} needs a kind, one of {', '.join(KINDS)}, or such a name")
            if kind in ATTENTIVE and head.width % head.heads:
                raise ValueError(f"trained.{name}: heads {head.heads} does not divide width {head.width}")
            if kind == "aggregation" and head.width % 4:
                raise ValueError(
                    f"trained.{name}: width {head.width} must be a multiple of 4 for an aggregation network"
                )
        return self
