"""Schemas of probing: what is fitted on stored features, and how it is chosen and scored."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from diffrep.config.schema import LevelSpec, PathText, Section


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
