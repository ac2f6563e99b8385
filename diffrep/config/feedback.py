"""Schemas of the sparse autoencoder and of DifFeed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from diffrep.config.schema import (
    BackboneConfig,
    DataConfig,
    LevelSpec,
    NotNegative,
    PathText,
    Positive,
    Section,
    Share,
    listed,
)


class SparseConfig(Section):
    """Training of a `TopKSAE` on vectors; the defaults are Revelio's, `SparseConfig.csr` has CSR's.

    Attributes:
        k: Latents kept of each sample.
        expansion: Latents over the length of a feature.
        latents: Number of latents, in place of `expansion`.
        tied: Decode with the encoder's transpose.
        relu: Set negative latents among the kept ones to zero.
        multi_k: Second k of the loss, as a multiple of k; None for none.
        multi_weight: Weight of the reconstruction with it.
        aux_k: Dead latents that explain what the live ones leave over, at most as many as there are; 0 for none.
        aux_weight: Weight of their normalised squared error.
        dead_after: Steps without firing after which a latent is dead.
        contrast: Weight of InfoNCE between the codes of two views; 0 for none.
        temperature: Of InfoNCE.
        normalized: Divide squared errors by the batch's variance.
        unit_norm: Keep the dictionary's rows at unit length; None does so when they are not tied.
        steps: Optimiser steps. Revelio's 10,240 of 8,192 samples pass a set of 9,000 thousands of times: scale them.
        batch_size: Samples of one step; at most all there are.
        lr: Learning rate of Adam after the warm-up.
        eps: Of Adam.
        warmup: Steps of linear warm-up; at step s, from 0, the rate is lr * (s + 2) / warmup, as published.
    """

    k: PositiveInt = 32
    expansion: PositiveInt = 64
    latents: PositiveInt | None = None
    tied: bool = False
    relu: bool = False
    multi_k: Annotated[int, Field(ge=2)] | None = None
    multi_weight: NotNegative = 1 / 8
    aux_k: Annotated[int, Field(ge=0)] = 0
    aux_weight: NotNegative = 1 / 32
    dead_after: PositiveInt = 30
    contrast: NotNegative = 0.0
    temperature: Positive = 0.2
    normalized: bool = True
    unit_norm: bool | None = None
    steps: PositiveInt = 10_240
    batch_size: Annotated[int, Field(ge=2)] = 8192
    lr: Positive = 4e-4
    eps: Positive = 1e-8
    warmup: Annotated[int, Field(ge=0)] = 500

    @classmethod
    def csr(cls, **changes: Any) -> SparseConfig:
        """Returns CSR's settings (Wen et al., 2025) with changes; `steps` there are ten epochs."""
        published: dict[str, Any] = {
            "k": 8,
            "expansion": 4,
            "tied": True,
            "relu": True,
            "multi_k": 4,
            "aux_k": 512,
            "contrast": 0.1,
            "normalized": False,
            "batch_size": 4096,
            "eps": 6.25e-10,
            "warmup": 0,
        }
        return cls(**published | changes)


class FeedbackHeadConfig(Section):
    """The head on the second pass; the defaults are diffssl's.

    Attributes:
        kind: "difformer", which reads any number of layers and levels (with one of each it is diffssl's Attention
            head), or "linear", which reads one.
        pool: Most cells along each side of a map; for "linear" the side of the grid that it is averaged to.
        norm: Of the tokens, or of the linear head's input.
        width: Token width. This and what follows are of the difformer alone.
        heads: Attention heads; divides `width`.
        depth: Transformer blocks.
        mlp_ratio: Width of the blocks' MLP over `width`.
        dropout: In the blocks.
    """

    kind: Literal["difformer", "linear"] = "difformer"
    pool: PositiveInt = 16
    norm: Literal["layer", "batch", "none"] = "layer"
    width: PositiveInt = 1024
    heads: PositiveInt = 8
    depth: PositiveInt = 2
    mlp_ratio: Positive = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> FeedbackHeadConfig:
        if self.kind == "difformer" and self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class FeedbackConfig(Section):
    """Arguments of `diffrep feedback`: DifFeed on a live network. The training's defaults are diffssl's.

    Attributes:
        backbone: The frozen U-Net.
        data: The images, with labels.
        out: Run folder.
        levels: Noise levels; each costs two passes a step.
        read: Layers that the head reads in the second pass, such as "gd.24" or "up_blocks.1".
        pairs: [source, target] addresses of the feedback; None takes those of `diffrep.heads.feedback.default_pairs`.
        cond: As in `ExtractConfig`: a label, a prompt, or a `.safetensors` file.
        noise: "gaussian" or "none", as in `FeatureRequest`.
        head: The head.
        train_split: Split that is trained and chosen on.
        val_split: Split that the epoch is chosen on; None takes `val_fraction` of the training split, stratified.
        test_split: Split that is scored once; None holds out `test_fraction` of the training split.
        test_fraction: See `test_split`.
        val_fraction: See `val_split`.
        missing: "refuse" or "allow" classes of the training split that have no test sample.
        epochs: Most passes over the training samples.
        patience: Stop after this many epochs without a better validation accuracy; None never stops early.
        batch_size: Images of one step, over all processes; as many make one forward of an evaluation.
        optimizer: "sgd" or "adamw".
        lr: Learning rate of the first epoch.
        momentum: Of SGD.
        weight_decay: L2 for SGD, decoupled for AdamW.
        schedule: "step" multiplies the learning rate by `decay` every `decay_every` epochs; "cosine" takes it to zero.
        decay: See `schedule`.
        decay_every: See `schedule`.
        flip: Mirror training images at random; only sound when mirrored images keep their label.
        loggers: "csv" and "tensorboard" (extra `trackers`), into the run folder.
        workers: Processes that decode images.
        seeds: Repetitions with seeds seed, seed + 1, ...: each with its own validation samples, weights, order and
            noise.
        seed: First seed.
    """

    backbone: BackboneConfig
    data: DataConfig
    out: PathText
    levels: Annotated[tuple[LevelSpec, ...], BeforeValidator(listed), Field(min_length=1)]
    read: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)]
    pairs: tuple[tuple[str, str], ...] | None = None
    cond: int | PathText | None = None
    noise: Literal["gaussian", "none"] = "gaussian"
    head: FeedbackHeadConfig = FeedbackHeadConfig()
    train_split: str = "train"
    val_split: str | None = None
    test_split: str | None = "test"
    test_fraction: Share = 0.2
    val_fraction: Share = 0.2
    missing: Literal["refuse", "allow"] = "refuse"
    epochs: PositiveInt = 28
    patience: PositiveInt | None = None
    batch_size: Annotated[int, Field(ge=2)] = 16
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 1e-2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NotNegative = 0.0
    schedule: Literal["step", "cosine"] = "step"
    decay: Share = 0.1
    decay_every: PositiveInt = 7
    flip: bool = False
    loggers: Annotated[tuple[Literal["csv", "tensorboard"], ...], BeforeValidator(listed)] = ("csv",)
    workers: Annotated[int, Field(ge=0)] = 0
    seeds: PositiveInt = 1
    seed: int = 0
